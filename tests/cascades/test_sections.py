"""Augmentations from the sections of a config."""

import jax
import ml_collections
import numpy as np
import pytest

from jdiff import UserError, schedules
from jdiff import config as configs
from jdiff.cascades import augmentations
from jdiff.cascades.augmentations import blur, chain, down_up, gaussian, jpeg, none


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


SECTIONS = {
    "none": ({"name": "none"}, none),
    "gaussian": ({"name": "gaussian"}, gaussian),
    "its schedule": (
        {"name": "gaussian", "schedule": {"name": "squared_cosine", "T": 50}, "high": 20.0},
        lambda: gaussian(schedules.squared_cosine(50), high=20.0),
    ),
    "blur": ({"name": "blur", "size": 5, "tells": True}, lambda: blur(5, tells=True)),
    "jpeg": ({"name": "jpeg", "low_quality": 10}, lambda: jpeg(10)),
    "down_up": ({"name": "down_up", "up": "nearest"}, lambda: down_up(up="nearest")),
    "chain": (
        {
            "name": "chain",
            "first": {"name": "jpeg"},
            "second": {"name": "gaussian", "schedule": {"name": "cosine"}, "high": 0.5},
            "third": {"name": "blur"},
        },
        lambda: chain(jpeg(), gaussian(schedules.cosine(), high=0.5), blur()),
    ),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_is_what_its_constructor_makes(name):
    section, make = SECTIONS[name]
    same(augmentations.build(section), make())
    config = ml_collections.ConfigDict({"augmentation": section})
    read = configs.from_json(configs.to_json(config)).augmentation  # sorted, locked
    same(augmentations.build(read), make())


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({}, "low_res.augmentation: name is missing. Allowed: blur, chain, down_up"),
        ({"name": "gausian"}, "'gausian' is not known. Did you mean 'gaussian'"),
        ({"name": "blur", "sise": 3}, "blur: argument 'sise' is not known. Did you mean 'size'"),
        (
            {"name": "gaussian", "schedule": {"name": "cosin"}},
            "augmentation.schedule 'cosin' is not known. Did you mean 'cosine'",
        ),
        ({"name": "blur", "schedule": {"name": "cosine"}}, "blur: argument 'schedule'"),
        ({"name": "gaussian", "schedule": "cosine"}, "schedule: a section.*given 'cosine'"),
        ({"name": "chain"}, "no augmentation given"),
        ({"name": "chain", "frist": {"name": "blur"}}, "Did you mean 'first'"),
        ({"name": "chain", "first": {"name": "blur"}, "third": {"name": "jpeg"}}, "'second' is mi"),
        ({"name": "chain", "first": "blur"}, "augmentation.first: a section.*given 'blur'"),
        (
            {"name": "chain", "first": {"name": "gaussian"}, "second": {"name": "gaussian"}},
            "gaussian and gaussian both tell",
        ),
    ],
)
def test_errors_name_the_field_and_the_nearest_choice(section, words):
    with pytest.raises(UserError, match=words):
        augmentations.build(section)
