"""An autoencoder's folder as an `Autoencoder`, in the units that its config tells; and back."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jdiff.autoencoders import Autoencoder
from jdiff.autoencoders import autoencoder as made
from jdiff.errors import UserError
from jdiff.interop import loading
from jdiff.interop.loading import Component

#: scaling_factor of the classes' configs that do not say.
SCALING: Mapping[str, float] = {"AutoencoderKL": 0.18215}


def autoencoder(source: str | pathlib.Path | Component, **options: Any) -> Autoencoder:
    """Opens an autoencoder's folder: `autoencoder("stable-diffusion-xl/vae")`.

    Its latents are those that the pipeline's network knows: (z - shift) * scale, by the config's
    scaling_factor and shift_factor or its latents_mean and latents_std.

    Args:
      source: the folder, that of a pipeline with a vae, or a component that is open.
      **options: of `load_component`: variant, dtype, sharding, compute, ...

    Raises:
      UserError: a component that is no autoencoder, and what `load_component` refuses.

    >>> coder = interop.autoencoder("FLUX.1-dev/vae", compute="bfloat16")
    >>> images = coder.decode(latents)
    """
    component = source
    if not isinstance(source, Component):
        folder = pathlib.Path(source)
        if (folder / "model_index.json").is_file() and (folder / "vae").is_dir():
            folder = folder / "vae"
        component = loading.load_component(folder, **options)
    elif options:
        raise UserError(f"autoencoder: {', '.join(options)} must be given when it is opened.")
    if not (hasattr(component.model, "encode") and hasattr(component.model, "decode")):
        raise UserError(f"autoencoder: {component.family.cls} is no autoencoder.")
    shift, scale = units(component.config, component.family.cls)
    return made(component.apply, component.params, shift=shift, scale=scale)


def autoencoder_component(family: str, coder: Autoencoder, **fields: Any) -> Component:
    """The component of an autoencoder of one's own, to save it: its config tells the units too.

    Args:
      family: its class in checkpoints, e.g. "AutoencoderKL".
      coder: the autoencoder.
      **fields: of its network.

    Raises:
      UserError: weights that are not those of the family with these fields.

    >>> interop.save(interop.autoencoder_component("AutoencoderKL", coder, **kl_sd()), "mine/vae")
    """
    component = loading.component(family, coder.params, **fields)
    shift, scale = np.asarray(coder.shift), np.asarray(coder.scale)
    if shift.ndim or scale.ndim:  # latents_mean and latents_std have an entry a channel
        mean, std = (np.broadcast_to(a, (coder.channels,)).tolist() for a in (shift, 1 / scale))
        told = {"latents_mean": mean, "latents_std": std, "scaling_factor": 1.0}
    else:
        told = {"scaling_factor": float(scale), "shift_factor": float(shift)}
    return dataclasses.replace(component, config=dict(component.config) | told)


def units(config: Mapping[str, Any], cls: str = "") -> tuple[Any, Any]:
    """(shift, scale) of the latents by an autoencoder's config: numbers, or one a channel."""
    scaling = config.get("scaling_factor", SCALING.get(cls, 1.0))
    mean, std = config.get("latents_mean"), config.get("latents_std")
    shift = (config.get("shift_factor") or 0.0) if mean is None else jnp.asarray(mean, float)
    return shift, scaling if std is None else scaling / jnp.asarray(std, float)
