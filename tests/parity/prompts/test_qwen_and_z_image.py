"""Qwen-Image and Z-Image as a whole: templates, masked texts, and their guidance."""

import numpy as np
import tiny_pipelines as tiny
from tiny_pipelines import diffusers, transformers

from jdiff import interop

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
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
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


def test_qwen_image_keeps_the_norm_of_each_patch(tmp_path):
    theirs, noise = qwen_image(), tiny.noise()
    asked = {"prompt": tiny.PROMPTS, "negative_prompt": tiny.NEGATIVES, "height": 16, "width": 16}
    wanted = tiny.drawn(theirs, tiny.packed(noise), **asked, true_cfg_scale=4.0)
    pipe = interop.load(tiny.saved(theirs, tmp_path))
    ours = pipe(
        tiny.KEY, tiny.PROMPTS, tiny.NEGATIVES, steps=tiny.STEPS, guidance_scale=4.0, size=16,
        noise=noise,
    )  # fmt: skip
    tiny.assert_same(ours, wanted)


def test_z_images_guidance_counts_from_0(tmp_path):
    theirs, noise = z_image(), tiny.noise()
    wanted = tiny.drawn(
        theirs, noise, prompt=list(tiny.PROMPTS), negative_prompt=list(tiny.NEGATIVES),
        guidance_scale=2.0, height=16, width=16,
    )  # fmt: skip
    pipe = interop.load(tiny.saved(theirs, tmp_path))
    ours = pipe(
        tiny.KEY, tiny.PROMPTS, tiny.NEGATIVES, steps=tiny.STEPS, guidance_scale=2.0, size=16,
        noise=noise,
    )  # fmt: skip
    tiny.assert_same(ours, wanted)
    assert pipe.prompts.weight(0.0) is None and pipe.prompts.weight(2.0) == 3.0
    assert np.asarray(pipe.prompts.encode(["a", "abc"])["text_mask"]).sum(1).tolist() == [20, 22]
