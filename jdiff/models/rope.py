"""Rotary position embeddings on grids of several axes (Su et al., 2021; FLUX, Qwen-Image, Z-Image).

Each axis owns some of a head's channels. Neighbouring channels (2i, 2i + 1) are one plane, turned
by the angle position / theta^(2i / dim), so that the score of a query and a key depends on the
difference of their positions alone. Language models pair channels i and i + D / 2 instead.

    positions = grid([0], range(rows), range(columns))     # FLUX: no frame, row, column
    turn = angles(positions, (16, 56, 56))
    scores = rotate(q, turn) . rotate(k, turn)
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def grid(*coordinates: Sequence[float]) -> np.ndarray:
    """All combinations of the axes' coordinates, the last axis fastest: `[N, axes]` float32."""
    mesh = np.meshgrid(*(np.asarray(c, np.float32) for c in coordinates), indexing="ij")
    return np.stack(mesh, axis=-1).reshape(-1, len(coordinates))


def angles(positions: jax.Array, dims: Sequence[int], theta: float = 10_000.0) -> jax.Array:
    """What each plane of a head is turned by, in radians, always float32.

    Args:
        positions: of the tokens, `[..., N, axes]`.
        dims: channels of a head that belong to each axis, even; their sum is the head's size D.
        theta: base of the wavelengths, which go from 2 pi to nearly 2 pi theta.

    Returns:
        `[..., N, D / 2]`, axis after axis.

    Raises:
        ValueError: if `dims` does not fit the axes or has an odd number.
    """
    check_dims(dims)
    if positions.shape[-1] != len(dims):
        raise ValueError(
            f"positions of shape {list(positions.shape)} have {positions.shape[-1]} axes, "
            f"dims={tuple(dims)} has {len(dims)}"
        )
    positions = jnp.asarray(positions, jnp.float32)
    # The frequencies in float64: an error of theirs is multiplied by the position.
    frequencies = [np.float32(theta ** -(np.arange(0, dim, 2) / dim)) for dim in dims]
    turns = [positions[..., i, None] * f for i, f in enumerate(frequencies)]
    return jnp.concatenate(turns, axis=-1)


def check_dims(dims: Sequence[int], head: int | None = None) -> None:
    """Raise a ValueError unless `dims` are positive, even and (if given) sum to a head's size."""
    if not dims or any(dim < 2 or dim % 2 for dim in dims):
        raise ValueError(f"rope_dims={tuple(dims)} must be positive even numbers, one an axis")
    if head is not None and sum(dims) != head:
        raise ValueError(f"rope_dims={tuple(dims)} sum to {sum(dims)}, a head has {head} channels")


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turn the planes of each head; float32 inside, dtype of `x` out.

    Args:
        x: queries or keys, `[B, N, heads, D]`.
        angles: `[N, D / 2]`, or `[B, N, D / 2]` where positions differ between samples.
    """
    # Channels next to their partners, both times a wide table: on CPU twice as fast as pulling the
    # two apart and interleaving them again.
    wide = lambda even, odd: jnp.stack([even, odd], -1).reshape(*angles.shape[:-1], 1, -1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    y = x.astype(jnp.float32)
    partners = y.reshape(*y.shape[:-1], -1, 2)[..., ::-1].reshape(y.shape)
    return (y * wide(cos, cos) + partners * wide(-sin, sin)).astype(x.dtype)


def rotate_halves(x: jax.Array, angles: jax.Array) -> jax.Array:
    """As `rotate`, of heads whose planes are channels (i, i + D / 2)."""
    cos, sin = (wave[..., None, :] for wave in (jnp.cos(angles), jnp.sin(angles)))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    y = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return y.astype(x.dtype)
