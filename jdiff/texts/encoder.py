"""Texts to what networks are conditioned on: `TextEncoder.encode`.

    encoder = interop.text_encoder("stable-diffusion-v1-5/text_encoder")
    encoder.encode(["a cat", "two cats"])       # {"text": [2, 77, 768], "mask": [2, 77], ...}

A tokenizer and a network, and what is made of the network's states. Every batch has one size and
every text one length, so that any number of texts is one compiled program.
"""

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.errors import UserError, choose, positive
from jdiff.pytree import Array, PyTree
from jdiff.texts import weights
from jdiff.texts.tokens import Pieces, Tokenizer, strings, warn_of_cuts
from jdiff.texts.weights import Weighted

POOLS = ("network", "mean", "none")


class Unweighted(UserWarning):
    """A text holds a prompt weight such as "(red:1.3)", and the encoder reads it as plain text."""


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
    """A frozen text network behind one call; made by `interop.text_encoder`, `texts.minilm`.

    Attributes:
      tokenizer: texts to ids.
      apply: the network, a `texts.base.TextNetwork`.
      params: its weights.
      length: tokens of a text (of a chunk, where there are several); longer texts are cut.
      layer: whose states become "text": "last", what the network ends with, after its last norm; or
        a layer's before that norm: -1 the last, -2 the one before, 0 what enters the first.
      norm: whether the last norm is applied to `layer` too.
      masked: whether the network is told which tokens are padding. CLIP never was, nor T5 in SD3
        and FLUX; "mask" is returned in any case.
      pool: "network", its own pooled vector, if it has one; "mean", the mean over the tokens, of
        norm 1; "none".
      weights: how prompt weights, `(red:1.3)`, act: "interpolate" or "scale" (`texts.weights`);
        None reads brackets as text.
      chunks: into how many sequences of `length` a long text may be cut; each is read by itself and
        their tokens are put one behind the other. All texts of a call get as many as the longest
        needs, so texts that are compared (a prompt, its negative) belong in one call.
      template: what a text is put into, at its "{}", before it is cut into tokens.
      drop: tokens at the front that are read, and not returned: those of the template.
      batch: texts at a time.
    """

    tokenizer: Tokenizer
    apply: Any
    params: PyTree
    length: int
    layer: int | str = "last"
    norm: bool = False
    masked: bool = True
    pool: str = "network"
    weights: str | None = None
    chunks: int = 1
    template: str = "{}"
    drop: int = 0
    batch: int = 4

    def __post_init__(self) -> None:
        where = "TextEncoder"
        positive(where, length=self.length, chunks=self.chunks, batch=self.batch)
        choose(f"{where}: pool", self.pool, POOLS)
        if self.weights is not None:
            choose(f"{where}: weights", self.weights, weights.BY_NAME)
        if isinstance(self.layer, str):
            choose(f"{where}: layer", self.layer, ["last"])
        if self.template.count("{}") != 1:
            raise UserError(f"{where}: template={self.template!r} must hold {{}} once.")
        if self.chunks > 1 and (self.drop or self.template != "{}"):
            raise UserError(
                f"{where}: a text within a template is not cut into chunks={self.chunks}."
            )
        self.tokenizer.room(self.length + self.drop)
        network, name = self.apply.skeleton(), self.tokenizer.name
        if self.tokenizer.vocab > network.vocab:
            raise UserError(
                f"{name} does not fit its encoder: its ids go up to {self.tokenizer.vocab - 1}, "
                f"and {type(network).__name__} knows {network.vocab} tokens."
            )
        if network.length is not None and self.length + self.drop > network.length:
            raise UserError(
                f"{where}: length={self.length} with drop={self.drop} given; "
                f"{type(network).__name__} has positions for {network.length} tokens."
            )

    @functools.cached_property
    def width(self) -> int:
        """Channels of "text"."""
        return self.apply.skeleton().width

    def replace(self, **fields: Any) -> "TextEncoder":
        """The same encoder with other fields, e.g. `replace(length=120, weights="interpolate")`."""
        for name in fields:
            choose("TextEncoder.replace", name, [f.name for f in dataclasses.fields(self)])
        return dataclasses.replace(self, **fields)

    def encode(
        self, texts: Sequence[str], *, sharding: jax.sharding.Sharding | None = None
    ) -> dict[str, Array]:
        """What a network is told of these texts.

        Args:
          texts: any number of them; "" is one.
          sharding: how the texts of a batch are laid out over this process's devices.

        Returns:
          "text", states float32 `[B, S, D]`; "mask", bool `[B, S]`, False for padding; "pooled",
          `[B, P]`, where there is one. S is `length`, times the chunks that the longest text needs.
          A text that is cut is a warning, `texts.Truncated`.

        Raises:
          UserError: a string or bytes instead of a list, an empty list, entries that are no text.
        """
        texts = strings("encode", texts)
        read = [self._weighed(text) for text in texts]
        if self.weights is None:
            _warn_of_weights(texts)
        found = self.tokenizer.pieces([one.text for one in read])
        chunked, cuts = zip(*map(self._chunked, read, found))
        hint = "" if self.drop else " A larger length= or chunks= reads more."
        told = [(text, *cut) for text, cut in zip(texts, cuts) if cut]
        warn_of_cuts(told, self.length + self.drop, hint)
        count = max(map(len, chunked))
        rows = self._rows([c for own in chunked for c in own + [_BLANK] * (count - len(own))])
        out = self._run(rows, self._empty(rows), sharding)
        # Each text's chunks one behind the other; the pooled vector is that of its first.
        told = {
            "text": out["text"].reshape(len(texts), -1, self.width),
            "mask": rows.mask[:, self.drop :].reshape(len(texts), -1),
        }
        told |= {"pooled": out["pooled"][::count]} if "pooled" in out else {}
        return jax.tree.map(jnp.asarray, told)

    def _weighed(self, text: str) -> Weighted:
        """The text within the template, and its weights."""
        if self.weights is None:
            one = Weighted(text, np.ones(len(text)))
        else:
            one = weights.parse(text)
        before, after = self.template.split("{}")
        return Weighted(
            before + one.text + after,
            np.pad(one.weights, (len(before), len(after)), constant_values=1.0),
            tuple(len(before) + at for at in one.breaks),
        )

    def _chunked(
        self, read: Weighted, found: Pieces
    ) -> tuple[list["_Chunk"], tuple[str, int] | None]:
        """The chunks of one text, at most `chunks`; and (what was cut, how many tokens it has)."""
        room = self.tokenizer.room(self.length + self.drop)
        starts = [sum(end <= at for _, end in found.spans) for at in read.breaks]
        bounds = [0, *starts, len(found.ids)]
        whole = _Chunk(found.ids, weights.of_tokens(read, found.spans))
        pieces = [
            _Chunk(*(part[i : min(i + room, stop)] for part in whole))
            for start, stop in zip(bounds, bounds[1:])
            for i in range(start, stop, room)
        ] or [_BLANK]
        lost = sum(len(chunk.ids) for chunk in pieces[self.chunks :])
        if not lost:
            return pieces, None
        if self.chunks == 1 and self.tokenizer.cut == "left":
            pieces = [_Chunk(*(part[-room:] for part in whole))]
            gone = found.spans[:-room]
        else:
            gone = found.spans[-lost:]
        return pieces[: self.chunks], (read.text[gone[0][0] : gone[-1][1]], len(found.ids))

    def _rows(self, chunks: Sequence["_Chunk"]) -> "_Rows":
        """Arrays `[rows, S]` of them, right-padded."""
        length = self.length + self.drop
        ids, mask = zip(*(self.tokenizer.row(chunk.ids, length, "right") for chunk in chunks))
        factors = np.ones((len(chunks), length), np.float32)
        before = len(self.tokenizer.ends[0])
        for row, chunk in zip(factors, chunks):
            row[before : before + len(chunk.ids)] = chunk.factors
        return _Rows(np.asarray(ids, np.int32), np.asarray(mask, bool), factors)

    def _empty(self, rows: "_Rows") -> np.ndarray | None:
        """What becomes of "", for weighted states to be compared with; zeros where none is."""
        if self.weights is None:
            return None
        zeros = np.zeros((self.length, self.width), np.float32)
        if (rows.factors == 1).all():
            return zeros
        blank = self._weighed("")
        chunks, _ = self._chunked(blank, self.tokenizer.pieces([blank.text])[0])
        return self._run(self._rows(chunks), zeros)["text"][0]

    def _run(
        self, rows: "_Rows", empty: np.ndarray | None, sharding: jax.sharding.Sharding | None = None
    ) -> dict[str, np.ndarray]:
        """What is made of each row, by batches of one size."""
        fields = (getattr(self, name) for name in _Reading._fields)
        how = _Reading(*fields)
        size, count = self.batch, len(rows.ids)
        if sharding is not None:
            devices = len(sharding.device_set)
            parts = devices // sharding.shard_shape((devices,))[0]
            size = -(-size // parts) * parts
        outs = []
        for start in range(0, count, size):
            which = np.minimum(start + np.arange(size), count - 1)
            some = _Rows(*(a[which] for a in rows))
            some = some if sharding is None else jax.device_put(some, sharding)
            outs.append(_read(how, self.params, some, empty))
        # Put together by the host: on the device each number of texts were a program of its own.
        return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *outs)


class _Chunk(NamedTuple):
    """Tokens of a text's own, and their weights."""

    ids: Sequence[int]
    factors: Sequence[float]


_BLANK = _Chunk([], [])


class _Rows(NamedTuple):
    """Chunks as arrays `[rows, S]`: what the network reads, and the weights."""

    ids: np.ndarray
    mask: np.ndarray
    factors: np.ndarray


class _Reading(NamedTuple):
    """The fields of an encoder that its program depends on."""

    apply: Any
    layer: int | str
    norm: bool
    masked: bool
    pool: str
    weights: str | None
    drop: int


@functools.partial(jax.jit, static_argnums=0)
def _read(how: _Reading, params: PyTree, rows: _Rows, empty: Array | None) -> dict[str, Array]:
    """One batch."""
    layers = () if how.layer == "last" else (how.layer,)
    seen = rows.mask if how.masked else None
    out = how.apply.method("read")(params, rows.ids, seen, layers=layers)
    text = out.hidden[0] if layers else out.last
    if layers and how.norm:
        text = how.apply.method("finish")(params, text)
    text, mask = text.astype(jnp.float32)[:, how.drop :], rows.mask[:, how.drop :]
    pooled = {"network": out.pooled, "mean": _mean(text, mask), "none": None}[how.pool]
    if how.weights is not None:
        text = weights.BY_NAME[how.weights](text, rows.factors[:, how.drop :], empty)
    return {"text": text} | ({} if pooled is None else {"pooled": pooled.astype(jnp.float32)})


def _mean(states: Array, mask: Array) -> Array:
    """The mean over the tokens, of norm 1, as sentence-transformers pools."""
    mean = jnp.einsum("bsd,bs->bd", states, mask) / jnp.maximum(mask.sum(1), 1)[:, None]
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=1, keepdims=True), 1e-12)


def _warn_of_weights(texts: Sequence[str]) -> None:
    for text in texts:
        if found := weights.explicit(text):
            warnings.warn(
                f"{found!r} is read as plain text; an encoder with weights='interpolate' takes it "
                "for a weight.",
                Unweighted,
                stacklevel=3,
            )
            return
