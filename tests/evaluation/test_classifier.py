"""The small classifier on the bundled digits."""

import numpy as np
import pytest

from jdiff import data
from jdiff.evaluation import classifier


def digits(split):
    source = data.source("digits", split)
    rows = source.gather(range(len(source)))
    return rows["image"], rows["label"]


@pytest.fixture(scope="module")
def trained():
    return classifier.train(*digits("train"), seed=0)


def test_held_out_digits_are_recognised(trained):
    images, labels = digits("test")
    assert (trained.predict(images) == labels).mean() >= 0.985
    p = trained.probabilities(images)
    assert p.shape == (len(images), 10)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
    assert trained.features(images).shape == (len(images), trained.features.dim)


def test_probabilities_do_not_depend_on_the_batch(trained):
    images, _ = digits("test")
    np.testing.assert_allclose(
        trained.probabilities(images[:3]), trained.probabilities(images)[:3], atol=1e-6
    )


def test_training_is_deterministic_in_the_seed():
    images, labels = digits("train")
    fits = [classifier.train(images, labels, seed=s, steps=5).params for s in (3, 3, 4)]
    for name, value in fits[0].items():
        np.testing.assert_array_equal(value, fits[1][name])
    assert any((value != fits[2][name]).any() for name, value in fits[0].items())


def test_a_saved_classifier_is_read_instead_of_trained(tmp_path, trained):
    images, labels = digits("train")
    path = tmp_path / "cache" / "classifier.safetensors"
    first = classifier.train(images, labels, steps=2, path=path)
    again = classifier.train(images, labels, steps=2, seed=9, path=path)
    np.testing.assert_array_equal(first.probabilities(images[:9]), again.probabilities(images[:9]))
    with pytest.raises(ValueError, match="10 classes of images"):
        classifier.train(images, labels, num_classes=11, path=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a saved classifier"):
        classifier.train(images, labels, path=path)


def test_colour_images_of_any_size_train():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 20, 14, 3), dtype=np.uint8)
    made = classifier.train(images, np.arange(20) % 3, steps=1, batch=4)
    assert made.probabilities(images).shape == (20, 3)
    with pytest.raises(ValueError, match="trained on images"):
        made.predict(images[:, :8])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((4, 8, 8, 1), np.float32), np.zeros(4, int), "dtype float32.*to_uint8"),
        (np.zeros((4, 8, 8), np.uint8), np.zeros(4, int), r"\[N, H, W, C\] expected"),
        (np.zeros((4, 8, 8, 1), np.uint8), np.zeros(3, int), r"int \[N\] expected"),
        (np.zeros((4, 8, 8, 1), np.uint8), np.full(4, -1), r"-1\.\.-1"),
        (np.zeros((4, 8, 8, 1), np.uint8), np.full(4, 12), r"12\.\.12: 0\.\.9 allowed"),
    ],
)
def test_data_that_do_not_fit_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        classifier.train(images, labels, num_classes=10)
