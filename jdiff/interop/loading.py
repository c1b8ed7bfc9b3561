"""One network out of a checkpoint's folder, and back: `load_component`, `save_component`.

The network is built from the folder's config.json without computing anything; then each leaf is
read from the file, transposed where the layouts differ, cast if asked, and put on its device before
the next ones are read. torch is not needed.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import jsonfile, models
from jdiff.errors import UserError, choose
from jdiff.interop import files, tables
from jdiff.interop.families import BY_CLASS
from jdiff.interop.tables import Entry, Family
from jdiff.models.functional import flatten, nest
from jdiff.pytree import Array, PyTree

#: (path, shape and dtype, logical axes) -> where that leaf lives.
Placement = Callable[[tuple[str, ...], jax.ShapeDtypeStruct, tuple], jax.sharding.Sharding]


@dataclasses.dataclass(frozen=True, eq=False)
class Component:
    """A network and its weights, as a checkpoint's folder holds them.

    A denoiser: `denoisers.network(net.apply, net.params, schedule, parameterization)`.

    Attributes:
      apply: `apply(params, x, t, cond, key=None)`, see `jdiff.models`.
      params: the weights.
      fields: the fields of `model`.
      model: the network's class.
      config: config.json.
      family: the class of checkpoints, and the table of its names.
      names: tensors that the file it was read from calls otherwise: {the table's name: the file's}.
    """

    apply: models.Apply
    params: PyTree
    fields: Mapping[str, Any]
    model: type
    config: Mapping[str, Any]
    family: Family
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def replace(self, params: PyTree) -> "Component":
        """The same network with other weights, e.g. trained ones."""
        return dataclasses.replace(self, params=params)


def load_component(
    folder: str | pathlib.Path, *, variant: str | None = None, dtype: Any = None,
    sharding: jax.sharding.Sharding | Placement | None = None, compute: str | None = None,
    **fields: Any,
) -> Component:  # fmt: skip
    """Opens a component's folder: config.json and safetensors weights.

    The layouts are those of diffusers and, for what reads text, of transformers.

    Args:
      folder: e.g. stable-diffusion/unet, stable-diffusion/text_encoder.
      variant: which weights if there are several, e.g. "fp16".
      dtype: of the weights in memory, as in the file unless given; e.g. "bfloat16".
      sharding: one for all leaves, or a function of a leaf's path, shape and logical axes.
      compute: the activations' dtype, e.g. "bfloat16"; float32 unless given.
      **fields: of the network beside those of config.json, e.g. scan=True or remat="full".

    Raises:
      UserError: no config, a class or an option that no network here has, weights that are missing,
        too many or misshapen (by name), or only pickles.

    >>> unet = interop.load_component("stable-diffusion/unet", compute="bfloat16")
    >>> unet.apply(unet.params, latents, t, {"text": states})
    """
    folder = pathlib.Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json; a component's folder holds one.")
    config = jsonfile.read(path)
    family = _family(config, path)
    given = files.component(folder, variant)
    return assemble(
        family, config, given, folder, dtype=dtype, sharding=sharding, compute=compute, **fields
    )


def load_file(
    path: str | pathlib.Path, family: str, config: Mapping[str, Any] | None = None, *,
    dtype: Any = None, sharding: jax.sharding.Sharding | Placement | None = None, **fields: Any,
) -> Component:  # fmt: skip
    """Opens one safetensors file in a layout that has no config.json, e.g. the original DiT's.

    Args:
      path: the file.
      family: the layout's name in `interop.families.BY_CLASS`.
      config: what the family builds the network from, e.g. {"name": "XL/2"}.

    The others are as for `load_component`, and so are the errors.
    """
    family = BY_CLASS[choose("load_file: family", family, BY_CLASS)]
    given = files.tensors(path)
    return assemble(family, config or {}, given, path, dtype=dtype, sharding=sharding, **fields)


def assemble(
    family: Family, config: Mapping[str, Any], given: Mapping[str, np.ndarray], where: Any, *,
    dtype: Any = None, sharding: Any = None, compute: str | None = None, **fields: Any,
) -> Component:  # fmt: skip
    """A component from a config and opened tensors."""
    model, built = family.build(config)
    built = built | fields | ({} if compute is None else {"dtype": compute})
    build = lambda rngs: model(**built, rngs=rngs)
    apply, shapes = models.abstract(build)
    entries = tables.plan(shapes, family, built)
    names = tables.today(given, family)
    given = {name: given[key] for name, key in names.items()}
    tables.check(entries, given, family.ignored, str(where))
    place = _placement(sharding)
    axes = {} if sharding is None else dict(flatten(models.axes(build)))
    dtype = np.dtype(jnp.dtype(dtype)) if dtype else None

    def leaves(group: list[Entry]) -> list[Array]:
        kinds = [dtype or given[entry.keys[0][0]].dtype for entry in group]
        hosts = tables.empty([(entry.shape, kind) for entry, kind in zip(group, kinds)])
        for entry, host in zip(group, hosts):
            tables.fill(entry, given, host)
        if sharding is None:
            return jax.device_put(hosts)
        return [
            _put(host, place(entry.path, jax.ShapeDtypeStruct(host.shape, kind), axes[entry.path]))
            for host, entry, kind in zip(hosts, group, kinds)
        ]

    # Threads overlap reading, transposing and the transfer; each holds one group of leaves.
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)) + 1)) as pool:
        loaded = [leaf for group in pool.map(leaves, _groups(entries)) for leaf in group]
    params = nest({entry.path: leaf for entry, leaf in zip(entries, loaded)})
    named = {name: key for name, key in names.items() if name != key}
    return Component(apply, params, built, model, dict(config), family, named)


def save_component(
    component: Component, folder: str | pathlib.Path, *, variant: str | None = None,
    dtype: Any = None, shard_bytes: int = 10 * 10**9,
) -> None:  # fmt: skip
    """Writes config.json and safetensors weights in the layout that they were read from.

    What was loaded and is saved unchanged is bit for bit the same.

    Args:
      variant: put in the file names, e.g. "fp16".
      dtype: of the weights in the file; as in memory unless given.
      shard_bytes: the most that one file holds, unless a tensor is larger.
    """
    folder = pathlib.Path(folder)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), component.params)
    leaves = dict(flatten(component.params))
    sources: dict[str, tuple[Entry, str]] = {}
    arrays: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for entry in tables.plan(shapes, component.family, component.fields):
        kind = np.dtype(jnp.dtype(dtype)) if dtype else np.dtype(leaves[entry.path].dtype)
        for name, part in tables.split(entry, tables.hollow(entry.shape)).items():
            key = component.names.get(name, name)
            sources[key], arrays[key] = (entry, name), (part.shape, kind)
    held: dict[tuple[str, ...], dict[str, np.ndarray]] = {}

    def read(key: str) -> np.ndarray:
        entry, name = sources[key]
        if entry.path not in held:
            held.clear()  # a leaf that several of theirs share stays until the next one
            held[entry.path] = tables.split(entry, np.asarray(leaves[entry.path]))
        return held[entry.path][name].astype(arrays[key][1], copy=False)

    family = component.family
    config = _named(dict(component.config) or family.config(component.fields), family)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    how = {"variant": variant, "shard_bytes": shard_bytes, "library": family.library}
    files.write(folder, arrays, read, **how)


def component(family: str, params: PyTree, **fields: Any) -> Component:
    """A component of a network of one's own, to save it in a family's layout.

    Args:
      family: a name in `interop.families.BY_CLASS`, e.g. "UNet2DConditionModel".
      params: its weights.
      **fields: of the network.
    """
    found = BY_CLASS[choose("component: family", family, BY_CLASS)]
    config = _named(found.config(fields), found)
    model, built = found.build(config)
    apply, shapes = models.abstract(lambda rngs: model(**(built | fields), rngs=rngs))
    if jax.tree.structure(shapes) != jax.tree.structure(params):
        raise UserError(f"component: params are not those of {model.__name__} with these fields.")
    return Component(apply, params, built | fields, model, config, found)


def _family(config: Mapping[str, Any], path: pathlib.Path) -> Family:
    """Of the class that a config names: as diffusers does, or the first known as transformers does.

    Raises:
      UserError: it names none, or none that is known.
    """
    if "_class_name" in config:
        key, named = "_class_name", [config["_class_name"]]
    else:
        key, named = "architectures", config.get("architectures") or []
    if not named:
        raise UserError(f"{path} names no class: neither _class_name nor architectures.")
    cls = next((name for name in named if name in BY_CLASS), named[0])
    return BY_CLASS[choose(f"{path}: {key}", cls, BY_CLASS)]


def _named(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The config with the name of its class."""
    if family.library == "transformers":
        return {**config, "architectures": [family.cls]}
    return {"_class_name": family.cls, **config}


def _groups(entries: list[Entry]) -> Iterator[list[Entry]]:
    """Neighbours of some millions of weights together: a call for each small one takes longer."""
    group, size = [], 0
    for entry in entries:
        group.append(entry)
        size += math.prod(entry.shape)
        if size > 2**22:
            yield group
            group, size = [], 0
    yield group


def _put(host: np.ndarray, where: jax.sharding.Sharding) -> Array:
    """The leaf on its devices; each device's slice is cut from one host copy."""
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def _placement(sharding: Any) -> Placement:
    return sharding if callable(sharding) else lambda path, shape, axes: sharding


def parameters(component: Component) -> int:
    """The number of weights."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(component.params))
