"""Parts of tiny pipelines: random weights, and tokenizers of a few hundred tokens."""

import pathlib
import string
from typing import Any

import jax
import numpy as np
from checkpoints import channels_first, images, randomise
from peers import peer

from jdiff import interop

torch = peer("torch")
diffusers = peer("diffusers")
transformers = peer("transformers")
torch.set_num_threads(1)

STEPS = 10
KEY = jax.random.key(0)
PROMPTS = ["a red fox", "Two small houses, by night"]
NEGATIVES = ["blurred", ""]
LENGTH = 24  # of CLIP's texts


def noise(side: int = 8, channels: int = 4, seed: int = 7) -> np.ndarray:
    """One latent noise `[2, side, side, channels]` for both prompts: what differs is the text."""
    return np.repeat(images(1, side, side, channels, seed=seed), 2, 0)


def clip_tokenizer() -> Any:
    """Bytes and their ends of words, with two merges."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges = [("r", "e"), ("re", "d</w>")]
    pieces = [*letters, *(f"{c}</w>" for c in letters), *("".join(pair) for pair in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, model_max_length=LENGTH
    )


def clip(kind: str = "CLIPTextModel", width: int = 12, projection: int = 10) -> Any:
    """Two layers; the end of a text is the last token of the vocabulary, 515."""
    config = transformers.CLIPTextConfig(
        vocab_size=516, hidden_size=width, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=LENGTH, projection_dim=projection,
        bos_token_id=514, eos_token_id=515, pad_token_id=515,
    )  # fmt: skip
    return randomise(getattr(transformers, kind)(config), seed=width, std=0.3)


def t5_tokenizer() -> Any:
    """Letters, with and without the mark of a word's start."""
    letters = string.ascii_letters + string.digits + ",.!?"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -2.5)]
    pieces += [(c, -3.0 - 0.01 * i) for i, c in enumerate(letters)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def t5(width: int = 24) -> Any:
    """Two layers of an encoder as of T5 1.1."""
    config = transformers.T5Config(
        vocab_size=80, d_model=width, d_kv=6, d_ff=16, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", is_gated_act=True, dense_act_fn="gelu_new",
    )  # fmt: skip
    return randomise(transformers.T5EncoderModel(config), seed=3, std=0.2)


def autoencoder(channels: int = 4, **config: Any) -> Any:
    """A factor of 2, and images that use most of their range."""
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, latent_channels=channels, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16, **config,
    )  # fmt: skip
    return randomise(vae, seed=5, std=0.25)


def packed(start: np.ndarray, patch: int = 2) -> Any:
    """Noise `[B, h, w, C]` as FLUX's pipeline and Qwen-Image's have it: patches in a row."""
    batch, height, width, channels = start.shape
    cut = start.reshape(batch, height // patch, patch, width // patch, patch, channels)
    cut = cut.transpose(0, 1, 3, 5, 2, 4)
    return torch.tensor(cut.reshape(batch, -1, channels * patch**2))


def drawn(pipeline: Any, latents: Any, **options: Any) -> Any:
    """What diffusers draws from this noise, `[2, H, W, 3]` in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    latents = channels_first(latents) if isinstance(latents, np.ndarray) else latents
    fixed = {"num_inference_steps": STEPS, "latents": latents, "output_type": "np"}
    with torch.no_grad():
        return pipeline(**fixed | options).images


def assert_same(ours: Any, theirs: np.ndarray) -> None:
    """Within 2/255 everywhere, of images that are no plain grey and tell the prompts apart."""
    ours = np.clip(np.asarray(ours, np.float32) / 2 + 0.5, 0, 1)
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.05 and np.abs(theirs[0] - theirs[1]).max() > 8 / 255
    assert np.abs(ours - theirs).max() < 2 / 255


def assert_as_near_in_half(
    pipeline: Any, folder: pathlib.Path, start: np.ndarray, latents: Any, asked: dict[str, Any],
    ours: dict[str, Any],
) -> None:  # fmt: skip
    """In bfloat16 our image is about as near to that of float32 as diffusers' own in bfloat16.

    Args:
      pipeline: diffusers', in float32; changed to bfloat16.
      folder: to save it in.
      start: the noise for us.
      latents: the same for diffusers.
      asked: of its call.
      ours: of our call.
    """
    latents = torch.tensor(np.asarray(latents))
    wanted = drawn(pipeline, latents, **asked)
    pipe = interop.load(saved(pipeline, folder), dtype="bfloat16", compute="bfloat16")
    half = drawn(pipeline.to(torch.bfloat16), latents.to(torch.bfloat16), **asked)
    found = np.clip(np.asarray(pipe(KEY, PROMPTS, noise=start, **ours), np.float32) / 2 + 0.5, 0, 1)
    error = lambda images: np.sqrt(np.mean((images - wanted) ** 2))
    assert 1e-4 < error(found) < 1.5 * error(half)  # and not float32 in secret


def saved(pipeline: Any, folder: pathlib.Path) -> pathlib.Path:
    """The pipeline's folder."""
    pipeline.save_pretrained(folder)
    return folder
