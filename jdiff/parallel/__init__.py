"""Many devices: the mesh, the rules that lay arrays out on it, many hosts, long sequences.

Who may live here: what says where an array lives, and what must know it (attention over a sequence
that is split). Networks name the axes of their parameters and activations; a `Layout` maps those
names to the axes of a mesh. Nothing here knows of networks, losses or configs.
"""

from jdiff.parallel.layout import Layout, constrain
from jdiff.parallel.mesh import AXES, make
from jdiff.parallel.shardings import of_state

__all__ = ["AXES", "Layout", "constrain", "make", "of_state"]
