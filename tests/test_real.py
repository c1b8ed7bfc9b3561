"""Real images of a run: prepared as in training, with what the network is told of them."""

import types

import numpy as np
import pytest

from jdiff import assess, generate, real
from jdiff.data import ArraySource, Info
from jdiff.errors import UserError
from jdiff.experiment import defaults

NUM = 7


def made(**data):
    """A run of 8 x 8 images with labels and embeddings, and its examples."""
    rng = np.random.default_rng(0)
    fields = {
        "image": rng.integers(0, 256, (NUM, 8, 8, 1)).astype(np.uint8),
        "label": np.arange(NUM, dtype=np.int32) % 3,
        "text": rng.normal(size=(NUM, 2, 5)).astype(np.float16),
        "text_mask": rng.uniform(size=(NUM, 2)) > 0.5,
    }
    info = Info("made", "train", (8, 8, 1), 3, (), NUM)
    config = defaults()
    config.data.conditions = ("text", "text_mask")
    config.data.update(data)
    run = types.SimpleNamespace(config=config, null={"label": 3, "text": 0.0}, info=info)
    return run, ArraySource(info, fields)


def joined(parts, name="image"):
    return np.concatenate([part[name] for part in parts])


def test_rows_come_once_in_order_and_not_mirrored():
    run, source = made(flip=True)
    parts = list(real.rows(run, source, batch=3))
    assert [len(part["image"]) for part in parts] == [3, 3, 1]
    np.testing.assert_array_equal(joined(parts), source.fields["image"])
    np.testing.assert_array_equal(joined(parts, "label"), source.fields["label"])


def test_rows_are_resized_by_the_filter_of_training():
    run, source = made(size=4, resample="box")
    small = joined(real.rows(run, source)).astype(float)
    area = source.fields["image"].reshape(NUM, 4, 2, 4, 2, 1).mean((2, 4))
    assert np.abs(small - area).max() <= 1.0  # Pillow rounds twice


def test_a_stage_trained_on_patches_is_measured_on_whole_images():
    run, source = made(size=4, crop="patch")
    assert joined(real.rows(run, source)).shape == (NUM, 4, 4, 1)
    np.testing.assert_array_equal(joined(real.rows(run, source, side=8)), source.fields["image"])


def test_what_the_network_is_told():
    run, source = made()
    assert real.told(run) == ["label", "text", "text_mask"]
    (row,) = real.rows(run, source)
    cond = real.conditions(run, row)
    assert {name: entry.dtype.name for name, entry in cond.items()} == {
        "label": "int32", "text": "float32", "text_mask": "bool",
    }  # fmt: skip
    np.testing.assert_array_equal(cond["text"], source.fields["text"].astype(np.float32))
    run.null.pop("label")
    assert real.told(run) == ["text", "text_mask"]


def test_conditions_of_more_images_than_there_are_come_in_turn():
    run, source = made()
    cond = real.all_conditions(run, source, 10)
    wanted = source.fields["label"][np.arange(10) % NUM]
    np.testing.assert_array_equal(cond["label"], wanted)
    assert cond["text"].shape == (10, 2, 5)


def test_samples_with_further_conditions_have_those_of_real_images(monkeypatch):
    run, source = made()
    asked = {}

    def images(run, *, num, cond, seed, batch, sampling):
        asked.update(cond, seed=seed)
        yield np.zeros((4, 8, 8, 1), np.uint8)
        yield np.zeros((num - 4, 8, 8, 1), np.uint8)

    monkeypatch.setattr(generate, "images", images)
    parts = list(assess._draw(run, source, 6, 3, None, None, lambda *_: None))
    rows = real.part(source, 6, 0).picked  # some of the seven, at random
    np.testing.assert_array_equal(asked["text"], source.fields["text"][rows].astype(np.float32))
    np.testing.assert_array_equal(asked["text_mask"], source.fields["text_mask"][rows])
    given = np.concatenate([labels for _, labels in parts])
    np.testing.assert_array_equal(given, source.fields["label"][rows])
    assert [len(part) for part, _ in parts] == [4, 2] and asked["seed"] == 3


def test_parts_of_a_source():
    _, source = made()
    assert real.part(source, NUM, 0) is source
    some = real.part(source, 4, seed=1)
    picked = np.sort(np.random.default_rng(1).choice(NUM, 4, replace=False))
    assert len(some) == some.info.size == 4
    np.testing.assert_array_equal(some.gather(range(4))["image"], source.fields["image"][picked])
    np.testing.assert_array_equal(some[2]["image"], source.fields["image"][picked[2]])
    first = real.first(source, 2)
    assert [row["label"] for row in first.__getitems__([1, 0])] == [1, 0] and len(first) == 2
    assert len(real.first(source, 100)) == NUM


def test_the_sides_of_an_evaluation():
    run, _ = made()
    assert real.sides(run) == ("held-out", "training")
    run.config.evaluation.reference = "train"
    assert real.sides(run) == ("training", "held-out")
    run.config.evaluation.reference = "tests"
    with pytest.raises(UserError, match=r"config\.evaluation\.reference 'tests' is not known"):
        real.sides(run)
