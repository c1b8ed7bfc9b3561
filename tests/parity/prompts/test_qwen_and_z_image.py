"""Qwen-Image and Z-Image as a whole: templates, masked texts, and their guidance."""

import numpy as np
import pytest
import tiny_pipelines as tiny
from checkpoints import distance, images
from tiny_pipelines import diffusers, torch, transformers

from jdiff import interop
from jdiff.errors import UserError
from jdiff.texts import Truncated

SIZE = {"height": 16, "width": 24}
NOISE = np.repeat(images(1, 8, 12, 4, seed=7), 2, 0)
LONG = "a fox, " * 20
TEXT = {
    "vocab_size": 264, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
}  # fmt: skip
CHAT = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)


def tokenizer():
    """Bytes, and the marks of a chat."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = {letter: i for i, letter in enumerate(bytes_to_unicode().values())}
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = letters | {mark: 256 + i for i, mark in enumerate(marks)}
    made = transformers.Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=2048)
    made.add_special_tokens({"additional_special_tokens": marks[1:]})
    made.chat_template = CHAT
    return made


def qwen_image():
    """diffusers' own, tiny."""
    vision = {"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 8,
              "out_hidden_size": 24, "fullatt_block_indexes": [0]}  # fmt: skip
    turns = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 100.0}
    config = transformers.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": turns}, vision_config=vision
    )
    reader = tiny.randomise(transformers.Qwen2_5_VLForConditionalGeneration(config), std=0.8)
    mean = {"latents_mean": [0.1, -0.2, 0.0, 0.3], "latents_std": [1.5, 0.8, 1.0, 1.2]}
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], **mean
    )
    network = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=12, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(2, 4, 6),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )  # as the released one
    return diffusers.QwenImagePipeline(
        scheduler, tiny.randomise(vae, std=0.4), reader, tokenizer(),
        tiny.randomise(network, std=0.35),
    )  # fmt: skip


def z_image():
    """diffusers' own, tiny."""
    config = transformers.Qwen3Config(**TEXT, head_dim=12)
    reader = tiny.randomise(transformers.Qwen3ForCausalLM(config), std=0.2)
    network = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=24, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=24, axes_dims=[4, 2, 6], axes_lens=[600, 8, 8],
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.ZImagePipeline(
        scheduler, tiny.autoencoder(scaling_factor=0.8, shift_factor=0.1), reader, tokenizer(),
        tiny.randomise(network, std=0.15),
    )  # fmt: skip


def drawn(pipe, **options):
    """Ours, of the same prompts and noise."""
    asked = {"steps": tiny.STEPS, "size": tuple(SIZE.values()), "noise": NOISE, **options}
    return pipe(tiny.KEY, tiny.PROMPTS, tiny.NEGATIVES, **asked)


def read(pipe, texts, length):
    """What ours makes of each text at this length: the states of its tokens."""
    with pytest.warns(Truncated, match="fox"):
        entries = pipe.prompts.tuned({"length": length}).encode(texts)
    pairs = zip(np.asarray(entries["text"]), np.asarray(entries["text_mask"]))
    return [text[mask] for text, mask in pairs]


def test_qwen_image_keeps_the_norm_of_each_patch(tmp_path):
    """At a scale at which an image without it is 14/255 off, and one kept as a whole 6/255."""
    theirs = qwen_image()
    asked = {"prompt": tiny.PROMPTS, "negative_prompt": tiny.NEGATIVES, "true_cfg_scale": 20.0}
    wanted = tiny.drawn(theirs, tiny.packed(NOISE), **asked, **SIZE)
    pipe = interop.load(tiny.saved(theirs, tmp_path))
    tiny.assert_same(drawn(pipe, guidance_scale=20.0), wanted)

    # Without a negative prompt diffusers does not guide; ours is the model's card's, " ".
    cond, null, weight = pipe.prompts.asked(["a fox"], None, (16, 24))
    given = pipe.prompts.asked(["a fox"], [" "], (16, 24))
    assert weight == 4.0
    np.testing.assert_array_equal(null["text"], given[1]["text"])
    assert pipe.prompts.asked(["a fox"], None, (16, 24), 1.0)[1:] == ({}, None)
    with pytest.raises(UserError, match="true_cfg_scale is guidance_scale="):
        drawn(pipe, true_cfg_scale=4.0)

    # A long text loses its end and the template's; of the template's beginning 34 tokens are gone.
    with torch.no_grad():
        text, mask = theirs.encode_prompt([LONG, "a fox"], max_sequence_length=150)
    for ours, row, seen in zip(read(pipe, [LONG, "a fox"], 150), text, mask.bool(), strict=True):
        assert distance(ours, row[seen]) < 1e-3


def test_z_images_guidance_counts_from_0(tmp_path):
    theirs = z_image()
    # theirs writes the template into the lists that it is given
    asked = lambda: {"prompt": [*tiny.PROMPTS], "negative_prompt": [*tiny.NEGATIVES], **SIZE}
    wanted = tiny.drawn(theirs, NOISE, guidance_scale=2.0, **asked())
    pipe = interop.load(tiny.saved(theirs, tmp_path))
    tiny.assert_same(drawn(pipe, guidance_scale=2.0), wanted)
    assert pipe.prompts.weight(0.0) is None and pipe.prompts.weight(2.0) == 3.0

    # Behind the truncation theirs is not normalised, either.
    options = {"guidance_scale": 2.0, "cfg_truncation": 0.4, "cfg_normalization": 0.8}
    other = tiny.drawn(theirs, NOISE, **options, **asked())
    assert np.abs(other - wanted).max() > 16 / 255
    tiny.assert_same(drawn(pipe, **options), other)

    texts = [LONG, "a fox"]
    with torch.no_grad():
        kept = theirs._encode_prompt([*texts], max_sequence_length=30)
    for ours, row in zip(read(pipe, texts, 30), kept, strict=True):
        assert distance(ours, row) < 1e-3
