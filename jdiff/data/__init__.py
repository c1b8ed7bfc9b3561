"""Real images in: prepared sets by name, and seeded, sharded, resumable batches of them.

Who may live here: sources, transforms on the host, and the pipeline. Nothing that knows a model.
"""

from jdiff.data.pipeline import Batches, batches
from jdiff.data.sources import ArraySource, Field, Info, RecordSource, Source, source

__all__ = [
    "ArraySource",
    "Batches",
    "Field",
    "Info",
    "RecordSource",
    "Source",
    "batches",
    "source",
]
