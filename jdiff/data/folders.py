"""Finding prepared TFDS sets on disk, and saying how to get those that are not there."""

from __future__ import annotations

import difflib
import os
import pathlib
import re
from typing import Any, NoReturn

from jdiff.errors import UserError, choose

_VERSION = r"\d+\.\d+\.\d+"


def data_root(data_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """The folder of TFDS sets: `data_dir`, else `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`."""
    path = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return pathlib.Path(path).expanduser().absolute()


def open_builder(name: str, data_dir: str | os.PathLike | None = None) -> Any:
    """The read-only TFDS builder of the prepared set `name[/config][:version]`; newest version.

    Raises:
      UserError: the name is unknown (the nearest is offered), the set is not prepared (the command
        that prepares it is given), its config is ambiguous, or its files need TensorFlow.
    """
    match = re.fullmatch(rf"(\w+)(?:/([\w.+-]+))?(?::({_VERSION}))?", name)
    if match is None:
        raise UserError(f"data set {name!r} is not like cifar10, imagenet_resized/64x64 or x:1.0.0")
    base, config, version = match.groups()
    root = data_root(data_dir)
    found = _prepared(root / base)
    if not found or (config and not any(p.parent.name == config for p in found)):
        _explain(name, base, root, found)
    configs = {"" if p.parent == root / base else p.parent.name for p in found}
    if config is None and "" not in configs and len(configs) > 1:
        names = ", ".join(f"{base}/{c}" for c in sorted(configs))
        raise UserError(f"data set {name!r} has several configs; name one: {names}")
    config = config or min(configs)
    versions = {p.name: p for p in found if p.parent == root / base / config}
    newest = max(versions, key=lambda v: [int(n) for n in v.split(".")])
    path = versions[choose(f"prepared version of {base}", version or newest, versions)]
    return _read(name, path)


def _prepared(folder: pathlib.Path) -> list[pathlib.Path]:
    """Version folders of one set, with and without a config level."""
    infos = [*folder.glob("*/dataset_info.json"), *folder.glob("*/*/dataset_info.json")]
    return [p.parent for p in infos if re.fullmatch(_VERSION, p.parent.name)]


def _read(name: str, path: pathlib.Path) -> Any:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(path)
    found = builder.info.file_format.value
    if found != "array_record":
        raise UserError(
            f"data set {name!r} in {path} has the format {found}, which only TensorFlow reads; "
            "where that is installed, run: tfds convert_format "
            f"--dataset_dir={path} --out_file_format=array_record --out_path=NEW_FOLDER"
        )
    return builder


def _explain(name: str, base: str, root: pathlib.Path, found: list[pathlib.Path]) -> NoReturn:
    import tensorflow_datasets as tfds

    from jdiff.data.prepare.registry import ITEMS

    ours = {item.name for item in ITEMS.values() if item.kind == "data"}
    theirs = set(tfds.list_builders(with_community_datasets=False))
    if base in ours and not found:
        elsewhere = "" if root == data_root() else f" --data_dir={root}"
        raise UserError(
            f"data set {name!r} is not prepared in {root}; run: jdiff prepare {base}{elsewhere}"
        )
    if base in theirs:
        raise UserError(
            f"data set {name!r} is not prepared in {root}; where TensorFlow is installed, run: "
            f"tfds build {name} --file_format=array_record --data_dir={root}"
        )
    if found:
        configs = sorted({p.parent.name for p in found})
        raise UserError(f"data set {name!r} has no such config; prepared: {', '.join(configs)}")
    here = {p.name for p in root.glob("[!.]*") if _prepared(p)}
    usual = sorted({"digits"} | ours | here)
    near = difflib.get_close_matches(base, usual, n=1) or difflib.get_close_matches(base, theirs, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(
        f"data set {name!r} is not known.{hint} Allowed: {', '.join(usual)}, and every image set "
        "of TensorFlow Datasets that is prepared."
    )
