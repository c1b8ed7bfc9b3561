"""Pictures against their captions: the score by hand, its floor and ceiling, and scorers."""

import json

import exact_run
import jax
import made_colours as made
import numpy as np
import pytest

from jdiff import assess, runs
from jdiff.contrastive import kind, scorer
from jdiff.contrastive.matching import Matching
from jdiff.data import sources
from jdiff.errors import UserError
from jdiff.experiment import to_float

WORDS = [f"{style} {word}" for style in ("plain", "bright") for word in "abcd"]


def knowing():
    """A scorer that reads a picture's first level as the place of its caption among WORDS."""
    basis = np.eye(len(WORDS))
    see = lambda x: basis[np.round((np.asarray(x)[:, 0, 0, 0] + 1) * 127.5).astype(int)]
    read = lambda texts: basis[[WORDS.index(text) for text in texts]]
    return scorer.Scorer("knowing", see, read, batch=3)


def shown(places):
    images = np.zeros((len(places), 2, 2, 3), np.uint8)
    images[:, 0, 0, 0] = places
    return images


def figures(rows, place):
    return {row["key"]: row[place] for row in rows}


def test_the_score_is_100_times_the_positive_part_of_the_cosine():
    images = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    texts = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, -1.0]])
    np.testing.assert_allclose(scorer.clip_score(images, texts), [100.0, 96.0, 0.0], rtol=1e-6)


def test_figures_counted_by_hand():
    """Eight samples: five right, one in the other style, two of other things."""
    places = [0, 1, 2, 3, 4, 1, 7, 6]
    match = Matching(knowing(), WORDS, pattern=made.STYLE, top=(1, 2))
    for part in np.split(shown(places), [3, 4]):
        match.add(part)
    match.add_real(shown(range(8)))
    rows = match.rows()
    value, floor = figures(rows, "value"), figures(rows, "floor")
    assert value["clip_score"] == pytest.approx(100 * 5 / 8)
    assert value["caption_recall_1"] == pytest.approx(5 / 8)
    # the sixth shows "plain b" for "bright b"; seven that score nothing share the places after
    # the first: one of two places finds a right one of seven with probability 1/7
    assert value["caption_recall_1_same"] == pytest.approx(6 / 8)
    assert value["caption_recall_2"] == pytest.approx((5 + 3 / 7) / 8)
    assert floor["clip_score"] == 100.0 and floor["caption_recall_1"] == 1.0
    ceiling = figures(rows, "ceiling")
    assert 0.0 < ceiling["clip_score"] < 40.0 and ceiling["caption_recall_1"] < 0.4
    assert all(row["better"] == "higher" and "knowing" in row["about"] or "same" in row["key"]
               for row in rows)  # fmt: skip
    with pytest.raises(UserError, match="8 samples for 9 captions"):
        unfinished = Matching(knowing(), [*WORDS, WORDS[0]])
        unfinished.add(shown(places))
        unfinished.rows()


def test_captions_that_occur_twice_are_one_candidate():
    match = Matching(knowing(), [WORDS[0], WORDS[0], WORDS[1]])
    match.add(shown([0, 0, 1]))
    rows = match.rows()
    assert figures(rows, "value")["caption_recall_1"] == 1.0
    assert figures(rows, "floor") == {"clip_score": None, "caption_recall_1": None}


class Encoder:
    """Reads captions as the set of colours does, and pads them to more tokens."""

    def encode(self, texts):
        rows = [made.told(text) for text in texts]
        told = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        told["mask"] = np.pad(told.pop("text_mask"), ((0, 0), (0, 2)))
        return told | {"text": np.pad(told["text"], ((0, 0), (0, 2), (0, 0)))}


@pytest.fixture
def judge(trained, monkeypatch):
    """The scorer of the trained run, opened by its path."""
    monkeypatch.setattr(scorer, "text_encoder", lambda run: Encoder())
    return scorer.load(trained, batch=24)


def test_the_scorer_of_a_run_sees_and_reads_as_the_run_does(judge, trained):
    run = kind.open(trained)
    images, captions = zip(*made.pictures("test"))
    source = sources.source(
        "colours", "test", run.config.data.data_dir, fields=run.config.data.conditions
    )
    rows = source.gather(range(32))
    texts = np.asarray(jax.jit(run.experiment.texts)(run.params, run.experiment.cond(rows)))
    order = [np.flatnonzero([np.array_equal(x, y) for y in images])[0] for x in rows["image"]]
    np.testing.assert_allclose(judge.texts([captions[i] for i in order]), texts, atol=1e-5)
    seen = np.asarray(jax.jit(run.experiment.images)(run.params, to_float(rows["image"])))
    np.testing.assert_allclose(judge.images(rows["image"]), seen, atol=1e-5)
    twice = rows["image"].repeat(2, axis=1).repeat(2, axis=2)  # enlarged pictures of its own size
    assert (judge.images(twice) * seen).sum(axis=1).min() > 0.9


def test_evaluation_of_real_pictures_as_samples_is_at_the_floor(
    judge, trained, tmp_path, monkeypatch, config
):
    """`assess` draws for held-out captions: if it draws their own pictures, value is floor."""
    base = exact_run.make(tmp_path)
    c = base.config.copy_and_resolve_references()
    c.data.update(config.data.to_dict() | {"conditions": ("text", "text_mask")})
    del c.data["captions"]
    c.evaluation.update({"num": 32, "reference": "train", "scorer": str(trained),
                         "same": made.STYLE, "top": (1,)})  # fmt: skip
    source = sources.source("colours", "train", c.data.data_dir, fields=c.data.conditions)
    run = base._replace(config=c, info=source.info, null={"text": 0.0})
    monkeypatch.setattr(runs, "sampler", lambda *args, **choices: None)
    monkeypatch.setattr(
        assess, "_draw",
        lambda run, others, num, *rest: ((row["image"], None) for row in
                                         assess.real.rows(run, others)),
    )  # fmt: skip
    found = assess.assess(run, metrics=["frechet"], features="pixels")
    rows = {row["key"]: row for row in found["metrics"]}
    assert set(rows) == {"frechet", "clip_score", "caption_recall_1", "caption_recall_1_same"}
    for name in ("clip_score", "caption_recall_1", "caption_recall_1_same"):
        assert rows[name]["value"] == pytest.approx(rows[name]["floor"])
        assert rows[name]["value"] > 0.7 > rows[name]["ceiling"] / 100
    assert rows["caption_recall_1"]["ceiling"] < 0.25
    assert json.loads((tmp_path / "evaluation.json").read_text()) == found
    assert "shuffled captions" in assess.table(found).caption
    c.data.conditions = ()
    with pytest.raises(UserError, match="does not draw images for texts"):
        assess.matched(run, source, 8, lambda *told: None)


def test_what_is_no_scorer_is_refused(tmp_path, trained):
    with pytest.raises(UserError, match="is no scorer"):
        scorer.load(tmp_path / "nothing")
    exact_run.make(tmp_path)
    with pytest.raises(UserError, match="of the kind 'diffusion'"):
        scorer.load(tmp_path)
    run = kind.open(trained)
    with pytest.raises(UserError, match=r"config\.texts\.encoder does"):
        scorer.text_encoder(run)
