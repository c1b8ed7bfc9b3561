"""Feature extractors, and the one conversion to uint8."""

import jax.numpy as jnp
import numpy as np
import pytest

from jdiff.errors import UserError
from jdiff.evaluation import features

IMAGES = np.random.default_rng(0).integers(0, 256, (11, 4, 5, 3), dtype=np.uint8)


def test_to_uint8_truncates_after_adding_128():
    # As EDM: -1 -> 0.5 -> 0 ; 1 -> 255.5 -> 255 ; 0 -> 128 ; 0.9921 -> 254.49 -> 254.
    x = jnp.array([-3.0, -1.0, -0.9961, -0.9960, 0.0, 0.0039, 0.9921, 0.9999, 1.0, 7.0])
    assert features.to_uint8(x).tolist() == [0, 0, 0, 1, 128, 128, 254, 255, 255, 255]
    assert features.to_uint8(x).dtype == jnp.uint8


def test_every_uint8_value_survives_the_way_there_and_back():
    values = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(features.to_uint8(jnp.asarray(values / 127.5 - 1)), values)


def test_pixels_are_flat_and_in_minus_one_to_one():
    extractor = features.pixels((4, 5, 3))
    got = extractor(IMAGES)
    assert (got.shape, got.dtype, extractor.dim) == ((11, 60), np.float32, 60)
    np.testing.assert_allclose(got, IMAGES.reshape(11, -1) / 127.5 - 1, atol=1e-6)


def test_a_function_sees_one_batch_size_and_the_padding_is_cut():
    shapes = []

    def mean(x):
        shapes.append(x.shape)
        return x.astype(jnp.float32).mean((1, 2))

    extractor = features.function("mean", 3, mean)
    for count in (11, 1, 64, 70):
        images = np.resize(IMAGES, (count, 4, 5, 3))
        np.testing.assert_allclose(extractor(images), images.mean((1, 2)), rtol=1e-5)
    assert shapes == [(64, 4, 5, 3)]  # traced once
    assert [f.shape for f in features.extract(extractor, [IMAGES, IMAGES[:2]])] == [(11, 3), (2, 3)]


def test_wrong_images_and_wrong_functions_are_refused():
    extractor = features.function("mean", 4, lambda x: x.mean((1, 2)))
    with pytest.raises(ValueError, match=r"'mean' have shape \(64, 3\).*\(64, 4\) expected"):
        extractor(IMAGES)
    with pytest.raises(ValueError, match="float64.*to_uint8"):
        extractor(IMAGES / 255)
    with pytest.raises(ValueError, match=r"\[N, H, W, C\] expected"):
        extractor(IMAGES[0])


def test_extractors_by_name(tmp_path):
    assert features.named("pixels", (4, 5, 3)).dim == 60
    assert features.named("classifier", (4, 5, 3), classifier=lambda: "made") == "made"
    with pytest.raises(UserError, match="Did you mean 'inception'"):
        features.named("incepton", (4, 5, 3))
    with pytest.raises(UserError, match="classifier"):
        features.named("classifier", (4, 5, 3))
    for name, item in (("inception", "fid"), ("resnet50", "resnet50")):
        with pytest.raises(FileNotFoundError, match=f"jdiff prepare {item}"):
            features.named(name, (4, 5, 3), path=tmp_path / "none")
