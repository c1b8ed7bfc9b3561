"""The assessment, on a run whose denoiser is the exact one of the training images."""

import dataclasses
import io
import json

import exact_run
import numpy as np
import pytest
from rich.console import Console

from jdiff import assess, generate, pictures, report, yardstick
from jdiff.data import sources
from jdiff.errors import UserError
from jdiff.evaluation import classifier
from jdiff.evaluation.features import pixels
from jdiff.evaluation.moments import Moments, frechet
from jdiff.runs import Run

NUM = 40


class NearestMean:
    """A classifier without training: the class whose mean image is nearest."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.means = np.stack([images[labels == k].mean(0) for k in range(10)])

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        distances = ((images[:, None].astype(float) - self.means) ** 2).sum((2, 3, 4))
        return np.eye(10)[distances.argmin(1)]

    def predict(self, images: np.ndarray) -> np.ndarray:
        return self.probabilities(images).argmax(1)


@pytest.fixture
def run(tmp_path) -> Run:
    return exact_run.make(tmp_path, num=NUM)


@pytest.fixture
def judge(monkeypatch) -> NearestMean:
    train = sources.source("digits", "train").gather(range(1437))
    made = NearestMean(train["image"], train["label"])
    monkeypatch.setattr(classifier, "train", lambda *args, **kwargs: made)
    return made


def split(name: str) -> tuple[np.ndarray, np.ndarray]:
    source = sources.source("digits", name)
    rows = source.gather(range(len(source)))
    return rows["image"], rows["label"]


def test_figures_are_those_of_the_samples_and_the_splits(run):
    result = assess.assess(run, metrics=["sliced", "frechet"], console=Console(file=io.StringIO()))
    assert [row["key"] for row in result["metrics"]] == ["frechet", "sliced"]

    labels = generate.in_turn(list(range(10)), NUM)
    drawn = np.concatenate(list(generate.images(run, num=NUM, labels=labels)))
    space = pixels((8, 8, 1))
    test, (train, _) = split("test")[0], split("train")
    held_out = Moments.of(space(test))
    row = result["metrics"][0]
    assert row["value"] == pytest.approx(frechet(Moments.of(space(drawn)), held_out), rel=1e-6)
    # The floor is measured on as many training images as there are samples.
    picked = np.sort(np.random.default_rng(0).choice(len(train), NUM, replace=False))
    floor = frechet(Moments.of(space(train[picked])), held_out)
    assert row["floor"] == pytest.approx(floor, rel=1e-6)
    for row in result["metrics"]:
        assert row["floor"] < row["ceiling"] and row["value"] < row["ceiling"]
    assert result["classifier"] is None
    settings = result["settings"]
    assert (settings["num"], settings["floor_images"], settings["reference_images"]) == (
        NUM, NUM, len(test)
    )  # fmt: skip
    assert (settings["reference"], settings["floor"]) == ("held-out", "training")
    assert settings["guidance"]["scale"] == 1.5 and settings["step"] == 5

    assert json.loads((run.workdir / assess.FILE).read_text()) == result
    last = json.loads((run.workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last == {"step": 5, "kind": "evaluation", "frechet": result["metrics"][0]["value"],
                    "sliced": result["metrics"][1]["value"]}  # fmt: skip


def test_the_intended_class_is_counted_class_by_class(run, judge):
    result = assess.assess(run, num=26, metrics=["accuracy", "inception_score"])
    labels = generate.in_turn(list(range(10)), 26)
    drawn = np.concatenate(list(generate.images(run, num=26, labels=labels)))
    found = judge.predict(drawn) == labels
    judged = result["classifier"]
    assert judged["accuracy"] == found.mean()
    test, truth = split("test")
    assert judged["test_accuracy"] == (judge.predict(test) == truth).mean()
    assert judged["chance"] == 0.1
    assert [c["num"] for c in judged["per_class"]] == [3] * 6 + [2] * 4
    assert [c["share"] for c in judged["per_class"]] == [
        found[labels == k].mean() for k in range(10)
    ]
    assert [row["key"] for row in result["metrics"]] == ["inception_score"]


def test_all_metrics_are_measured_shown_and_reported(run, judge):
    result = assess.assess(run)
    assert [row["key"] for row in result["metrics"]] == list(yardstick.FIGURES)
    for row in result["metrics"]:
        assert all(isinstance(row[place], float) for place in ("value", "floor", "ceiling"))
    text = io.StringIO()
    Console(file=text, width=120).print(assess.table(result))
    page = report.render(run.workdir)
    from jdiff.report.figures import number, percent

    for row in result["metrics"]:
        for place in ("value", "floor", "ceiling"):
            assert number(row[place]) in text.getvalue()
            assert number(row[place]) in page
    assert percent(result["classifier"]["accuracy"]) in text.getvalue()


def test_sampling_can_be_replaced(run):
    result = assess.assess(
        run, metrics=["frechet"],
        sampling={"solver": {"name": "euler"}, "guidance": {"scale": 1.0}},
    )  # fmt: skip
    assert result["settings"]["solver"] == {"name": "euler"}
    assert result["settings"]["guidance"]["scale"] == 1.0
    assert (
        result["metrics"][0]["value"]
        != assess.assess(run, metrics=["frechet"])["metrics"][0]["value"]
    )


@pytest.mark.parametrize(
    "options,message",
    [
        ({"num": 7}, "num=7 images given; an evaluation needs at least 8"),
        ({"metrics": ["freched"]}, "'freched' is not known. Did you mean 'frechet'?"),
        ({"features": "pixel"}, "'pixel' is not known. Did you mean 'pixels'?"),
        ({"sampling": {"solver": {"name": "huen"}}}, "'huen' is not known. Did you mean 'heun'?"),
    ],
)
def test_mistakes_leave_the_last_evaluation_alone(run, options, message):
    (run.workdir / assess.FILE).write_text("{}")
    before = (run.workdir / "metrics.jsonl").read_text()
    with pytest.raises(UserError) as caught:
        assess.assess(run, **{"metrics": ["frechet"], **options})
    assert message in str(caught.value)
    assert (run.workdir / assess.FILE).read_text() == "{}"
    assert (run.workdir / "metrics.jsonl").read_text() == before


def test_what_needs_labels_is_left_out_or_refused(run):
    unlabelled = run._replace(null={}, info=dataclasses.replace(run.info, num_classes=0))
    names = assess.wanted_metrics(unlabelled, "pixels", None)
    assert "accuracy" not in names and "inception_score" not in names and "frechet" in names
    unconditional = run._replace(null={})
    names = assess.wanted_metrics(unconditional, "classifier", None)
    assert "accuracy" not in names and "inception_score" in names
    with pytest.raises(UserError, match="intends no class"):
        assess.wanted_metrics(unconditional, "pixels", ["accuracy"])
    with pytest.raises(UserError, match="digits has no labels"):
        assess.wanted_metrics(unlabelled, "pixels", ["inception_score"])
    with pytest.raises(UserError, match="features=classifier: digits has no labels"):
        assess.wanted_metrics(unlabelled, "classifier", ["frechet"])


def test_an_image_depends_on_its_id_alone(run):
    labels = generate.in_turn(list(range(10)), 20)
    whole = np.concatenate(list(generate.images(run, num=20, labels=labels, seed=3, batch=20)))
    parts = list(generate.images(run, num=20, labels=labels, seed=3, batch=8))
    assert [len(part) for part in parts] == [8, 8, 4]
    assert whole.dtype == np.uint8 and whole.shape == (20, 8, 8, 1)
    # The last bit may differ between programs, and rounding may carry it to the pixel.
    assert np.abs(np.concatenate(parts).astype(int) - whole).max() <= 1
    other = next(generate.images(run, num=20, labels=labels, seed=4, batch=20))
    assert np.abs(other.astype(int) - whole).max() > 10


def test_labels_in_turn():
    assert generate.in_turn([3, 7], 5).tolist() == [3, 7, 3, 7, 3]
    assert generate.in_turn([3, 7, 1], 2).tolist() == [3, 7]


def test_the_table_of_a_result_without_figures():
    result = {
        "settings": {"num": 8, "floor": "training", "floor_images": 8, "reference": "held-out",
                     "reference_images": 8, "features": "pixels"},
        "seconds": {"total": 1.0}, "classifier": None,
        "metrics": [{"key": "kernel", "name": "Kernel distance", "better": "lower", "about": "",
                     "value": 0.25, "floor": None, "ceiling": None}],
    }  # fmt: skip
    text = io.StringIO()
    Console(file=text, width=100).print(assess.table(result))
    assert "0.250" in text.getvalue() and "–" in text.getvalue()


def test_pictures_and_evaluation_convert_alike():
    x = np.random.default_rng(0).uniform(-1.2, 1.2, (6, 48, 48, 3)).astype(np.float32)
    from jdiff.evaluation.features import to_uint8

    picture = pictures.grid(x, columns=1)
    gap = pictures.GAP
    rows = [picture[gap + i * (48 + gap) :][:48, gap:-gap] for i in range(6)]
    np.testing.assert_array_equal(np.stack(rows), np.asarray(to_uint8(x)))
