"""A pipeline's folder on disk: `load` and `save`."""

import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from jdiff import jsonfile
from jdiff.errors import UserError, choose
from jdiff.interop import loading, prompts, schedulers
from jdiff.interop.families import BY_CLASS
from jdiff.interop.loading import Component
from jdiff.interop.pipeline import NETWORKS, Pipeline

#: Options of `load_component` that all of a pipeline's networks take; others are the main one's.
_COMMON = ("variant", "dtype", "sharding", "compute")


def load(
    folder: str | pathlib.Path, *, only: Sequence[str] | None = None, **options: Any
) -> Pipeline | Component:
    """Opens a local diffusers folder: a whole pipeline's, or one component's.

    Args:
      folder: with a model_index.json, or with a config.json.
      only: the networks to read, by name, e.g. ["unet"] where latents are enough; unless given, all
        that jdiff knows of those that are there.
      **options: of `load_component`: variant, dtype, sharding and compute for every network;
        others, as scan=True, for the one that is sampled from.

    Raises:
      UserError: neither file, no network that jdiff knows, and what `load_component` and
        `schedulers.from_config` refuse.

    >>> pipe = interop.load("stable-diffusion-v1-5", variant="fp16", compute="bfloat16")
    """
    folder = pathlib.Path(folder)
    path = folder / "model_index.json"
    if not path.is_file():
        if (folder / "config.json").is_file():
            return loading.load_component(folder, **options)
        raise UserError(
            f"{folder} has neither a model_index.json (a pipeline) nor a config.json (a component)."
        )
    index = jsonfile.read(path)
    named = {name: entry[1] for name, entry in index.items() if _is_component(entry)}
    main = next((name for name in NETWORKS if name in named), None)
    if main is None:
        raise UserError(f"{path} names neither a unet nor a transformer.")
    choose(f"{path}: network", named[main], BY_CLASS)
    if "scheduler" not in named:
        raise UserError(f"{path} names no scheduler; load the component's folder instead.")
    for name in () if only is None else only:
        choose("load: only", name, named)
    wanted = {main} | (named.keys() if only is None else set(only))
    found = {name: folder / name for name in named if (folder / name).is_dir() or name == main}
    known = [name for name in found if name in wanted and named[name] in BY_CLASS]
    common = {key: value for key, value in options.items() if key in _COMMON}
    components = {
        name: loading.load_component(found[name], **(options if name == main else common))
        for name in known
    }
    config = jsonfile.read(folder / "scheduler" / "scheduler_config.json")
    read = {"scheduler", *components}
    if index.get("_class_name") in prompts.BY_CLASS:  # then its tokenizers are read when asked
        read |= {name for name in found if name.startswith("tokenizer")}
    unread = {name: path for name, path in found.items() if name not in read}
    sampler = schedulers.from_config(config, named[main])
    return Pipeline(components, sampler, unread, index, folder)


def save(what: Pipeline | Component, folder: str | pathlib.Path, **options: Any) -> None:
    """Writes a pipeline or a component in the layout that it was read from.

    Tokenizers, and what was not read, are copied from where they lie.

    Args:
      **options: of `save_component`, for each network: variant, dtype, shard_bytes.

    Raises:
      UserError: a sampler that was changed since (`schedulers.to_config`).
    """
    folder = pathlib.Path(folder)
    if isinstance(what, Component):
        loading.save_component(what, folder, **options)
        return
    config = schedulers.to_config(what.sampler)
    for name, component in what.components.items():
        loading.save_component(component, folder / name, **options)
    _write(folder / "scheduler" / "scheduler_config.json", config)
    rest = {name for name, entry in what.index.items() if _is_component(entry)}
    for name in rest - {"scheduler", *what.components}:  # tokenizers, and what is not read
        source = what.folder / name
        if source.is_dir() and source.resolve() != (folder / name).resolve():
            shutil.copytree(source, folder / name, dirs_exist_ok=True)
    _write(folder / "model_index.json", what.index)


def _is_component(entry: Any) -> bool:
    """A pair (library, class); a component that a pipeline goes without is a pair of nulls."""
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)


def _write(path: pathlib.Path, config: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(config), indent=2) + "\n")
