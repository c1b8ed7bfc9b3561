"""experiments/cdm_conditioning_augmentation.py: its statements, its networks, what it keeps."""

import dataclasses
import importlib.util
import json
import math
import pathlib

import numpy as np
import pytest

from jdiff import cascades, config, denoisers, experiment, runs, schedules
from jdiff.data import sources
from jdiff.errors import UserError
from jdiff.evaluation import classifier
from jdiff.train import Result

_PATH = pathlib.Path(__file__).parents[1] / "experiments" / "cdm_conditioning_augmentation.py"
_SPEC = importlib.util.spec_from_file_location("cdm_conditioning_augmentation", _PATH)
cdm = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(cdm)

TINY = cdm.Settings(
    data="digits", size=8, levels=(1001,), models=("base", "noise"), seeds=1, steps=2, batch=8,
    channels=8, base_channels=8, num=20, evaluations=2,
)  # fmt: skip


def test_the_ordering_is_that_of_the_means_and_the_papers_own_numbers_have_it():
    settings = cdm.Settings()._replace(levels=(101, 1001))
    paper = {name: [cdm.Figures(*row)] for name, row in cdm.PAPER.items()}
    assert cdm.ordering(settings, paper) == {
        "without augmentation is the worst": True,
        "the strongest noise is the best": True,
    }
    swapped = paper | {"s = 1001": paper["s = 0"], "s = 0": paper["s = 1001"]}
    assert not any(cdm.ordering(settings, swapped).values())
    true = {
        "s = 0 (amortised), true input": 1.0, "s = 101, true input": 2.0,
        "s = 1001, true input": 3.0,
    }  # fmt: skip
    rising = {name: [cdm.Figures(v, v, 1.0)] for name, v in true.items()}
    assert cdm.ordering(settings, rising) == {"on true input the distance rises with s": True}
    rising["s = 101, true input"] = rising["s = 1001, true input"]
    assert cdm.ordering(settings, rising) == {"on true input the distance rises with s": False}


def test_mean_and_deviation_are_of_a_sample():
    assert cdm.spread([1.0, 2.0, 6.0]) == pytest.approx((3.0, math.sqrt(7.0)))
    assert cdm.shown([cdm.Figures(1, 0, 0), cdm.Figures(3, 0, 0)], "train") == "2.00 ± 1.41"
    assert cdm.shown([cdm.Figures(1, 0, 0)], "train") == "1.00"


def test_every_cell_is_named_once_and_needs_networks_that_are_trained():
    every = cdm.cells(cdm.Settings())
    assert len({cell.name for cell in every}) == len(every)
    assert {cell.model for cell in every} == set(cdm.MODELS) - {"base"}
    assert set(cdm.PAPER) <= {cell.name for cell in every}
    assert {cell.model for cell in cdm.cells(TINY)} == {"noise"}


def test_only_the_inputs_augmentation_differs_between_second_stages():
    plain, noise, blur = (cdm.config(cdm.Settings(), m, 0) for m in ("plain", "noise", "blur"))
    for other in (noise, blur):
        differing = config.differences(plain, other)
        assert differing
        allowed = ("name", "low_res.augmentation", "sampling.aug_level")
        assert all(line.startswith(allowed) for line in differing), differing
    assert noise.low_res.augmentation.schedule == noise.schedule  # as truncation needs it


def test_what_is_done_is_passed_over_and_the_rest_is_estimated():
    said, did = [], []

    def task(name: str, weight: float, done: bool) -> cdm.Task:
        return cdm.Task(name, weight, lambda: done, lambda: did.append(name) or "fine")

    cdm.work([task("a", 5, True), task("b", 1, False), task("c", 3, False)], said.append)
    assert did == ["b", "c"]
    assert said[0] == "1 of 3 parts are there from before"
    assert said[1].startswith("[1/2] b: fine; 0 min passed, about 0 min left")


def test_a_folder_is_of_one_setting_for_any_number_of_seeds(tmp_path):
    cdm.claim(tmp_path, TINY)
    cdm.claim(tmp_path, TINY._replace(seeds=5))
    with pytest.raises(UserError, match=r"other settings \(settings.json\)"):
        cdm.claim(tmp_path, TINY._replace(channels=16))


@pytest.mark.parametrize("model", cdm.MODELS)
def test_the_configs_build_networks_that_take_their_images_and_input(model):
    found = config.from_json(config.to_json(cdm.config(cdm.Settings(), model, 0)))
    digits = sources.source("digits", "train").info
    fashion = dataclasses.replace(digits, name="fashion_mnist", shape=(28, 28, 1))
    info = experiment.prepared(fashion, found.data)
    assert info.shape == ((7, 7, 1) if model == "base" else (14, 14, 1))
    built = experiment.build(found, info)
    experiment.check(built, info)
    assert (built.low_res is None) == (model in ("base", "single"))


@pytest.fixture
def exact_runs(monkeypatch):
    """In place of training: the exact denoisers of 300 digits and of their 4 x 4 means."""
    source = sources.source("digits", "train")
    data = source.gather(range(300))
    images, labels = data["image"].astype(np.float32) / 127.5 - 1, data["label"]
    schedule = schedules.squared_cosine(TINY.T)
    low = cascades.low_res(2, cascades.augmentations.gaussian(schedule))
    info, small = source.info, dataclasses.replace(source.info, shape=(4, 4, 1))

    def load_run(folder: pathlib.Path) -> runs.Run:
        made = cdm.config(TINY, folder.name.split("_")[0], 0)
        run = runs.Run(folder, made, None, {"label": 10}, schedule, info, 5, "ema")
        if folder.name == "base_0":
            denoise = denoisers.exact(low.shrink(images), schedule, labels=labels)
            return run._replace(denoiser=denoise, info=small)
        denoise = cascades.exact(images, schedule, low, labels=labels)
        return run._replace(denoiser=denoise, low_res=low)

    def train(config, workdir: pathlib.Path, console) -> Result:
        runs.describe(workdir, state="finished")
        return Result(2, 1.0, 1.0, 1.0)

    monkeypatch.setattr(cdm.runs, "load_run", load_run)
    monkeypatch.setattr(cdm.train, "train", train)
    return data


def test_it_measures_every_cell_and_goes_on_where_it_was_cut_off(exact_runs, tmp_path, capsys):
    work, figure = tmp_path / "work", tmp_path / "figure.png"
    for model in TINY.models:
        (work / f"{model}_0").mkdir(parents=True)
    path = work / "classifier.safetensors"
    classifier.train(exact_runs["image"], exact_runs["label"], steps=5, path=path)
    words = [f"--workdir={work}", f"--out={figure}"]
    found = cdm.main(words, TINY)
    assert set(found) == {cell.name for cell in cdm.cells(TINY)}
    assert {"s = 1001", "s = 1001, truncated", "s = 1001, true input"} < set(found)
    assert all(math.isfinite(v) for rows in found.values() for row in rows for v in row)
    assert figure.is_file()
    kept = json.loads((work / "results.json").read_text())
    assert kept["s = 1001"][0]["train"] == found["s = 1001"][0].train

    (work / "cells" / "s1001_truncated_0.json").unlink()
    capsys.readouterr()
    again = cdm.main(words, TINY)
    said = capsys.readouterr().out
    assert "6 of 7 parts are there from before" in said and "[1/1] seed 0, s = 1001, tr" in said
    assert again["s = 1001, truncated"] == found["s = 1001, truncated"]
