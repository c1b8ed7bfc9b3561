"""A cascade without training, 4 x 4 to 8 x 8: its stages are exact denoisers of training digits."""

import dataclasses
import json
import pathlib

import numpy as np

from jdiff import cascades, denoisers, schedules, staged
from jdiff.config import to_json
from jdiff.data import sources
from jdiff.experiment import defaults
from jdiff.runs import Run

LEVEL = 0.2


def make(workdir: pathlib.Path, num: int = 40, **more) -> staged.Opened:
    """Writes what the commands read from `workdir`, and returns the cascade that it stands for.

    `more` goes to the last stage's config.sampling.
    """
    train = sources.source("digits", "train").gather(range(300))
    images = train["image"].astype(np.float32) / 127.5 - 1
    schedule = schedules.cosine()
    low = cascades.low_res(2, cascades.augmentations.gaussian(schedule))
    base, last = defaults(), defaults()
    for k, c in enumerate((base, last)):
        c.name = f"digits, stage {k}"
        c.schedule = {"name": "cosine"}
        c.sampling.solver = {"name": "ddim"}
        c.sampling.grid = {"name": "uniform", "steps": 4}
        c.sampling.guidance.scale = 1.5
        c.sampling.batch = 20
        c.evaluation.num = num
        c.evaluation.features = "pixels"
        c.evaluation.reference = "train"
    base.data.size, base.data.resample = 4, "box"
    last.low_res.factor = 2.0
    last.low_res.augmentation = {"name": "gaussian", "schedule": {"name": "cosine"}}
    last.sampling.aug_level = LEVEL
    last.sampling.update(more)
    config = staged.config("digits, exact", base, last)
    staged.claim(workdir, config)
    denoise = (
        denoisers.exact(np.asarray(low.shrink(images)), schedule, labels=train["label"]),
        cascades.exact(images, schedule, low, labels=train["label"]),
    )
    info = sources.source("digits", "train").info
    runs = []
    for k, (c, side) in enumerate(zip((base, last), (4, 8))):
        folder = staged.folder(workdir, k)
        folder.mkdir()
        (folder / "config.json").write_text(to_json(c))
        (folder / "metrics.jsonl").write_text('{"step": 5, "kind": "train", "loss": 1.0}\n')
        own = dataclasses.replace(info, shape=(side, side, 1))
        described = {"state": "finished", "parameters": 7, "data": dataclasses.asdict(own)}
        (folder / "run.json").write_text(json.dumps(described))
        runs.append(
            Run(folder, c, denoise[k], {"label": 10}, schedule, own, 5, "ema",
                low_res=low if k else None)
        )  # fmt: skip
    return opened(runs, config, [None, None])


def opened(runs: list[Run], config, sampling) -> staged.Opened:
    """As `staged.load_cascade` opens it, with sampler options of each stage."""
    made = [staged.stage(run, choices) for run, choices in zip(runs, sampling)]
    return staged.Opened(cascades.cascade(*made), tuple(runs), config)
