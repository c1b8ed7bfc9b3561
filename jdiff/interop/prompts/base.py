"""What a family of pipelines makes of prompts: the base of all, and what they are opened from."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from jdiff.errors import UserError, choose
from jdiff.interop.families import BY_CLASS
from jdiff.interop.loading import Component
from jdiff.interop.text_encoders import text_encoder
from jdiff.pytree import Array

#: Entries of `cond`, each `[N, ...]`.
Entries = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Parts:
    """A pipeline's folder, as a family opens it: what was read of it, and where it lies."""

    folder: pathlib.Path
    index: Mapping[str, Any]
    components: Mapping[str, Component]
    network: Component

    def has(self, name: str) -> bool:
        """Whether the pipeline has this part: model_index.json may say null."""
        return bool((self.index.get(name) or [None])[0])

    def component(self, name: str) -> Component:
        """A network that was read.

        Raises:
          UserError: it is not named, not there, of an unknown class, or was not read.
        """
        if name in self.components:
            return self.components[name]
        where = self.folder / name
        if not self.has(name):
            raise UserError(f"{self.folder / 'model_index.json'} names no {name}.")
        if not where.is_dir():
            raise UserError(f"{where} is missing: model_index.json names it ({self._class(name)}).")
        choose(f"{self.folder / 'model_index.json'}: {name}", self._class(name), BY_CLASS)
        raise UserError(
            f"{name} was not read: load the folder without only=, or with {name!r} in it."
        )

    def encoder(self, name: str = "text_encoder", **options: Any) -> Any:
        """A text encoder with its tokenizer; the options are those of `interop.text_encoder`.

        Raises:
          UserError: as `component`, a tokenizer's folder that is missing, or that does not fit.
        """
        component = self.component(name)
        tokenizer = self.folder / name.replace("text_encoder", "tokenizer")
        if not tokenizer.is_dir():
            raise UserError(f"{tokenizer} is missing: {name} reads the tokens that it makes.")
        return text_encoder(component, tokenizer=tokenizer, **options)

    def _class(self, name: str) -> str:
        return self.index[name][1]


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """How a family of pipelines is asked: texts, sizes and scales to what its network is told.

    A family is a subclass that sets the class variables, opens its encoders in `open` and says in
    `encode` what one text becomes; the rest as far as it differs.

    Attributes:
      encoders: the text encoders, by the names of their folders.
      index: model_index.json.
      config: the network's config.json.
    """

    encoders: Mapping[str, Any]
    index: Mapping[str, Any]
    config: Mapping[str, Any]

    #: The pipeline's classes in model_index.json.
    classes: ClassVar[tuple[str, ...]] = ()
    #: Of these encoders `length=` sets the number of tokens; the others have one.
    long: ClassVar[tuple[str, ...]] = ()
    #: What a text that is not given is, in guidance.
    empty: ClassVar[str] = ""
    #: Keywords of `asked` that are the family's own.
    options: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def open(cls, parts: Parts) -> "Prompts":
        """The family's encoders out of a folder.

        Raises:
          UserError: what `Parts.encoder` refuses.
        """
        raise NotImplementedError

    def encode(self, texts: Sequence[str]) -> Entries:
        """What the network is told of each text, `[len(texts), ...]`."""
        raise NotImplementedError

    @property
    def steps(self) -> int:
        """Steps, unless the user says."""
        return 50

    @property
    def guidance_scale(self) -> float:
        """The guidance scale, unless the user says."""
        return 7.5

    @property
    def side(self) -> int:
        """Side of the latents, unless the user says."""
        return int(self.config.get("sample_size") or 128)

    def weight(self, guidance_scale: float) -> float | None:
        """The scale w of null + w (conditional - null); None where only the condition is asked."""
        return guidance_scale if guidance_scale > 1 else None

    def guide(self, denoise: Any, **options: Any) -> Any:
        """The guided denoiser with what the family does to it beside; its options are `asked`'s."""
        return denoise

    def asked(
        self, prompts: Sequence[str], negative: Sequence[str] | None, size: tuple[int, int],
        guidance_scale: float | None = None, **options: Any,
    ) -> tuple[Entries, Entries, float | None]:  # fmt: skip
        """(cond, null, w): what the network is told of these prompts, and how it is guided.

        Entries are `[N, ...]`. Without guidance null is empty and w None.

        Args:
          negative: as many as prompts, or None.
          size: (H, W) of the images in pixels.
          guidance_scale: as diffusers counts it for this family.
        """
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        weight = self.weight(scale)
        guided = weight is not None
        return *self.told(prompts, negative, size, scale, guided, **options), weight

    def told(
        self, prompts: Sequence[str], negative: Sequence[str] | None, size: tuple[int, int],
        guidance_scale: float, guided: bool,
    ) -> tuple[Entries, Entries]:  # fmt: skip
        """(cond, null), null only where the network is guided. Here: the texts alone."""
        return self.pair(prompts, negative, guided)

    def pair(
        self, prompts: Sequence[str], negative: Sequence[str] | None, guided: bool
    ) -> tuple[Entries, Entries]:
        """The prompts and the texts to guide away from, encoded together; each text once."""
        away = [self.empty] * len(prompts) if negative is None else negative
        texts = list(dict.fromkeys([*prompts, *away] if guided else prompts))
        entries = self.encode(texts)
        rows = lambda wanted: taken(entries, np.asarray([texts.index(text) for text in wanted]))
        return rows(prompts), rows(away) if guided else {}

    def tuned(self, texts: Mapping[str, Any]) -> "Prompts":
        """The same with other options of its encoders.

        Args:
          texts: "length", tokens of a text, where an encoder takes any number; "weights", how
            `(word:1.3)` is read; "chunks", how many times its length a CLIP takes.

        Raises:
          UserError: another option, or a length where every encoder has one of its own.
        """
        for name in texts:
            choose("pipe: texts", name, ("length", "weights", "chunks"))
        if "length" in texts and not self.long:
            raise UserError("pipe: a text's length is CLIP's own here; chunks= reads longer ones.")
        if not texts:
            return self
        changed = {}
        for name, encoder in self.encoders.items():
            other = "chunks" if name in self.long else "length"
            changed[name] = encoder.replace(**{k: v for k, v in texts.items() if k != other})
        return dataclasses.replace(self, encoders=changed)

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuses options that the family has not.

        Raises:
          UserError: one of them, with the nearest that there is.
        """
        where = f"pipe: option of {self.index['_class_name']}"
        for name in options:
            if not self.options:
                raise UserError(f"{where}: {name!r} given; it has none of its own.")
            choose(where, name, self.options)


def listed(prompts: str | Sequence[str], name: str = "prompts") -> list[str]:
    """Texts as a list; one alone is a list of one.

    Raises:
      UserError: bytes, an empty list, or an entry that is no text.
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence):
        raise UserError(
            f"{name}: {type(prompts).__name__} given; give a str or a list of them"
            f"{': text.decode()' if isinstance(prompts, bytes) else ''}."
        )
    for i, text in enumerate(prompts):
        if not isinstance(text, str):
            decode = ": text.decode()" if isinstance(text, bytes) else ""
            raise UserError(f"{name}[{i}] is {type(text).__name__}; texts are str{decode}.")
    if not len(prompts):
        raise UserError(f"{name} is an empty list; give at least one text.")
    return list(prompts)


def paired(negative: str | Sequence[str] | None, number: int) -> list[str] | None:
    """One negative a prompt; one alone is that of all.

    Raises:
      UserError: another number of them, and what `listed` refuses.
    """
    if negative is None:
        return None
    given = listed(negative, "negative")
    if isinstance(negative, str):
        return given * number
    if len(given) != number:
        raise UserError(
            f"negative: {len(given)} texts for {number} prompts; give one a prompt, or one str."
        )
    return given


def full(number: int, values: Sequence[float] | float) -> Array:
    """The same numbers for all `[number, ...]`, float32."""
    values = np.asarray(values, np.float32)
    return np.broadcast_to(values, (number, *values.shape))


@jax.jit
def taken(entries: Entries, rows: Array) -> Entries:
    """These rows of every entry."""
    return jax.tree.map(lambda a: a[rows], entries)
