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

from jdiff import models
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
    """

    apply: models.Apply
    params: PyTree
    fields: Mapping[str, Any]
    model: type
    config: Mapping[str, Any]
    family: Family

    def replace(self, params: PyTree) -> "Component":
        """The same network with other weights, e.g. trained ones."""
        return dataclasses.replace(self, params=params)


def load_component(
    folder: str | pathlib.Path, *, variant: str | None = None, dtype: Any = None,
    sharding: jax.sharding.Sharding | Placement | None = None, compute: str | None = None,
    **fields: Any,
) -> Component:  # fmt: skip
    """Opens a component's folder in the diffusers layout: config.json and safetensors weights.

    Args:
      folder: e.g. stable-diffusion/unet.
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
    config = json.loads(path.read_text())
    family = BY_CLASS[choose(f"{path}: _class_name", config.get("_class_name", ""), BY_CLASS)]
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
    given = tables.today(given, family)
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
    return Component(apply, params, built, model, dict(config), family)


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
    sources: dict[str, Entry] = {}
    arrays: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for entry in tables.plan(shapes, component.family, component.fields):
        kind = np.dtype(jnp.dtype(dtype)) if dtype else np.dtype(leaves[entry.path].dtype)
        for key, part in tables.split(entry, tables.hollow(entry.shape)).items():
            sources[key], arrays[key] = entry, (part.shape, kind)
    held: dict[tuple[str, ...], dict[str, np.ndarray]] = {}

    def read(key: str) -> np.ndarray:
        entry = sources[key]
        if entry.path not in held:
            held.clear()  # a leaf that several of theirs share stays until the next one
            held[entry.path] = tables.split(entry, np.asarray(leaves[entry.path]))
        return held[entry.path][key].astype(arrays[key][1], copy=False)

    config = dict(component.config) or component.family.config(component.fields)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"_class_name": component.family.cls} | config, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n")
    files.write(folder, arrays, read, variant=variant, shard_bytes=shard_bytes)


def component(family: str, params: PyTree, **fields: Any) -> Component:
    """A component of a network of one's own, to save it in a family's layout.

    Args:
      family: a name in `interop.families.BY_CLASS`, e.g. "UNet2DConditionModel".
      params: its weights.
      **fields: of the network.
    """
    found = BY_CLASS[choose("component: family", family, BY_CLASS)]
    config = {"_class_name": found.cls} | found.config(fields)
    model, built = found.build(config)
    apply, shapes = models.abstract(lambda rngs: model(**(built | fields), rngs=rngs))
    if jax.tree.structure(shapes) != jax.tree.structure(params):
        raise UserError(f"component: params are not those of {model.__name__} with these fields.")
    return Component(apply, params, built | fields, model, config, found)


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
