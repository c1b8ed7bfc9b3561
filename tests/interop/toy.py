"""A small family for tests: a DiT under names of its own, q, k and v apart."""

from jdiff.interop.tables import Family, Rule, linear, linears, patch
from jdiff.models import DiT

FIELDS = {"width": 16, "depth": 3, "heads": 2, "in_channels": 4, "patch": 2}
CLASS = ("_class_name", "architectures")
OURS_ALONE = ("scan", "remat", "dtype")

TOY = Family(
    cls="ToyTransformer",
    build=lambda config: (DiT, {k: v for k, v in config.items() if k not in CLASS}),
    config=lambda fields: {k: v for k, v in fields.items() if k not in OURS_ALONE},
    table=(
        Rule("embed_patches", "proj", patch(2)),
        Rule("time1", "time.0", linear),
        Rule("time2", "time.2", linear),
        Rule("blocks/{i}/qkv", ("b.{i}.q", "b.{i}.k", "b.{i}.v"), linears(1)),
        Rule("blocks/{i}/project", "b.{i}.out", linear),
        Rule("blocks/{i}/modulation", "b.{i}.ada", linear),
        Rule("blocks/{i}/mlp1", "b.{i}.fc1", linear),
        Rule("blocks/{i}/mlp2", "b.{i}.fc2", linear),
        Rule("modulation", "ada", linear),
        Rule("out", "out", linear),
    ),
    ignored=(r"b\.\d+\.rope",),
    renamed=((r"^b\.(\d+)\.query\.", r"b.\1.q."),),
)
