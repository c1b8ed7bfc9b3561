"""ADM's and iDDPM's networks in their original layout, which has no config ("ADM").

    config = {"name": "adm_imagenet", "image_size": 256}
    interop.load_file("256x256_diffusion.safetensors", "ADM", config)

The published files are pickles, which are not read here; PyTorch turns one into safetensors with
safetensors.torch.save_file(torch.load(file), name).
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jdiff.errors import UserError, choose
from jdiff.interop.tables import Family, Kind, Move, Rule, conv, leaf, linear, norm
from jdiff.models import adm
from jdiff.models.unet import UNet
from jdiff.models.unet_blocks import Style, named_style

CLS = "ADM"

#: What {"name": ...} makes; the other entries are its arguments.
PRESETS: Mapping[str, Callable[..., dict]] = {
    "adm_imagenet": adm.adm_imagenet,
    "adm_upsampler": adm.adm_upsampler,
    "iddpm_cifar10": adm.iddpm_cifar10,
}


def build(config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """`UNet` and its fields, from a preset's name and arguments, or from fields."""
    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    if "name" in fields:
        fields = PRESETS[choose(f"{CLS}: name", fields.pop("name"), PRESETS)](**fields)
    known = set(inspect.signature(UNet.__init__).parameters) - {"self", "rngs"}
    for name in fields:
        choose(f"{CLS}: field", name, known)
    if isinstance(fields.get("style"), Mapping):
        style = fields["style"]
        fields["style"] = Style(**(style | {"taps": tuple(style["taps"])}))
    if "image_size" not in fields:
        raise UserError(
            f'{CLS}: the file has no config: give {{"name": "adm_imagenet", "image_size": 256}}, '
            "or fields of UNet."
        )
    if _style(fields).time != "cos_sin" or not _style(fields).scale_shift:
        raise UserError(f"{CLS} holds the styles adm and iddpm, not {fields.get('style')!r}.")
    return UNet, fields


def config_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as JSON can hold them."""
    config = dict(fields)
    if isinstance(config.get("style"), Style):
        config["style"] = dataclasses.asdict(config["style"])
    return config


def _style(fields: Mapping[str, Any]) -> Style:
    style = fields.get("style", "ddpmpp")
    return style if isinstance(style, Style) else named_style(style)


@functools.cache
def qkv(heads: int | None, head_channels: int) -> Kind:
    """Queries, keys and values of a head side by side, in `heads` heads or in heads this wide."""

    def ours(a: np.ndarray) -> np.ndarray:
        rows = (-1, 3, head_channels) if heads is None else (heads, 3, a.shape[0] // heads // 3)
        return a.reshape(*rows, *a.shape[1:]).swapaxes(0, 1).reshape(a.shape)

    def theirs(a: np.ndarray) -> np.ndarray:
        rows = (3, -1, head_channels) if heads is None else (3, heads, a.shape[0] // heads // 3)
        return a.reshape(*rows, *a.shape[1:]).swapaxes(0, 1).reshape(a.shape)

    return _pixelwise(ours, theirs)


def _pixelwise(ours: Callable = lambda a: a, theirs: Callable = lambda a: a) -> Kind:
    """A convolution [O, I, 1] over a row of pixels, with its outputs in another order."""
    kernel = Move(lambda a: ours(a)[:, :, 0].T[None, None], lambda a: theirs(a[0, 0].T[:, :, None]))
    return Kind({"kernel": ("weight", kernel), "bias": ("bias", Move(ours, theirs))})


def table(fields: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules for the levels of this network, which theirs number through."""
    parameters = inspect.signature(UNet.__init__).parameters
    f = {name: parameter.default for name, parameter in parameters.items()} | dict(fields)
    style, blocks, last = _style(f), f["blocks"], len(f["multipliers"]) - 1
    # Only ADM's network for 64 pixels splits into queries, keys and values before its heads.
    parted = f["image_size"] == 64 and style.heads is None
    attention = {
        "norm3": ("norm", norm),
        "qkv": ("qkv", _pixelwise() if parted else qkv(style.heads, style.head_channels)),
        "project": ("proj_out", _pixelwise()),
    }
    block = {
        "norm1": ("in_layers.0", norm),
        "conv1": ("in_layers.2", conv),
        "affine": ("emb_layers.1", linear),
        "norm2": ("out_layers.0", norm),
        "conv2": ("out_layers.3", conv),
        "skip": ("skip_connection", conv),
    }
    rules = [
        Rule("time1", "time_embed.0", linear),
        Rule("time2", "time_embed.2", linear),
        Rule("label/kernel", "label_emb.weight", leaf),
        Rule("stem", "input_blocks.0.0", conv),
        Rule("out_norm", "out.0", norm),
        Rule("out_conv", "out.2", conv),
    ]

    def add(ours: str, theirs: str, layers: Mapping[str, tuple[str, Kind]]) -> None:
        rules.extend(Rule(f"{ours}/{a}", f"{theirs}.{b}", kind) for a, (b, kind) in layers.items())

    def resample(ours: str, theirs: str, name: str) -> None:
        add(ours, theirs, block if style.resample == "block" else {"conv": (name, conv)})

    n = 1
    for level in range(last + 1):
        if level:
            resample(f"encoder/{level}/resample", f"input_blocks.{n}.0", "op")
            n += 1
        for j in range(blocks):
            add(f"encoder/{level}/blocks/{j}", f"input_blocks.{n}.0", block)
            add(f"encoder/{level}/blocks/{j}", f"input_blocks.{n}.1", attention)
            n += 1
    add("middle/0", "middle_block.0", block)
    add("middle/0", "middle_block.1", attention)
    add("middle/1", "middle_block.2", block)
    n = 0
    for below, level in enumerate(range(last, -1, -1)):
        attends = f["image_size"] >> level in f["attention_sizes"]
        for j in range(blocks + 1):
            add(f"decoder/{below}/blocks/{j}", f"output_blocks.{n}.0", block)
            add(f"decoder/{below}/blocks/{j}", f"output_blocks.{n}.1", attention)
            n += 1
        if level:
            theirs = f"output_blocks.{n - 1}.{1 + attends}"
            resample(f"decoder/{below + 1}/resample", theirs, "conv")
    return tuple(rules)


FAMILY = Family(CLS, build, config_from_fields, table)
