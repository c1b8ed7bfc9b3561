"""Safetensors files: what is read is what safetensors writes, and what is wrong is named."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jdiff.errors import UserError
from jdiff.interop import files

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.asarray(jnp.arange(5, dtype=jnp.bfloat16)),
    "scalar": np.array(2.5, np.float16),
    "empty": np.zeros((0, 3), np.int64),
    "flag": np.array([True, False]),
}


def save(path, arrays=ARRAYS):
    safetensors.numpy.save_file(dict(arrays), path)
    return path


def same(a, b):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def test_tensors_are_those_that_safetensors_wrote(tmp_path):
    found = files.tensors(save(tmp_path / "x.safetensors"))
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        same(found[name], array)
        assert not found[name].flags.writeable


def write(folder, arrays=ARRAYS, **how):
    shapes = {name: (a.shape, a.dtype) for name, a in arrays.items()}
    files.write(folder, shapes, arrays.__getitem__, **how)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard_bytes", [10**9, 50, 1])
def test_what_is_written_is_read_by_us_and_by_safetensors(tmp_path, variant, shard_bytes):
    write(tmp_path, variant=variant, shard_bytes=shard_bytes)
    found = files.component(tmp_path, variant)
    theirs = {}
    for path in tmp_path.glob("*.safetensors"):
        theirs |= safetensors.numpy.load_file(path)
    for name, array in ARRAYS.items():
        same(found[name], array)
        same(theirs[name], array)


def test_a_transposed_view_is_written_in_its_own_order(tmp_path):
    write(tmp_path, {"t": ARRAYS["a"].T})
    same(files.component(tmp_path)["t"], np.ascontiguousarray(ARRAYS["a"].T))


def test_a_later_save_replaces_the_shards_of_an_earlier_one(tmp_path):
    write(tmp_path, shard_bytes=1)
    write(tmp_path, {"a": ARRAYS["b"]})
    assert list(files.component(tmp_path)) == ["a"]


def test_the_only_variant_is_taken_and_among_several_one_must_be_named(tmp_path):
    save(tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert files.component(tmp_path).keys() == ARRAYS.keys()
    save(tmp_path / "diffusion_pytorch_model.ema.safetensors")
    with pytest.raises(UserError, match=r"variant=None; there are \['ema', 'fp16'\]"):
        files.component(tmp_path)
    assert files.component(tmp_path, "ema").keys() == ARRAYS.keys()


def test_pickles_are_named_and_not_read(tmp_path):
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match=r"diffusion_pytorch_model.bin.*not read"):
        files.component(tmp_path)
    with pytest.raises(UserError, match="pickle"):
        files.tensors(tmp_path / "diffusion_pytorch_model.bin")


def test_a_file_that_is_cut_off_or_is_none_is_refused(tmp_path):
    path = save(tmp_path / "x.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(UserError, match=r"tensor .* cut off or damaged"):
        files.tensors(path)
    path.write_bytes(whole[:20])
    with pytest.raises(UserError, match="cut off"):
        files.tensors(path)
    path.write_bytes(b"\x04" + b"\0" * 7 + b"nope" + b"\0" * 20)
    with pytest.raises(UserError, match="no JSON"):
        files.tensors(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3438167540\n")
    with pytest.raises(UserError, match="git lfs pull"):
        files.tensors(path)
    with pytest.raises(UserError, match="is not a file"):
        files.tensors(tmp_path / "absent.safetensors")


def test_a_missing_shard_and_a_misplaced_tensor_are_named(tmp_path):
    write(tmp_path, shard_bytes=1)
    index = next(tmp_path.glob("*.index.json"))
    shards = json.loads(index.read_text())
    file = shards["weight_map"]["b"]
    shards["weight_map"]["a"] = file
    index.write_text(json.dumps(shards))
    with pytest.raises(UserError, match="where they are not: a"):
        files.component(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(UserError, match=file):
        files.component(tmp_path)
