"""Layouts: names of axes to axes of a mesh, by rules; batches to devices and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff.errors import UserError
from jdiff.parallel import Layout, constrain, make
from jdiff.parallel.layout import CONVOLUTIONAL, TRANSFORMER, layout, spec_of, splits, within

P = jax.P


def of(sizes, rules=TRANSFORMER, changes=None):
    return layout(make(sizes), rules, changes)


@pytest.mark.parametrize(
    ("sizes", "names", "shape", "spec"),
    [
        ({"fsdp": 4}, ("embed", "mlp"), (8, 32), P("fsdp")),
        ({"fsdp": 2, "tensor": 2}, ("embed", "mlp"), (8, 32), P("fsdp", "tensor")),
        ({"fsdp": 2, "tensor": 2}, ("heads", "embed"), (8, 32), P("tensor", "fsdp")),
        ({"fsdp": 4}, ("embed", "embed"), (8, 32), P("fsdp")),  # a mesh axis serves once
        ({"fsdp": 4}, ("embed", "mlp"), (6, 32), P()),  # 4 does not divide 6
        ({"data": 2, "fsdp": 2}, ("batch", None), (8, 3), P(("data", "fsdp"))),
        ({"data": 4}, ("batch", "tokens", "embed"), (8, 6, 4), P("data")),
        ({"data": 2, "sequence": 2}, ("batch", "tokens", None), (8, 6, 4), P("data", "sequence")),
        ({"data": 4}, ("unheard", None), (8, 8), P()),
    ],
)
def test_rules(sizes, names, shape, spec):
    assert of(sizes).spec(names, shape) == spec


def test_changes_of_the_rules():
    changed = of({"fsdp": 4}, changes={"embed": None, "mlp": "fsdp", "batch": ["data"]})
    assert changed.spec(("embed", "mlp"), (8, 32)) == P(None, "fsdp")
    assert changed.batch_parts == 1
    assert of({"fsdp": 4}).batch_parts == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"mlp": "tensr"}, "tensor"), ({"mlp": ["fsdp", "x"]}, "mesh.rules.mlp"),
     ({"batch": None}, "mesh.rules.batch")],
)  # fmt: skip
def test_changes_that_mean_nothing(changes, said):
    with pytest.raises(UserError, match=said):
        of({"fsdp": 4}, changes=changes)


def test_layouts_are_equal_where_they_say_the_same():
    """So that jit takes two networks on them for one."""
    assert of({"fsdp": 2}) == of({"data": 2, "fsdp": 2})
    assert hash(of({"fsdp": 2})) == hash(of({"fsdp": 2}))
    assert of({"fsdp": 2}) != of({"fsdp": 4})


def test_a_batch_goes_out_in_order():
    laid = of({"data": 2, "fsdp": 2})
    batch = {"x": np.arange(24).reshape(8, 3), "label": np.arange(8)}
    put = laid.put(batch, 8)
    assert laid.rows(8).tolist() == list(range(8))
    for name, a in batch.items():
        np.testing.assert_array_equal(put[name], a)
        assert put[name].sharding.is_equivalent_to(laid.batch, a.ndim)
        assert {s.data.shape[0] for s in put[name].addressable_shards} == {2}


def test_constrain_knows_the_layout_of_the_network_alone():
    laid = of({"data": 4})
    h = jnp.zeros((8, 3))
    assert constrain(h, "batch", None) is h
    with within(laid):
        placed = constrain(h, "batch", None)
    assert placed.sharding.is_equivalent_to(laid.batch, 2)
    assert constrain(h, "batch", None) is h


def test_specs_end_where_the_last_axis_does():
    assert spec_of([None, "data", None]) == P(None, "data")
    assert spec_of([None, None]) == P()
    assert splits(P(None, ("data", "fsdp")), "fsdp") and not splits(P("data"), "fsdp")


def test_convolutions_are_split_by_what_they_put_out():
    laid = of({"fsdp": 4}, CONVOLUTIONAL)
    names = (None, None, "channels_in", "channels_out")
    assert laid.spec(names, (3, 3, 8, 16)) == P(None, None, None, "fsdp")
    assert isinstance(laid, Layout)
