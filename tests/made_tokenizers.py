"""Tiny tokenizers as folders hold them, trained on a few sentences in milliseconds."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

CORPUS = [
    "a photo of a cat sitting on a red sofa, highly detailed",
    "two dogs and a bird; the bird's wings don't move",
    "an old man with a hat, painting 1234 stars!",
    "a cat, a dog, the sea at night, the sun at day",
]
CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def clip(folder, pad="<|endoftext|>"):
    """vocab.json and merges.txt as OpenAI's: bytes, bytes that end words, pairs, two ends."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = ["!"] + [c for c in alphabet if c != "!"]
    vocab += [c + "</w>" for c in vocab]
    learned = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learned.pre_tokenizer = pre_tokenizers.Whitespace()
    learned.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=150, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(m) for m in json.loads(learned.to_str())["model"]["merges"]]
    vocab += [a + b for a, b in merges] + list(CLIP_SPECIAL)
    _write(folder / "vocab.json", {token: i for i, token in enumerate(vocab)})
    _merges(folder, merges)
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    begin, end = ({"content": token} | flags for token in CLIP_SPECIAL)
    _write(
        folder / "special_tokens_map.json",
        {"bos_token": begin, "eos_token": end, "unk_token": end, "pad_token": pad},
    )
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "pad_token": pad}
    typed = {"__type": "AddedToken"}
    ends = {"bos_token": begin | typed, "eos_token": end | typed, "unk_token": end | typed}
    _write(folder / "tokenizer_config.json", config | ends)
    return folder


def qwen(folder, side=None):
    """vocab.json, merges.txt and added tokens as Qwen2's."""
    folder.mkdir(parents=True, exist_ok=True)
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learned.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False),
    )
    model = json.loads(learned.to_str())["model"]
    _write(folder / "vocab.json", model["vocab"])
    _merges(folder, [tuple(m) for m in model["merges"]])
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(len(model["vocab"]) + i): {"content": token, "special": True} | flags
        for i, token in enumerate(QWEN_SPECIAL)
    }
    config = {
        "added_tokens_decoder": added,
        "additional_special_tokens": list(QWEN_SPECIAL[1:]),
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "model_max_length": 131072,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    _write(folder / "tokenizer_config.json", config | ({"padding_side": side} if side else {}))
    return folder


def t5(folder):
    """tokenizer.json as T5's: Unigram with </s> behind every text, and sentinels.

    Without a normalizer: T5's is a table of sentencepiece's that is not made here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    learned = Tokenizer(models.Unigram())
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    learned.train_from_iterator(
        CORPUS * 4,
        trainers.UnigramTrainer(
            vocab_size=90,
            special_tokens=["<pad>", "</s>", "<unk>"],
            unk_token="<unk>",
            show_progress=False,
        ),
    )
    whole = json.loads(learned.to_str())
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    count = len(whole["model"]["vocab"])
    sentinels = [f"<extra_id_{i}>" for i in range(3)]
    whole["model"]["vocab"] += [[token, 0.0] for token in sentinels]
    ids = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {s: count + i for i, s in enumerate(sentinels)}
    whole["added_tokens"] = [
        {"id": i, "content": token, "special": True} | flags for token, i in ids.items()
    ]
    whole["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "</s>", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    }
    _write(folder / "tokenizer.json", whole)
    config = {
        "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": 3,
        "additional_special_tokens": sentinels, "model_max_length": 512,
        "tokenizer_class": "T5Tokenizer",
    }  # fmt: skip
    _write(folder / "tokenizer_config.json", config)
    return folder


def _merges(folder, merges):
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write(path, content):
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
