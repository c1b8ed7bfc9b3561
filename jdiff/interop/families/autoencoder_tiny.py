"""AutoencoderTiny: TAESD and its kin."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jdiff.autoencoders.tiny import Tiny
from jdiff.errors import UserError
from jdiff.interop.families.cond_unet import defaults
from jdiff.interop.tables import Family, Rule, conv

CLS = "AutoencoderTiny"

#: What a config that does not say otherwise means.
DEFAULTS: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "encoder_block_out_channels": (64,) * 4,
    "decoder_block_out_channels": (64,) * 4,
    "latent_channels": 4,
    "num_encoder_blocks": (1, 3, 3, 3),
    "num_decoder_blocks": (3, 3, 3, 1),
}

#: What `Tiny` computes, of options that it does not have.
SERVED: Mapping[str, Any] = {
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
}


def fields_from_config(config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """`Tiny` and its fields."""
    for key, served in SERVED.items():
        if config.get(key, served) != served:
            raise UserError(f"{CLS}: {key}={config[key]!r} is not served, only {served!r}.")
    c = DEFAULTS | config
    widths = {*c["encoder_block_out_channels"], *c["decoder_block_out_channels"]}
    if len(widths) != 1:
        raise UserError(f"{CLS}: widths of {sorted(widths)} are not served, only one for all.")
    if len(c["num_encoder_blocks"]) != len(c["num_decoder_blocks"]):
        raise UserError(
            f"{CLS}: num_encoder_blocks={list(c['num_encoder_blocks'])} and num_decoder_blocks="
            f"{list(c['num_decoder_blocks'])} are not served, only lists of one length."
        )
    fields = {
        "channels": c["latent_channels"],
        "width": widths.pop(),
        "encoder_blocks": tuple(c["num_encoder_blocks"]),
        "decoder_blocks": tuple(c["num_decoder_blocks"]),
        "in_channels": c["in_channels"],
        "out_channels": c["out_channels"],
    }
    return Tiny, fields


def config_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a `Tiny` with these fields."""
    f = defaults(Tiny) | dict(fields)
    levels = len(f["encoder_blocks"])
    return dict(SERVED) | {
        "in_channels": f["in_channels"],
        "out_channels": f["out_channels"],
        "encoder_block_out_channels": [f["width"]] * levels,
        "decoder_block_out_channels": [f["width"]] * levels,
        "latent_channels": f["channels"],
        "num_encoder_blocks": list(f["encoder_blocks"]),
        "num_decoder_blocks": list(f["decoder_blocks"]),
    }


def _block(ours: str, theirs: str) -> Iterator[Rule]:
    return (Rule(f"{ours}/conv{n}", f"{theirs}.conv.{2 * n - 2}", conv) for n in (1, 2, 3))


def table(fields: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules: their layers are numbered through, whatever they are."""
    f = defaults(Tiny) | dict(fields)
    rules, number = [], 0
    for n, blocks in enumerate(f["encoder_blocks"]):
        rules.append(Rule(f"encoder/{n}/conv", f"encoder.layers.{number}", conv))
        rules += _blocks(f"encoder/{n}", "encoder", number + 1, blocks)
        number += 1 + blocks
    rules.append(Rule("to_latents", f"encoder.layers.{number}", conv))
    rules.append(Rule("from_latents", "decoder.layers.0", conv))
    number = 2  # after the relu
    for n, blocks in enumerate(f["decoder_blocks"]):
        rules += _blocks(f"decoder/{n}", "decoder", number, blocks)
        number += blocks + (n < len(f["decoder_blocks"]) - 1)  # what repeats pixels
        rules.append(Rule(f"decoder/{n}/conv", f"decoder.layers.{number}", conv))
        number += 1
    return tuple(rules)


def _blocks(ours: str, theirs: str, first: int, count: int) -> Sequence[Rule]:
    names = ((f"{ours}/blocks/{n}", f"{theirs}.layers.{first + n}") for n in range(count))
    return [rule for pair in names for rule in _block(*pair)]


FAMILY = Family(cls=CLS, build=fields_from_config, config=config_from_fields, table=table)
