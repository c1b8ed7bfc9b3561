"""The assessment of cascades and stages, on exact denoisers of training images."""

import io
import json

import exact_cascade
import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from jdiff import assess, assess_cascade, generate, pictures, real
from jdiff.data import sources
from jdiff.evaluation.features import pixels, to_uint8
from jdiff.evaluation.moments import Moments, frechet
from jdiff.experiment import to_float
from jdiff.report.figures import number, signed

NUM = 40


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return exact_cascade.make(tmp_path_factory.mktemp("cascades") / "exact", NUM)


@pytest.fixture(scope="module")
def result(opened):
    return assess_cascade.assess_cascade(
        opened, metrics=["frechet", "sliced"], console=Console(file=io.StringIO())
    )


def held_out(num=NUM):
    """The held-out images that an evaluation picks, and their labels."""
    source = sources.source("digits", "test")
    rows = np.sort(np.random.default_rng(0).choice(len(source), num, replace=False))
    found = source.gather(rows)
    return found["image"], found["label"]


def distance(images, reference):
    space = pixels(images.shape[1:])
    return frechet(Moments.of(space(images)), Moments.of(space(reference)))


def test_figures_are_those_of_true_and_of_generated_input(opened, result):
    truth, labels = held_out()
    key, cond = jax.random.key(0), {"label": labels.astype(np.int32)}
    base, last = opened.cascade.sample(key, cond, NUM, batch=20, intermediate=True)
    small = opened.runs[1].low_res.shrink(to_float(jax.numpy.asarray(truth)))
    restored = np.asarray(to_uint8(opened.cascade.upsample(key, 1, small, cond, batch=20)))
    train = sources.source("digits", "train").gather(range(1437))["image"]
    boxed = np.concatenate([
        row["image"] for row in real.rows(opened.runs[0], real.source(opened.runs[0], "training"))
    ])  # fmt: skip

    first, second = (stage["metrics"][0] for stage in result["stages"])
    assert first["generated"] == pytest.approx(
        distance(np.asarray(to_uint8(base)), boxed), rel=1e-4
    )
    assert (first["true"], first["gap"]) == (None, None)
    assert second["generated"] == pytest.approx(
        distance(np.asarray(to_uint8(last)), train), rel=1e-4
    )
    assert second["true"] == pytest.approx(distance(restored, train), rel=1e-4)
    assert second["gap"] == second["generated"] - second["true"]
    # The floor is that of the very images that the true input was made of.
    assert second["floor"] == pytest.approx(distance(truth, train), rel=1e-6)
    assert second["floor"] < second["true"] < second["ceiling"]

    made = {row["key"]: row for row in result["stages"][1]["pairs"]["rows"]}
    square = ((restored.astype(float) - truth) ** 2).mean((1, 2, 3))
    decibels = 10 * np.log10(255**2 / square).mean()
    assert made["psnr"]["value"] == pytest.approx(decibels, rel=1e-3)
    large = np.asarray(to_uint8(opened.runs[1].low_res.enlarge(small, truth.shape)))
    square = ((large.astype(float) - truth) ** 2).mean((1, 2, 3))
    assert made["psnr"]["enlarged"] == pytest.approx(
        10 * np.log10(255**2 / square).mean(), rel=1e-5
    )
    assert 0 < made["ssim"]["value"] < 1 and made["consistency"]["value"] > 10
    assert result["stages"][1]["pairs"]["num"] == NUM
    assert result["stages"][1]["pairs"]["window"] == 7


def test_what_is_written_and_said(opened, result):
    folder = opened.runs[0].workdir.parent
    assert json.loads((folder / assess_cascade.FILE).read_text()) == result
    assert not (folder / "stage1" / "evaluation.json").exists()
    settings = result["settings"]
    assert (settings["num"], settings["reference"], settings["floor"]) == (
        NUM,
        "training",
        "held-out",
    )
    assert settings["reference_images"] == 1437 and settings["floor_images"] == NUM
    assert [stage["shape"] for stage in result["stages"]] == [[4, 4, 1], [8, 8, 1]]
    assert result["stages"][1]["settings"]["aug_level"] == exact_cascade.LEVEL
    assert "aug_level" not in result["stages"][0]["settings"]
    names = sorted(file.name for file in (folder / "pictures").iterdir())
    assert names == ["generated_0.png", "generated_1.png", "input_1.png", "sample_1.png",
                     "truth_1.png"]  # fmt: skip
    with Image.open(folder / "pictures" / "truth_1.png") as picture:
        truth, _ = held_out()
        np.testing.assert_array_equal(np.asarray(picture), pictures.grid(truth[:16], columns=4))
    text = io.StringIO()
    Console(file=text, width=80).print(assess_cascade.table(result))
    said = text.getvalue()
    row = result["stages"][1]["metrics"][0]
    for words in (
        number(row["true"]),
        number(row["generated"]),
        signed(row["gap"]),
        "stage 1, 8 x 8",
    ):
        assert words in said
    assert "Fréchet distance ↓" in said and "Sliced Wasserstein ↓" in said  # on one line
    assert number(result["stages"][1]["pairs"]["rows"][0]["enlarged"]) in said


def test_true_input_shares_no_image_with_the_reference(opened, tmp_path):
    for run in opened.runs:
        run.config.evaluation.reference = "test"
    try:
        found = assess_cascade.assess_cascade(opened, num=20, metrics=["frechet"])
    finally:
        for run in opened.runs:
            run.config.evaluation.reference = "train"
    settings = found["settings"]
    assert (settings["reference"], settings["floor"]) == ("held-out", "training")
    # Yet the truth that PSNR compares with is held out.
    truth, _ = held_out(20)
    with Image.open(opened.runs[0].workdir.parent / "pictures" / "truth_1.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), pictures.grid(truth[:16], columns=4))
    assert found["stages"][1]["pairs"]["num"] == 20


def test_a_stage_before_a_truncated_one_is_measured_by_its_images(opened, result, tmp_path):
    truncated = exact_cascade.make(tmp_path / "c", NUM, truncate=True)
    found = assess_cascade.assess_cascade(truncated, metrics=["frechet", "sliced"])
    assert found["stages"][1]["settings"]["truncate"] is True
    before, after = (r["stages"][0]["metrics"] for r in (result, found))
    for one, other in zip(before, after):
        assert other["generated"] == pytest.approx(one["generated"], rel=1e-4)
    assert found["stages"][1]["metrics"][0]["generated"] != pytest.approx(
        result["stages"][1]["metrics"][0]["generated"], rel=1e-4
    )


def test_a_stage_by_itself_is_given_true_input(opened, result):
    run = opened.runs[1]
    found = assess.assess(run, metrics=["frechet"])
    assert found["metrics"][0]["floor"] == result["stages"][1]["metrics"][0]["floor"]
    assert found["settings"]["num"] == NUM and found["settings"]["aug_level"] == exact_cascade.LEVEL
    # The key of stage 1 is the same in a cascade, so the samples are.
    assert found["metrics"][0]["value"] == pytest.approx(
        result["stages"][1]["metrics"][0]["true"], rel=1e-4
    )
    assert found["pairs"]["num"] == NUM
    assert (
        found["pairs"]["rows"][0]["enlarged"]
        == (result["stages"][1]["pairs"]["rows"][0]["enlarged"])
    )
    (run.workdir / assess.FILE).unlink()


def test_an_enlarged_image_depends_on_its_number_alone(opened):
    run = opened.runs[1]
    upsample, usual = generate.upsampler(run)
    source = real.source(run, "held-out")

    def of(num):
        rows = real.rows(run, real.first(source, num), batch=usual)
        return [part.sample for part in generate.enlarged(run, rows, upsample, usual)]

    whole, filled = of(40), of(32)
    assert [len(part) for part in filled] == [20, 12] and usual == 20
    assert whole[1].shape == (20, 8, 8, 1) and whole[1].dtype == np.uint8
    np.testing.assert_array_equal(whole[0], filled[0])
    np.testing.assert_array_equal(whole[1][:12], filled[1])
    assert np.abs(whole[0].astype(int) - whole[1]).mean() > 10


def test_stages_are_told_of_as_they_are_done(opened):
    seen = []
    parts = list(
        generate.cascade_images(
            opened, num=30, cond={"label": np.arange(30) % 10}, tell=lambda *done: seen.append(done)
        )
    )
    assert seen == [(0, 20), (1, 20), (0, 10), (1, 10)]
    assert [tuple(s.shape for s in part) for part in parts] == [
        ((20, 4, 4, 1), (20, 8, 8, 1)), ((10, 4, 4, 1), (10, 8, 8, 1)),
    ]  # fmt: skip
