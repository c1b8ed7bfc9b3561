"""Latents in the place of images: drawn in the loss, and decoded where somebody looks at them."""

import hashlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import jsonfile
from jdiff.data import encoded
from jdiff.errors import UserError
from jdiff.pytree import Array


def draw(key: Array, batch: dict[str, Array]) -> Array:
    """Clean latents `[B, h, w, C]` float32 of a batch of a latent set, drawn anew by each key.

    mean + std * eps, which is what the autoencoder's encoder gives of the images; the mean itself
    of one that gives no deviation (Rombach et al. 2022, 2112.10752, section G).
    """
    mean = batch[encoded.MEAN].astype("float32")
    if encoded.STD not in batch:
        return mean
    return mean + batch[encoded.STD].astype("float32") * jax.random.normal(key, mean.shape)


def check(config: Any, info: Any) -> None:
    """That nothing is done with latents that is for pixels.

    Raises:
      UserError: it is; or an autoencoder is named for images.
    """
    if not info.latent:
        if config.data.autoencoder is not None:
            raise UserError(f"config.data.autoencoder: {info.name} holds images; give None.")
        return
    factor, threshold = config.low_res.factor, config.sampling.threshold
    for name, value in {"low_res.factor": factor, "sampling.threshold": threshold}.items():
        if value is not None:
            raise UserError(f"config.{name}={value!r}: {info.name} holds latents; give None.")


def refuse(info: Any) -> None:
    """That a set holds images, for what is trained on pixels alone.

    Raises:
      UserError: it holds latents.
    """
    if info.latent:
        raise UserError(
            f"config.data.name={info.name!r} holds latents; name the set of their images, "
            f"{info.encoded.source!r}."
        )


def open_autoencoder(where: str | pathlib.Path) -> Any:
    """The `autoencoders.Autoencoder` of a run directory, or of a folder of the diffusers layout.

    Args:
      where: what `jdiff train` wrote, a component's folder, or a pipeline's with its `vae`.

    Raises:
      UserError: none of these is there, or it holds something else.
    """
    import jdiff

    folder = pathlib.Path(where).expanduser()
    if (folder / "model_index.json").is_file():
        folder = folder / "vae"
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{where} is no autoencoder: neither the run directory of one nor a folder with a "
            "config.json."
        )
    config = jsonfile.read(path)
    if "_class_name" not in config:
        return jdiff.load_autoencoder(folder)
    from jdiff import interop

    return interop.autoencoder(folder)


def digest(autoencoder: Any) -> str:
    """SHA-256 of the weights, the shift and the scale: what the latents' numbers depend on."""
    from jdiff.models.functional import flatten

    units = {"shift": autoencoder.shift, "scale": autoencoder.scale}
    leaves = sorted(flatten({"params": autoencoder.params, "units": units}))
    found = hashlib.sha256()
    for path, leaf in leaves:
        array = np.asarray(leaf, np.float32 if path[0] == "units" else None)
        found.update(f"{'/'.join(path)} {array.dtype} {array.shape}\n".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def decoder(info: Any, where: str | None = None, sharding: Any = None) -> Any:
    """The autoencoder that decodes the latents of a set; None for a set of images.

    Args:
      info: `data.Info` of the set.
      where: where it lies now, if it was moved since the set was encoded.
      sharding: of its weights, a copy on every device.

    Raises:
      UserError: it is not there, or it is another one than that which encoded the set.
    """
    if not info.latent:
        return None
    origin = info.encoded
    try:
        found = open_autoencoder(where or origin.autoencoder)
    except UserError as error:
        raise UserError(
            f"{info.name} holds latents, and their autoencoder cannot be opened: {error} "
            "config.data.autoencoder (of `jdiff sample` and `evaluate`: --autoencoder) says where "
            "it lies."
        ) from error
    if digest(found) != origin.digest:
        raise UserError(
            f"{where or origin.autoencoder} is not the autoencoder that encoded {info.name}: its "
            "weights or scale have changed. Encode the set anew, or name the one that it was."
        )
    if sharding is None:
        return found
    return jax.tree.map(lambda leaf: _whole(leaf, sharding), found)


def decoded(autoencoder: Any, latents: Array, rows: int) -> Array:
    """Images of at most `rows` latents, filled up to that many: one program for all batches.

    Without an autoencoder, what was given: images.
    """
    if autoencoder is None:
        return latents
    missing = rows - len(latents)
    if missing <= 0:
        return autoencoder.decode(latents)
    filled = jnp.concatenate([latents, jnp.repeat(latents[-1:], missing, axis=0)])
    return autoencoder.decode(filled)[: len(latents)]


def _whole(leaf: Any, sharding: jax.sharding.Sharding) -> Array:
    """Of this process's copy, a copy on every device of all processes."""
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
