"""Checkpoints: what is saved comes back, and what cannot be read is named."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdiff.errors import UserError
from jdiff.training import checkpoints, ema, step

AVERAGES = {"slow": ema.constant(decay=0.9)}


def state(value=1.0, width=3):
    params = {"layer": {"w": jnp.full((width, 2), value), "b": jnp.arange(2.0)}}
    fresh = step.start(params, jax.random.key(7), optax.adam(0.1), AVERAGES)
    return jax.tree.map(lambda a: a + 1 if a.dtype == jnp.float32 else a, fresh)


def save(folder, *values, keep=2):
    with checkpoints.opened(folder, keep) as saved:
        for i, value in enumerate(values, 1):
            saved.save(state(value), {"position": i}, i)


def test_a_state_comes_back_bit_for_bit(tmp_path):
    save(tmp_path, 1.5)
    with checkpoints.opened(tmp_path) as saved:
        restored = saved.restore(state(0.0))
    assert (restored.step, restored.data) == (1, {"position": 1})
    same = jax.tree.map(
        lambda a, b: np.array_equal(jax.random.key_data(a), jax.random.key_data(b))
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else np.array_equal(a, b),
        restored.state, state(1.5),
    )  # fmt: skip
    assert all(jax.tree.leaves(same))
    assert jax.tree.structure(restored.state) == jax.tree.structure(state())


def test_a_checkpoint_from_before_a_field_existed_is_read(tmp_path):
    """Version 0.1 had no `frozen`, and wrote down the fields that it had."""
    import orbax.checkpoint as ocp

    full = state(1.5)
    old = {name: value for name, value in vars(full).items() if name != "frozen"}
    with checkpoints.opened(tmp_path) as saved:
        state_, data = ocp.args.StandardSave(old), ocp.args.JsonSave({"position": 1})
        saved._manager.save(1, args=ocp.args.Composite(state=state_, data=data))
    with checkpoints.opened(tmp_path) as saved:
        restored = saved.restore(state(0.0)).state
    assert restored.frozen is None
    np.testing.assert_array_equal(restored.params["layer"]["w"], full.params["layer"]["w"])


def test_frozen_weights_are_saved_with_the_rest(tmp_path):
    frozen = {"w": jnp.arange(3.0)}
    with checkpoints.opened(tmp_path) as saved:
        saved.save(dataclasses.replace(state(), frozen=frozen), {}, 1)
    like = dataclasses.replace(state(0.0), frozen={"w": jnp.zeros(3)})
    with checkpoints.opened(tmp_path) as saved:
        np.testing.assert_array_equal(saved.restore(like).state.frozen["w"], frozen["w"])


def test_the_newest_are_kept_and_any_of_them_can_be_asked_for(tmp_path):
    save(tmp_path, 1.0, 2.0, 3.0)
    with checkpoints.opened(tmp_path) as saved:
        assert saved.steps == [2, 3]
        assert float(saved.restore(state(), step=2).state.params["layer"]["w"][0, 0]) == 3.0
        with pytest.raises(UserError, match="no checkpoint of step 1 .*nearest is 2"):
            saved.restore(state(), step=1)


@pytest.mark.parametrize("name", ["params", "slow"])
def test_the_weights_alone_can_be_read(tmp_path, name):
    save(tmp_path, 1.0)
    like = jax.eval_shape(lambda: state().params)
    with checkpoints.opened(tmp_path, write=False) as saved:
        found = saved.restore_average(like, name).state
    expected = state(1.0).params if name == "params" else state(1.0).averages["slow"]
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


def test_without_a_checkpoint_the_folder_is_named(tmp_path):
    with (
        checkpoints.opened(tmp_path) as saved,
        pytest.raises(UserError, match="no complete checkpoint in .*checkpoints"),
    ):
        saved.restore(state())


def test_a_truncated_checkpoint_is_named_and_left_alone(tmp_path):
    save(tmp_path, 1.0, 2.0)
    folder = tmp_path / "checkpoints" / "2" / "state"
    files = [f for f in folder.rglob("*") if f.is_file() and f.stat().st_size > 300]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    before = sorted(tmp_path.rglob("*"))
    with (
        checkpoints.opened(tmp_path, write=False) as saved,
        pytest.raises(UserError, match=r"checkpoints/2 cannot be read.*the one before is step 1"),
    ):
        saved.restore(state())
    assert sorted(tmp_path.rglob("*")) == before


def test_another_models_checkpoint_is_refused(tmp_path):
    save(tmp_path, 1.0)
    with (
        checkpoints.opened(tmp_path) as saved,
        pytest.raises(UserError, match="damaged or belongs to another model"),
    ):
        saved.restore(state(width=4))
