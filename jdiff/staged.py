"""Cascades of trained stages: one config for all of them, and the folder of their runs.

WORKDIR/cascade.json (the whole config)  WORKDIR/stage0  WORKDIR/stage1 ... (run directories)
"""

import ml_collections

from jdiff.errors import UserError


def config(name: str, *stages: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config of a cascade: what get_config() of its file returns.

    Args:
      name: of the cascade, for reports.
      stages: an experiment's config (`experiment.defaults`) each, the base first. All but the base
        have a low_res.factor.

    Its fields are `name`; `stages`, which has each stage's config under its number
    (--config.stages.1.train.steps=500); and `stage`, which one to train (--config.stage=1, or by
    the name of its config), None for all in order.

    Raises:
      UserError: no stages, or a config that is not an experiment's.
    """
    if not stages:
        raise UserError("staged.config: a cascade has one stage or more; none was given.")
    c = ml_collections.ConfigDict()
    c.name = name
    c.stage = None  # which one to train, by its number or name; None: all in order
    c.stages = ml_collections.ConfigDict()
    for k, stage in enumerate(stages):
        if not isinstance(stage, ml_collections.ConfigDict) or "train" not in stage:
            raise UserError(f"staged.config: stage {k} is no experiment's config but {stage!r}.")
        c.stages[str(k)] = stage
    return c
