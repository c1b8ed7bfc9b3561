"""Text as token ids: `Tokenizer`, of one length for every text; what does not fit is cut, and said.

tokenizer = texts.tokenizer("stable-diffusion-v1-5/tokenizer")
ids, mask = tokenizer(["a cat", "two cats on a sofa"])          # [2, 77] each
"""

import dataclasses
import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdiff.errors import UserError

_SHOWN = 3  # texts that one warning quotes
_MANY = 512  # from here on threads are worth it; once they ran, the library grumbles at every fork


class Truncated(UserWarning):
    """Texts have more tokens than are read; the message shows what was cut."""


class Tokens(NamedTuple):
    """What a network reads of texts.

    Attributes:
      ids: int32 `[B, S]`.
      mask: bool `[B, S]`, False for padding. By position: a padding token may be a token of the
        text too (CLIP pads with its end).
    """

    ids: np.ndarray
    mask: np.ndarray


class Pieces(NamedTuple):
    """The tokens of one text, without those that begin and end a sequence.

    Attributes:
      ids: one a token.
      spans: the characters of the text that each token stands for, (first, last + 1).
    """

    ids: Sequence[int]
    spans: Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Texts to ids and masks; made by `texts.tokenizer(folder)`.

    Attributes:
      core: the `tokenizers.Tokenizer`, which neither truncates nor pads.
      length: the most tokens of a text that its network was made for; None where the folder does
        not say.
      pad: the id that fills up; None where there is none, and then all texts must fill the length.
      side: where the padding goes, "right" or "left".
      cut: where a text that is too long loses tokens, "right" or "left".
      family: whose it is, "clip", "t5", "qwen", "bert", or "" where the folder does not say.
      name: the folder, for messages.
    """

    core: Any
    length: int | None = None
    pad: int | None = None
    side: str = "right"
    cut: str = "right"
    family: str = ""
    name: str = "the tokenizer"

    @functools.cached_property
    def vocab(self) -> int:
        """One more than the largest id."""
        return max(self.core.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @functools.cached_property
    def ends(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that begin and those that end every sequence, as CLIP's ((49406,), (49407,))."""
        bare = self.core.encode("a", add_special_tokens=False)
        if not bare.ids:  # a vocabulary that knows no "a"
            words = self.core.get_vocab(with_added_tokens=False)
            found = (self.core.encode(word, add_special_tokens=False) for word in words)
            bare = next((one for one in found if one.ids), None)
        if bare is None:
            return (), tuple(self.core.encode("").ids)
        count = len(bare.ids)
        whole = self.core.post_process(bare)
        first = next(i for i, special in enumerate(whole.special_tokens_mask) if not special)
        return tuple(whole.ids[:first]), tuple(whole.ids[first + count :])

    def pieces(self, texts: Sequence[str]) -> list[Pieces]:
        """The tokens of each text as it is, none cut and none added."""
        if len(texts) < _MANY:
            found = [self.core.encode(text, add_special_tokens=False) for text in texts]
        else:
            found = self.core.encode_batch(list(texts), add_special_tokens=False)
        return [Pieces(one.ids, one.offsets) for one in found]

    def room(self, length: int) -> int:
        """How many tokens of a text's own fit into a sequence of `length`.

        Raises:
          UserError: not even one.
        """
        room = length - sum(map(len, self.ends))
        if room < 1:
            raise UserError(
                f"length={length} given; {self.name} itself takes {length - room} tokens a text: "
                f"give {length - room + 1} or more."
            )
        return room

    def row(self, ids: Sequence[int], length: int, side: str | None = None) -> tuple[list, list]:
        """(ids, mask) of one sequence: begun, ended and filled up to `length`."""
        before, after = self.ends
        full = [*before, *ids, *after]
        missing = length - len(full)
        if missing and self.pad is None:
            raise UserError(f"{self.name} names no pad_token, which shorter texts are filled with.")
        filled, padded = [self.pad] * missing, [False] * missing
        if (side or self.side) == "left":
            return filled + full, padded + [True] * len(full)
        return full + filled, [True] * len(full) + padded

    def kept(self, count: int, most: int) -> slice:
        """Which of a text's `count` tokens are kept when there is room for `most`."""
        return slice(max(count - most, 0), count) if self.cut == "left" else slice(most)

    def __call__(
        self, texts: Sequence[str], length: int | None = None, side: str | None = None
    ) -> Tokens:
        """Ids and masks, `[B, length]` each.

        Args:
          texts: any number of them.
          length: tokens a text; the folder's own unless given. A longer text is cut, with a
            warning (`Truncated`) that quotes what is lost.
          side: where the padding goes; the folder's own unless given.

        Raises:
          UserError: what is no sequence of strings, or no length here nor there.
        """
        texts = strings("tokenizer", texts)
        length = self.length if length is None else length
        if length is None:
            raise UserError(f"{self.name} names no model_max_length: give length=.")
        room = self.room(length)
        found = self.pieces(texts)
        warn_of_cuts(list(_cuts(self, texts, found, room)), length)
        kept = (one.ids[self.kept(len(one.ids), room)] for one in found)
        ids, mask = zip(*(self.row(one, length, side) for one in kept))
        return Tokens(np.asarray(ids, np.int32), np.asarray(mask, bool))


def _cuts(
    tokenizer: Tokenizer, texts: Sequence[str], found: Sequence[Pieces], room: int
) -> Iterator[tuple[str, str, int]]:
    for text, (ids, spans) in zip(texts, found):
        lost = len(ids) - room
        if lost > 0:
            gone = spans[:lost] if tokenizer.cut == "left" else spans[room:]
            yield text, text[gone[0][0] : gone[-1][1]], len(ids)


def warn_of_cuts(cuts: Sequence[tuple[str, str, int]], length: int, hint: str = "") -> None:
    """One warning for all texts that lost something: (text, what of it, tokens it has) each."""
    if not cuts:
        return
    told = [
        f"{_short(text)!r} has {count} tokens, cut: {_short(lost, 200)!r}"
        for text, lost, count in cuts[:_SHOWN]
    ]
    more = f"; and {len(cuts) - _SHOWN} more texts" if len(cuts) > _SHOWN else ""
    warnings.warn(
        f"{length} tokens of a text are read, its begin and end among them: "
        f"{'; '.join(told)}{more}.{hint}",
        Truncated,
        stacklevel=3,
    )


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def strings(where: str, texts: Any) -> list[str]:
    """The texts as a list, after checking that they are texts.

    Raises:
      UserError: one string, bytes, nothing, or an entry that is no string of Unicode characters.
    """
    if isinstance(texts, str):
        raise UserError(f"{where}: one text given, a list of texts wanted: [{_short(texts)!r}].")
    if isinstance(texts, bytes):
        raise UserError(f"{where}: bytes given, a list of texts wanted: [text.decode()].")
    try:
        texts = list(texts)
    except TypeError:
        raise UserError(f"{where}: {type(texts).__name__} given, a list of texts wanted.") from None
    if not texts:
        raise UserError(f"{where}: an empty list of texts given; give one text or more.")
    for i, text in enumerate(texts):
        if isinstance(text, bytes):
            raise UserError(f"{where}: texts[{i}] is bytes; decode it: text.decode().")
        if not isinstance(text, str):
            raise UserError(f"{where}: texts[{i}] is of type {type(text).__name__}, not a string.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: texts[{i}] holds half a surrogate pair at character {error.start}, "
                "which is no Unicode text."
            ) from None
    return [str(text) for text in texts]
