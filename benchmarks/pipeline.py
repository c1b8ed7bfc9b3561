"""What a pipeline by prompts costs over its networks: texts, bare calls, the decoder.

    python benchmarks/pipeline.py            # --quick: tiny, in seconds; its ratio means little

A narrow Stable Diffusion of random weights, with classifier-free guidance. The rival
encodes the same texts, calls the jitted U-Net on twice the batch as often as there are steps, and
decodes; it computes no image, as nothing leads from one call to the next. Limit 1.03.
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
from timing import race, table, verdict

from jdiff import interop, models
from jdiff.autoencoders import KL
from jdiff.models.cond_unet import CondUNet
from jdiff.texts.clip import ClipText

PROMPTS = ["a red fox in the snow", "a blue door", "two dogs and a bird", "the sea at night"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Widths of the networks, and what is drawn."""

    unet: tuple[int, ...] = (32, 64)
    coder: tuple[int, ...] = (16, 32)
    text: int = 64
    layers: int = 2
    groups: int = 8
    side: int = 32  # of the images, in pixels
    steps: int = 20


QUICK = Sizes((8, 8), (4, 4), 16, 1, 4, 16, 4)


def write(folder: pathlib.Path, s: Sizes) -> None:
    """A folder of the diffusers layout with random weights."""
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    parts = {
        "unet": ("UNet2DConditionModel", CondUNet, {
            "in_channels": 4, "widths": s.unet, "blocks": 1, "depths": (1,) * len(s.unet),
            "heads": (4,) * len(s.unet), "text_width": s.text, "groups": s.groups}),
        "vae": ("AutoencoderKL", KL, {"widths": s.coder, "blocks": 1, "groups": s.groups}),
        "text_encoder": ("CLIPTextModel", ClipText, {
            "vocab": len(tokens), "length": 77, "width": s.text, "depth": s.layers, "heads": 4,
            "hidden": 4 * s.text, "eos": len(tokens) - 1}),
    }  # fmt: skip
    for name, (cls, model, fields) in parts.items():
        _, params = models.init(
            lambda rngs, m=model, f=fields: m(**f, rngs=rngs), jax.random.key(0)
        )
        interop.save(interop.component(cls, params, **fields), folder / name)
    files = {
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False,
            "steps_offset": 1},
        "tokenizer/vocab.json": {token: i for i, token in enumerate(tokens)},
        "tokenizer/tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": 77,
            "bos_token": tokens[-2], "eos_token": tokens[-1], "unk_token": tokens[-1],
            "pad_token": tokens[-1]},
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            **{name: ["diffusers", cls] for name, (cls, *_) in parts.items()}},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="tiny networks, one round")
    p.add_argument("--rounds", type=int, default=5, help="repetitions, the best counts (default 5)")
    a = p.parse_args()
    s = QUICK if a.quick else Sizes()
    with tempfile.TemporaryDirectory() as name:
        write(pathlib.Path(name), s)
        pipe = interop.load(name)
        pipe.prompts  # noqa: B018, it reads the tokenizer
    unet, coder, batch = pipe.network, pipe.autoencoder, len(PROMPTS)
    bare = jax.jit(unet.apply)
    shape = coder.shape(s.side, s.side)
    x, t = jnp.zeros((2 * batch, *shape)), jnp.full((2 * batch,), 500.0)

    def calls() -> jax.Array:
        text = pipe.prompts.encode([*PROMPTS, ""])["text"]
        both = {"text": jnp.concatenate([text[:batch], jnp.repeat(text[batch:], batch, 0)])}
        for _ in range(s.steps):
            out = bare(unet.params, x, t, both)
        return coder.decode(out[:batch])

    draw = lambda: pipe(jax.random.key(1), PROMPTS, steps=s.steps, size=s.side)
    seconds = race({"calls": calls, "pipe": draw}, 1 if a.quick else a.rounds)
    ratio = seconds["pipe"] / seconds["calls"]
    row = ("pipe / (texts + bare calls + decoding)", f"{ratio:.3f}", "1.03", verdict(ratio, 1.03))
    count = sum(interop.parameters(part) for part in pipe.components.values())
    table(
        f"a pipeline of {count / 1e6:.1f} M parameters: {batch} images of {s.side} px, "
        f"{s.steps} steps",
        [row, ("pipe", f"{seconds['pipe']:.3f} s", "", "")],
    )


if __name__ == "__main__":
    main()
