"""A Stable Diffusion of random weights, written without torch: 16 x 16 images of 8 x 8 latents."""

import json

import jax
import made_tokenizers as made
import numpy as np

from jdiff import interop, models
from jdiff.autoencoders.kl import KL
from jdiff.models.cond_unet import CondUNet
from jdiff.texts.clip import ClipText

SCHEDULER = {
    "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False,
    "steps_offset": 1,
}  # fmt: skip
PARTS = {
    "unet": (
        "UNet2DConditionModel", CondUNet,
        {"widths": (8,), "blocks": 1, "depths": (1,), "heads": (2,), "text_width": 12, "groups": 4,
         "in_channels": 4},
    ),
    "vae": ("AutoencoderKL", KL, {"widths": (4, 4), "blocks": 1, "groups": 2}),
    "text_encoder": (
        "CLIPTextModel", ClipText,
        {"vocab": 600, "length": 77, "width": 12, "depth": 1, "heads": 2, "hidden": 16, "eos": 586},
    ),
}  # fmt: skip


def write(folder):
    """Writes it, and returns the folder."""
    random = np.random.default_rng(0)
    index = {"_class_name": "StableDiffusionPipeline", "safety_checker": [None, None]}
    for name, (cls, model, fields) in PARTS.items():
        _, params = models.init(
            lambda rngs, m=model, f=fields: m(**f, rngs=rngs), jax.random.key(0)
        )
        params = jax.tree.map(
            lambda w: np.asarray(w) + 0.2 * random.standard_normal(w.shape, np.float32), params
        )
        interop.save(interop.component(cls, params, **fields), folder / name)
        index[name] = ["transformers" if name == "text_encoder" else "diffusers", cls]
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 8}))
    made.clip(folder / "tokenizer")
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"scheduler": ["diffusers", "DDIMScheduler"]}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
