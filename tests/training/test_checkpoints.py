"""Checkpoints: what is saved comes back, and what cannot be read is named."""

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdiff import exits
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


def kinds(folder):
    """One file of every kind that a checkpoint consists of."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    by_kind = {(f.parent.relative_to(folder), f.name if f.parent.name != "d" else "data"): f
               for f in files}  # fmt: skip
    return [f.relative_to(folder) for f in by_kind.values()]


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    """The lowest bit of the middle byte: what CRC-32 is to find, and text may not show."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def restored(folder, like, write=True):
    """(what is restored, the warnings)."""
    said = []
    with checkpoints.opened(folder, write=write, tell=said.append) as saved:
        return saved.restore(like), said


def assert_state(found, value):
    bits = lambda a: jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a
    same = lambda a, b: np.array_equal(bits(a), bits(b))
    assert jax.tree.all(jax.tree.map(same, found, state(value)))


# Orbax writes these two when all else is done; they tell when that was, and nothing of the state.
TIMES = ("_CHECKPOINT_METADATA", "commit_success.txt", "checksums.json")


def test_damage_of_any_file_is_found_and_the_one_before_is_used(tmp_path):
    save(tmp_path / "whole", 1.0, 2.0)
    names = kinds(tmp_path / "whole" / "checkpoints" / "2")
    assert {"manifest.ocdbt", "_METADATA", "_sharding", "process_0", "metadata"} <= {
        n.name for n in names
    }
    assert sum(n.parent.name == "d" for n in names) == 2  # the values, and the index over processes
    like = state(0.0)
    for damage in (truncate, flip, pathlib.Path.unlink):
        for name in names:
            folder = tmp_path / "run"
            shutil.copytree(tmp_path / "whole", folder)
            damage(folder / "checkpoints" / "2" / name)
            (step, found, data), said = restored(folder, like)
            if str(name) in TIMES and not said:  # nothing was lost with it
                assert step == 2
                assert_state(found, 2.0)
            else:
                assert (step, data) == (1, {"position": 1}), (damage, name)
                assert_state(found, 1.0)
                (warning,) = said
                assert (
                    f"checkpoints/2 cannot be used and was moved to {folder}/damaged/2" in warning
                )
                assert "Step 1, the one before" in warning and str(name) in warning
            shutil.rmtree(folder)


def test_a_step_whose_checkpoint_was_damaged_can_be_saved_again(tmp_path):
    save(tmp_path, 1.0, 2.0)
    for again in ("2", "2.1"):
        flip(next((tmp_path / "checkpoints" / "2" / "state").rglob("d/*")))
        with checkpoints.opened(tmp_path, tell=lambda _: None) as saved:
            assert saved.restore(state(0.0)).step == 1
            assert (tmp_path / "damaged" / again).is_dir()
            saved.save(state(3.0), {"position": 3}, 2)
        (step, found, _), said = restored(tmp_path, state(0.0))
        assert step == 2 and not said
        assert_state(found, 3.0)


def test_who_only_reads_moves_nothing_and_a_damaged_step_asked_for_is_named(tmp_path):
    save(tmp_path, 1.0, 2.0)
    flip(next((tmp_path / "checkpoints" / "2" / "state").rglob("d/*")))
    before = sorted(tmp_path.rglob("*"))
    (step, _, _), said = restored(tmp_path, state(0.0), write=False)
    assert step == 1 and "checkpoints/2 cannot be used: " in said[0]
    with (
        checkpoints.opened(tmp_path, write=False) as saved,
        pytest.raises(checkpoints.Damaged, match=r"/2 cannot .*is damaged.*one before is step 1"),
    ):
        saved.restore(state(), step=2)
    assert sorted(tmp_path.rglob("*")) == before


def test_if_all_are_damaged_the_newest_is_named_and_nothing_is_moved(tmp_path):
    save(tmp_path, 1.0, 2.0)
    for name in "12":
        truncate(next((tmp_path / "checkpoints" / name / "state").rglob("d/*")))
    before = sorted(tmp_path.rglob("*"))
    with (
        checkpoints.opened(tmp_path) as saved,
        pytest.raises(checkpoints.Damaged, match="checkpoints/2 cannot be read: it is damaged"),
    ):
        saved.restore(state())
    assert sorted(tmp_path.rglob("*")) == before


def test_checkpoints_of_before_there_were_checksums_are_read_or_passed_over(tmp_path):
    save(tmp_path, 1.0, 2.0)
    for file in tmp_path.rglob("checksums.json"):
        file.unlink()
    (step, found, _), said = restored(tmp_path, state(0.0))
    assert step == 2 and not said
    assert_state(found, 2.0)
    for file in (tmp_path / "checkpoints" / "2" / "state").rglob("manifest.ocdbt"):
        truncate(file)
    (step, found, _), said = restored(tmp_path, state(0.0))
    assert step == 1 and "damaged or belongs to another model" in said[0]
    assert_state(found, 1.0)


def test_what_a_killed_save_left_behind_is_cleared(tmp_path):
    save(tmp_path, 1.0)
    left = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "1", left)
    with checkpoints.opened(tmp_path, write=False) as saved:
        assert saved.steps == [1]
    assert left.is_dir()
    with checkpoints.opened(tmp_path) as saved:
        assert saved.steps == [1]
        saved.save(state(2.0), {}, 2)
    assert not left.exists()


def test_another_models_checkpoint_is_refused_and_stays(tmp_path):
    save(tmp_path, 1.0, 2.0)
    before = sorted(tmp_path.rglob("*"))
    with (
        checkpoints.opened(tmp_path) as saved,
        pytest.raises(UserError, match="checkpoints/2 is whole but belongs to another model"),
    ):
        saved.restore(state(width=4))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_save_that_cannot_be_written_says_what_is_saved(tmp_path, monkeypatch):
    """The kernel itself refuses to write more: a limit on the size of files."""
    import resource

    save(tmp_path, 1.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    second = state(2.0)
    try:
        with (
            pytest.raises(checkpoints.NotSaved, match="File too large.*Step 1 is saved") as raised,
            checkpoints.opened(tmp_path) as saved,
        ):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
            saved.save(second, {}, 2)
            saved.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.code == exits.IO
    with checkpoints.opened(tmp_path) as saved:
        assert saved.steps == [1]
        saved.save(second, {}, 2)
    (step, found, _), _ = restored(tmp_path, state(0.0))
    assert step == 2
    assert_state(found, 2.0)
