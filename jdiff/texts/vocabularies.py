"""A tokenizer out of a checkpoint's folder: tokenizer.json, or vocab.json and merges.txt.

transformers 5 writes tokenizer.json and tokenizer_config.json; 4 wrote vocab.json and merges.txt
beside them or instead, the special tokens in special_tokens_map.json, and further tokens in
tokenizer_config.json's added_tokens_decoder or in added_tokens.json. All of it is read; T5's
sentencepiece file alone is not.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from jdiff import jsonfile
from jdiff.errors import UserError
from jdiff.texts.tokens import Tokenizer

#: The names of special tokens, in the order in which transformers adds them to a vocabulary.
_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_LISTS = ("extra_special_tokens", "additional_special_tokens")
#: What a folder leaves out where it is its class's own.
_DEFAULTS: Mapping[str, Mapping[str, str]] = {
    "clip": {
        "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
    },
    "qwen": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    "t5": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "bert": {
        "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    },
    "": {},
}  # fmt: skip
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
_UNLIMITED = 10**6  # transformers writes 1e30 for no limit


def tokenizer(folder: str | pathlib.Path) -> Tokenizer:
    """Opens a folder's tokenizer.

    Args:
      folder: with tokenizer.json, or vocab.json and merges.txt; or such a tokenizer.json itself.

    Raises:
      UserError: files that are missing or damaged, a sentencepiece file alone, or
        `pip install 'jdiff[text]'` is wanting.

    >>> texts.tokenizer("stable-diffusion-v1-5/tokenizer")(["a cat"]).ids    # [1, 77]
    """
    library()
    folder = pathlib.Path(folder)
    if folder.is_file():
        return _opened(folder, {}, folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; a tokenizer's folder is wanted.")
    settings = _settings(folder)
    path = folder / "tokenizer.json"
    if path.is_file():
        return _opened(path, settings, folder)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        family = _family(settings)
        if "tokenizer_class" not in settings:
            family = _guess(settings, _json(folder / "vocab.json"))
        settings = {**_DEFAULTS[family], **settings}
        core = {"clip": _clip, "qwen": _qwen}[_buildable(family, folder)](folder, settings)
        return _made(core, settings, folder, family)
    spiece = next((p.name for p in folder.glob("*.model")), None)
    if spiece:
        raise UserError(
            f"{folder} holds {spiece} and no tokenizer.json, which is what is read. Write it there "
            f"once: transformers.AutoTokenizer.from_pretrained({str(folder)!r})"
            f".save_pretrained({str(folder)!r})"
        )
    raise UserError(
        f"{folder} holds no tokenizer: neither tokenizer.json, nor vocab.json and merges.txt."
    )


def library() -> Any:
    """The module `tokenizers`, which is an extra."""
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            "reading a tokenizer needs tokenizers: pip install 'jdiff[text]'."
        ) from None
    return tokenizers


def _opened(path: pathlib.Path, settings: dict[str, Any], name: pathlib.Path) -> Tokenizer:
    try:
        core = library().Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exceptions
        raise UserError(f"{path} is not a tokenizer.json, or is damaged: {error}.") from None
    family = _family(settings)
    settings = {**_DEFAULTS[family], **settings}
    return _made(core, settings, name, family)


def _made(core: Any, settings: Mapping[str, Any], name: pathlib.Path, family: str) -> Tokenizer:
    own, limit = core.padding or {}, core.truncation or {}
    core.no_padding()
    core.no_truncation()
    _add(core, settings, name)
    pad = settings.get("pad_token") or own.get("pad_token")
    length = settings.get("model_max_length") or limit.get("max_length")
    return Tokenizer(
        core=core,
        length=int(length) if length and length < _UNLIMITED else None,
        pad=None if pad is None else core.token_to_id(_content(pad)),
        side=settings.get("padding_side") or own.get("direction", "right").lower(),
        cut=settings.get("truncation_side") or limit.get("direction", "right").lower(),
        family=family,
        name=str(name),
    )


def _settings(folder: pathlib.Path) -> dict[str, Any]:
    """tokenizer_config.json with what special_tokens_map.json and added_tokens.json hold."""
    config = _json(folder / "tokenizer_config.json")
    told = _json(folder / "special_tokens_map.json")
    settings = config | told if "added_tokens_decoder" not in config else told | config
    if "added_tokens_decoder" not in config:
        special = {_content(token) for token in _special(settings)}
        settings["added_tokens_decoder"] = {
            index: {
                "content": token,
                "special": token in special,
                "normalized": token not in special,
            }
            for token, index in _json(folder / "added_tokens.json").items()
        }
    return {key: value for key, value in settings.items() if value is not None}


def _add(core: Any, settings: Mapping[str, Any], name: pathlib.Path) -> None:
    """Adds the special and further tokens that the vocabulary does not mark as such yet.

    One that is a plain word of the vocabulary keeps its id, and is cut out of texts from then on,
    as transformers does: "!", which pads OpenCLIP's texts, so that "cat!" becomes "cat", padding.
    """
    known = {token.content for token in core.get_added_tokens_decoder().values()}
    further = {int(i): token for i, token in settings.get("added_tokens_decoder", {}).items()}
    tokens = [_token(further[i], special=False) for i in sorted(further)]
    tokens += [_token(token, special=True) for token in _special(settings)]
    wanted = {}
    for token in tokens:
        if token.content not in known:
            wanted.setdefault(token.content, token)
    core.add_tokens(list(wanted.values()))
    for index, token in further.items():
        if (found := core.token_to_id(_content(token))) != index:
            raise UserError(
                f"{name}: the added token {_content(token)!r} should be {index}, and becomes "
                f"{found} behind the words of the vocabulary: files of two tokenizers are mixed."
            )


def _special(settings: Mapping[str, Any]) -> list[Any]:
    named = [settings[key] for key in _NAMES if settings.get(key)]
    lists = [settings[key] for key in _LISTS if settings.get(key)]
    for one in lists:
        named += list(one.values()) if isinstance(one, Mapping) else list(one)
    return named


def _token(token: Any, special: bool) -> Any:
    """An added token, written as a string or with its flags."""
    given = token if isinstance(token, Mapping) else {"content": token}
    special = special or given.get("special", False)
    flags = {"normalized": not special} | {key: given[key] for key in _FLAGS if key in given}
    return library().AddedToken(given["content"], special=special, **flags)


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, Mapping) else token


def _family(settings: Mapping[str, Any]) -> str:
    """By tokenizer_class, as "CLIPTokenizerFast"; "" for one that does not say."""
    given = settings.get("tokenizer_class", "").lower()
    return next((name for name in _DEFAULTS if name and given.startswith(name)), "")


def _guess(settings: Mapping[str, Any], vocab: Mapping[str, int]) -> str:
    if "<|startoftext|>" in vocab:
        return "clip"
    further = map(_content, settings.get("added_tokens_decoder", {}).values())
    return "qwen" if "<|im_start|>" in further else ""


def _buildable(family: str, folder: pathlib.Path) -> str:
    if family not in ("clip", "qwen"):
        raise UserError(
            f"{folder} holds vocab.json and merges.txt, which are read for CLIPTokenizer and "
            "Qwen2Tokenizer (tokenizer_config.json: tokenizer_class); others want a tokenizer.json."
        )
    return family


def _clip(folder: pathlib.Path, settings: Mapping[str, Any]) -> Any:
    """CLIP's (Radford et al. 2021): lower case, words that end in </w>, byte pairs within them."""
    lib = library()
    core = _pairs(folder, unk_token=_content(settings["unk_token"]), end_of_word_suffix="</w>")
    squeeze = lib.normalizers.Replace(lib.Regex(r"\s+"), " ")
    core.normalizer = lib.normalizers.Sequence(
        [lib.normalizers.NFC(), squeeze, lib.normalizers.Lowercase()]
    )
    words = lib.Regex(
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    )
    core.pre_tokenizer = lib.pre_tokenizers.Sequence(
        [
            lib.pre_tokenizers.Split(words, behavior="removed", invert=True),
            lib.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = lib.decoders.ByteLevel()
    begin, end = (_content(settings[key]) for key in ("bos_token", "eos_token"))
    for token in (begin, end):
        if core.token_to_id(token) is None:
            raise UserError(f"{folder / 'vocab.json'} lacks {token!r}, which every text needs.")
    core.post_processor = lib.processors.RobertaProcessing(
        (end, core.token_to_id(end)), (begin, core.token_to_id(begin)),
        trim_offsets=False, add_prefix_space=False,
    )  # fmt: skip
    return core


def _qwen(folder: pathlib.Path, settings: Mapping[str, Any]) -> Any:
    """Qwen2's (Bai et al. 2023): byte pairs on GPT-4's words, each with the space before it."""
    lib = library()
    core = _pairs(folder)
    core.normalizer = lib.normalizers.NFC()
    words = lib.Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    prefix = bool(settings.get("add_prefix_space", False))
    core.pre_tokenizer = lib.pre_tokenizers.Sequence(
        [
            lib.pre_tokenizers.Split(words, behavior="isolated"),
            lib.pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ]
    )
    core.decoder = lib.decoders.ByteLevel()
    return core


def _pairs(folder: pathlib.Path, **options: Any) -> Any:
    lib = library()
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    try:
        return lib.Tokenizer(lib.models.BPE.from_file(str(vocab), str(merges), **options))
    except Exception as error:  # the library raises plain Exceptions
        raise UserError(f"{vocab} and {merges.name} do not fit together: {error}.") from None


def _json(path: pathlib.Path) -> dict[str, Any]:
    return jsonfile.read(path) if path.is_file() else {}
