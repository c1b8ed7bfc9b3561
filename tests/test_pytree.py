"""Structs as pytrees, prefixes, and noise that belongs to its sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import UserError, denoisers, guidance, predictions, schedules, solvers, weightings
from jdiff.pytree import (
    batch_size,
    broadcast_time,
    expand,
    is_concrete,
    noise_like,
    prefix_map,
    static,
    struct,
)

KEYS = jax.random.split(jax.random.key(0), 3)


@struct
class Part:
    number: float
    kind: str = static("a")


def test_structs_of_the_same_fields_are_different_structures():
    """Or jit would run Heun's program for Euler's method, now and then: as hashes fall."""

    @struct
    class Other:
        number: float
        kind: str = static("a")

    assert jax.tree.structure(Part(1.0)) != jax.tree.structure(Other(1.0))
    assert jax.tree.structure(Part(1.0)) == jax.tree.structure(Part(2.0))
    made = [make() for make in solvers.BY_NAME.values()]
    made += [schedules.edm(), schedules.rectified_flow(), weightings.x0(), weightings.min_snr()]
    structures = {type(x): jax.tree.structure(x) for x in made}.values()
    for i, a in enumerate(structures):
        assert not any(a == b for j, b in enumerate(structures) if i != j)


def test_jit_traces_once_for_each_class():
    """Sixty classes of no fields: with an equality that forgets the type, some share a trace."""
    classes = [struct(type(f"Class{i}", (), {})) for i in range(60)]
    which = jax.jit(lambda x: classes.index(type(x)))
    assert [int(which(cls())) for cls in classes] == list(range(60))


def test_a_structs_numbers_are_leaves_and_its_static_fields_are_structure():
    compiled = jax.jit(lambda p: p.number * (2 if p.kind == "a" else 3))
    assert float(compiled(Part(1.0))) == 2.0
    assert float(compiled(Part(5.0))) == 10.0
    assert compiled._cache_size() == 1
    assert float(compiled(Part(5.0, "b"))) == 15.0
    assert compiled._cache_size() == 2


def test_a_struct_is_frozen():
    with pytest.raises(AttributeError):
        Part(1.0).number = 2.0


@pytest.mark.parametrize(
    ("made", "numbers"),
    [
        (schedules.edm(), 2), (schedules.vp_linear(), 4), (schedules.cosine(), 3),
        (schedules.ddpm_linear(), 1), (solvers.ddim(0.5), 1), (solvers.ddpm(), 1),
        (solvers.edm(40.0), 4), (solvers.dpmpp_2m(), 0), (weightings.min_snr(), 1),
        (predictions.parameterization("edm"), 1),
        (guidance.cfg(lambda *_: 0, 2.0, {"label": 10}), 2),
        (denoisers.network(lambda *_: 0, {"w": 1.0, "b": 2.0}, None, None), 2),
    ],
    ids=lambda v: type(v).__name__,
)  # fmt: skip
def test_what_the_ground_floor_makes_is_a_pytree_of_its_numbers(made, numbers):
    leaves, treedef = jax.tree.flatten(made)
    assert len(leaves) == numbers
    again = treedef.unflatten([2 * leaf for leaf in leaves])
    assert type(again) is type(made)
    assert jax.tree.structure(again) == treedef


def test_noise_belongs_to_its_key_whatever_the_batch():
    x = jnp.zeros((3, 4, 2))
    together = noise_like(KEYS, x)
    np.testing.assert_array_equal(noise_like(KEYS[1:2], x[:1])[0], together[1])
    assert len(np.unique(together)) == together.size


def test_the_leaves_of_a_tree_have_independent_noise_of_their_dtype():
    x = {"a": jnp.zeros((3, 500)), "b": jnp.zeros((3, 500), jnp.bfloat16)}
    z = noise_like(KEYS, x)
    assert z["b"].dtype == jnp.bfloat16
    a, b = (np.asarray(z[k], np.float32).ravel() for k in "ab")
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(a.size)
    assert a.std() == pytest.approx(1.0, abs=4 / np.sqrt(2 * a.size))


def test_a_prefix_serves_the_leaves_below_it():
    x = {"a": jnp.ones(2), "b": (jnp.ones(2), {"c": jnp.ones(2)})}
    is_leaf = lambda p: isinstance(p, str)
    owner = prefix_map(lambda p, a, b: (p, a is b), {"a": "A", "b": "B"}, is_leaf, x, x)
    assert owner == {"a": ("A", True), "b": (("B", True), {"c": ("B", True)})}
    assert prefix_map(lambda p, a: p, "all", is_leaf, x)["b"][1]["c"] == "all"


@pytest.mark.parametrize(
    ("prefix", "rest", "said"),
    [
        ({"z": "A"}, {"a": 1}, r"schedule has \(\['z'\]\), .* have \(\['a'\]\), \(\['a'\]\)"),
        ("A", {"a": 1, "b": 2}, r"has \(one leaf\), .* have \(\['a'\]\), \(\['a'\], \['b'\]\)"),
        ({"a": "A", "b": "B"}, {"a": 1}, r"schedule has \(\['a'\], \['b'\]\)"),
    ],
)
def test_trees_that_do_not_match_are_refused_by_their_leaves(prefix, rest, said):
    with pytest.raises(UserError, match=f"the trees do not match: .*{said}"):
        prefix_map(lambda *a: a, prefix, lambda p: isinstance(p, str), {"a": 1}, rest)


def test_times_and_batches_broadcast_from_the_front():
    x = {"a": jnp.ones((3, 4, 2))}
    assert batch_size(x) == 3
    assert broadcast_time(0.5, x).tolist() == [0.5] * 3
    assert broadcast_time(jnp.arange(3), x).tolist() == [0, 1, 2]
    np.testing.assert_array_equal(
        expand(jnp.arange(3), x["a"]) * x["a"], [[[i] * 2] * 4 for i in range(3)]
    )
    assert expand(2.0, x["a"]).shape == ()


def test_values_are_known_outside_a_transformation_and_not_inside():
    known = []
    jax.vmap(lambda a: known.append(is_concrete({"x": a})) or a)(jnp.ones(2))
    assert known == [False]
    assert is_concrete({"x": jnp.ones(2), "y": 3.0})
