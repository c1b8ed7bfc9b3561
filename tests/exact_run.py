"""A run without training: its denoiser is the exact one of 300 training digits."""

import pathlib

import numpy as np

from jdiff import denoisers, schedules
from jdiff.config import to_json
from jdiff.data import sources
from jdiff.experiment import defaults
from jdiff.runs import Run


def make(workdir: pathlib.Path, num: int = 40) -> Run:
    """Writes what the commands read from `workdir`, and returns the run that it stands for."""
    train = sources.source("digits", "train").gather(range(300))
    images = train["image"].astype(np.float32) / 127.5 - 1
    config = defaults()
    config.sampling.grid.steps = 4
    config.sampling.guidance.scale = 1.5
    config.sampling.batch = 20
    config.evaluation.num = num
    config.evaluation.features = "pixels"
    (workdir / "config.json").write_text(to_json(config))
    (workdir / "metrics.jsonl").write_text('{"step": 5, "kind": "train", "loss": 1.0}\n')
    schedule = schedules.edm()
    denoise = denoisers.exact(images, schedule, labels=train["label"])
    info = sources.source("digits", "train").info
    return Run(workdir, config, denoise, {"label": 10}, schedule, info, 5, "ema")
