"""Z-Image's network (Z-Image Team, 2025): one stream of image and text tokens, S3-DiT.

Two short stacks refine image and text apart, then one runs on both. Norms stand before and behind
every branch (Lumina-Image 2.0), c scales and gates them without a shift, and the gates pass through
tanh. The sequences are filled up to multiples of 32 with learned tokens that attention sees.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jdiff.models import joint, layers, rope, stacked
from jdiff.models.attention import Attention
from jdiff.models.dit import patchify, unpatchify
from jdiff.models.initializers import normal, param, zeros
from jdiff.models.joint import QKV
from jdiff.models.layers import RMSNorm, layer_norm, together
from jdiff.models.module import Module
from jdiff.models.remat import named
from jdiff.parallel import tokens
from jdiff.parallel.layout import TRANSFORMER
from jdiff.parallel.tokens import hold

#: The lengths of the sequences of image and text are filled up to multiples of it.
MULTIPLE = 32
#: Channels of c, at most.
CONDITION = 256


class ZImage(Module):
    """A Z-Image `model(x [B, H, W, C], t [B], cond, key=None) -> [B, H, W, C]` float32.

    `cond` holds "text" [B, L, text_width] and, if not every sample's text has length L,
    "text_mask" bool [B, L]: where it is False there is no token, so that a text and its padded form
    mean the same. Patches are cut inside, H and W are multiples of `patch`. There is no dropout:
    `key` has no effect.

    t runs from 0 to 1, where it is noise, and the output is the velocity noise - data, as in the
    other families. The checkpoints have it the other way: inside, the time is 1 - t and the output
    is negated.

    Args:
        patch: side of a patch in latent pixels.
        width: channels of a token; a multiple of `heads`.
        depth: number of blocks on the joint sequence.
        refiners: number of blocks on the image alone, and on the text alone.
        text_width: channels of the text; its root mean square is normed before it is embedded.
        rope_dims: channels of a head that tell the frame, the row and the column. The text's tokens
            are numbered along the frame from 1 on, the image is the frame behind them.
        theta: base of their wavelengths.
        positions: how many frames, rows and columns the network is made for.
        qk_norm: whether queries and keys are normed.
        eps: of the norms of tokens and text.
        time_scale: multiplies 1 - t ahead of its embedding.
        dtype: of the activations; parameters, norms, softmax, angles and c stay float32.
        scan: stack the equal blocks and scan over them.
        remat: which activations the backward pass recomputes, see `jdiff.models.remat`.

    Raises:
        ValueError: if a field is out of range or an input does not fit.
    """

    rules = TRANSFORMER  # how it is split over devices

    def __init__(
        self,
        *,
        in_channels: int = 16,
        patch: int = 2,
        width: int = 3840,
        depth: int = 30,
        refiners: int = 2,
        heads: int = 30,
        text_width: int = 2560,
        rope_dims: Sequence[int] = (32, 48, 48),
        theta: float = 256.0,
        positions: Sequence[int] = (1536, 512, 512),
        qk_norm: bool = True,
        eps: float = 1e-5,
        time_scale: float = 1000.0,
        dtype: str | jnp.dtype = "float32",
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        layers.check_positive(in_channels=in_channels, patch=patch, width=width, depth=depth)
        layers.check_positive(text_width=text_width, theta=theta, eps=eps)
        if refiners < 0:
            raise ValueError(f"refiners={refiners} must not be negative")
        layers.check_heads(heads, width, "width")
        rope.check_dims(rope_dims, head=width // heads)
        for name, three in {"rope_dims": rope_dims, "positions": positions}.items():
            if len(three) != 3:
                raise ValueError(f"{name}={tuple(three)} must be for frame, row and column")
        self.in_channels, self.out_channels = in_channels, in_channels
        self.patch, self.text_width, self.time_scale = patch, text_width, time_scale
        self.rope_dims, self.theta, self.positions = tuple(rope_dims), theta, tuple(positions)
        self.dtype = dtype = layers.float_dtype(dtype)
        self.remat = named(remat)

        condition = min(width, CONDITION)
        linear = functools.partial(joint.linear, rngs=rngs)
        self.time1 = linear(joint.WAVES, 1024, None, "mlp", init=normal(0.02))
        self.time2 = linear(1024, condition, "mlp", None, init=normal(0.02))
        self.embed_patches = linear(patch**2 * in_channels, width, None, "embed", dtype=dtype)
        self.text_norm = RMSNorm(text_width, eps=eps, rngs=rngs)
        self.embed_text = linear(text_width, width, "text", "embed", dtype=dtype)
        pad = functools.partial(param, rngs, (width,), normal(0.02), axes=("embed",))
        self.image_pad, self.text_pad = pad(), pad()

        fields = {"qk_norm": qk_norm, "eps": eps, "dtype": dtype}
        plain = functools.partial(Block, width, heads, 0, **fields)
        modulated = functools.partial(Block, width, heads, condition, **fields)
        repeated = functools.partial(stacked.repeated, scan=scan, rngs=rngs)
        self.image_blocks = repeated(modulated, refiners)
        self.text_blocks = repeated(plain, refiners)
        self.blocks = repeated(modulated, depth)
        self.modulation = linear(condition, width, None, "embed", init=zeros, dtype=dtype)
        features_out = patch**2 * in_channels
        self.out = linear(width, features_out, "embed", None, init=zeros, dtype=dtype)

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        cond: Mapping[str, jax.Array],
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """The network's raw output for noisy latents x at noise conditioning t."""
        del key
        layers.check_inputs(
            self,
            x,
            t,
            cond,
            in_channels=self.in_channels,
            multiple=self.patch,
            reason=f"patch={self.patch}",
            num_classes=0,
        )
        joint.check_text(self, cond, len(x), width=self.text_width)
        rows, columns = x.shape[1] // self.patch, x.shape[2] // self.patch
        places = seats(cond.get("text_mask"), cond["text"].shape[1])
        self._check_positions(places.number.shape[1] + 2, rows, columns)
        c = layers.sinusoidal(1.0 - t, joint.WAVES, scale=self.time_scale)
        c = self.time2(jax.nn.silu(self.time1(c)))
        angles = functools.partial(rope.angles, dims=self.rope_dims, theta=self.theta)
        through = functools.partial(joint.through, remat=self.remat)

        image = _fill(self.embed_patches(patchify(x, self.patch)), self.image_pad[...])
        of_image = angles(image_positions(places.frame, rows, columns, image.shape[1]))
        image = through(self.image_blocks, hold(image), c, None, of_image)

        text = _fill(self.embed_text(self.text_norm(cond["text"])), self.text_pad[...])
        text = jnp.where(places.text[..., None], text, self.text_pad[...].astype(text.dtype))
        of_text = angles(jnp.pad(places.number[..., None], [(0, 0), (0, 0), (0, 2)]))
        seen = None if places.seen is None else places.seen[:, None, None]
        text = through(self.text_blocks, hold(text), None, seen, of_text)

        length = image.shape[1]
        seen = tokens.mask(length, text.shape[1] if seen is None else places.seen)
        turns = tokens.join(of_image, of_text)
        h = through(self.blocks, hold(tokens.join(image, text)), c, seen, turns)
        h = tokens.part(h, length)[0][:, : rows * columns]
        scale = self.modulation(jax.nn.silu(c))[:, None]
        h = self.out(layer_norm(h) * (1 + scale))
        return -unpatchify(h, self.patch, rows, columns).astype(jnp.float32)

    def _check_positions(self, *given: int) -> None:
        """Raise a ValueError if text or image are longer than the network is made for."""
        if any(size > most for size, most in zip(given, self.positions)):
            raise ValueError(
                f"ZImage with positions={self.positions} takes texts of up to "
                f"{(self.positions[0] - 2) // MULTIPLE * MULTIPLE} tokens and images up to "
                f"{self.positions[1] * self.patch} x {self.positions[2] * self.patch}; given are "
                f"{given[0] - 2} tokens and {given[1] * self.patch} x {given[2] * self.patch}"
            )


class Block(layers.ResidualBlock):
    """Attention and a gated MLP, both normed before and after; scaled and gated by c, if modulated.

    Modulated it is the identity at the start.

    Args:
        condition: channels of c; 0: not modulated.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        condition: int,
        *,
        qk_norm: bool,
        eps: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        linear = functools.partial(joint.linear, bias=False, dtype=dtype, rngs=rngs)
        norm = functools.partial(RMSNorm, width, eps=eps, rngs=rngs)
        hidden = int(width / 3 * 8)
        self.attention = Attention(heads)
        modulation = functools.partial(linear, condition, 4 * width, None, "embed", init=zeros)
        self.modulation = modulation(bias=True) if condition else None
        self.norm1, self.norm2, self.norm3, self.norm4 = norm(), norm(), norm(), norm()
        self.qkv = QKV(width, heads, qk_norm=qk_norm, eps=1e-5, bias=False, dtype=dtype, rngs=rngs)
        self.project = linear(width, width, "heads", "embed")
        self.mlp_gate = linear(width, hidden, "embed", "mlp")
        self.mlp_in = linear(width, hidden, "embed", "mlp")
        self.mlp_out = linear(hidden, width, "mlp", "embed")

    def __call__(
        self, h: jax.Array, c: jax.Array | None, mask: jax.Array | None, angles: jax.Array
    ) -> jax.Array:
        """Tokens h [B, N, width] to the same; mask [B, 1, 1, N], angles as in `rope.rotate`."""
        scale1 = gate1 = scale2 = gate2 = 1
        if self.modulation is not None:
            scale1, gate1, scale2, gate2 = jnp.split(self.modulation(c)[:, None], 4, axis=-1)
            scale1, gate1, scale2, gate2 = 1 + scale1, jnp.tanh(gate1), 1 + scale2, jnp.tanh(gate2)
        q, k, v = self.qkv(self.norm1(h) * scale1, angles)
        h = hold(h + gate1 * self.norm2(self.project(self.attention(q, k, v, mask))))
        gate, y = together(self.norm3(h) * scale2, self.mlp_gate, self.mlp_in)
        return hold(h + gate2 * self.norm4(self.mlp_out(jax.nn.silu(gate) * y)))


class Seats(NamedTuple):
    """Where a text's tokens and those that fill it up go; P is L up to a multiple of 32.

    Attributes:
        text: whether a place holds a token of the text, [B or 1, P].
        number: of the place along the frames, from 1 on, [B or 1, P] float32.
        frame: the image's, [B or 1]: behind the text and what fills it up.
        seen: whether the place belongs to the sequence, [B, P], or None if all do.
    """

    text: jax.Array
    number: jax.Array
    frame: jax.Array
    seen: jax.Array | None


def seats(mask: jax.Array | None, length: int) -> Seats:
    """The places of texts of up to `length` tokens, those where `mask` [B, L] is True.

    A sample's tokens are numbered in their order, then the places that fill it up to a multiple of
    32; what is left over belongs to texts longer than this one.
    """
    text = jnp.ones((1, length), bool) if mask is None else mask
    text = jnp.pad(text, [(0, 0), (0, -length % MULTIPLE)])
    count = text.sum(axis=-1, keepdims=True)
    number = jnp.where(text, jnp.cumsum(text, axis=-1), count + jnp.cumsum(~text, axis=-1))
    end = -(-count // MULTIPLE) * MULTIPLE
    seen = None if mask is None else number <= end
    return Seats(text, number.astype(jnp.float32), end[:, 0] + 1.0, seen)


def image_positions(frame: jax.Array, rows: int, columns: int, places: int) -> jax.Array:
    """(frame, row, column) of an image's tokens and, behind them, of those at 0: [B, places, 3]."""
    grid = jnp.asarray(rope.grid([0], range(rows), range(columns)))
    shift = frame[:, None, None] * jnp.array([1.0, 0.0, 0.0])
    return jnp.pad(grid + shift, [(0, 0), (0, places - rows * columns), (0, 0)])


def _fill(tokens: jax.Array, pad: jax.Array) -> jax.Array:
    """[B, N, width] with `pad` [width] behind, up to a multiple of 32."""
    batch, length, width = tokens.shape
    shape = (batch, -length % MULTIPLE, width)
    return jnp.concatenate([tokens, jnp.broadcast_to(pad.astype(tokens.dtype), shape)], axis=1)


def z_image(**changes) -> dict:
    """Fields of Z-Image and Z-Image-Turbo: 6,154,908,736 parameters."""
    return dict(changes)
