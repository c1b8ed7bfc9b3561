"""Reading and writing the ecosystem's checkpoints: the diffusers layout, without torch.

    unet = interop.load("stable-diffusion/unet")           # one component
    pipe = interop.load("stable-diffusion")                # a whole folder
    images = pipe(jax.random.key(0), ["a red fox"])

Who may live here: files (safetensors), tables (which tensor is which), families (one table a class
of networks), schedulers (their configs as our schedules, grids and solvers), pipelines.
"""

from jdiff.interop.folder import load, save
from jdiff.interop.latents import autoencoder, autoencoder_component
from jdiff.interop.loading import (
    Component,
    component,
    load_component,
    load_file,
    parameters,
    save_component,
)
from jdiff.interop.pipeline import Pipeline
from jdiff.interop.sampler import Sampler
from jdiff.interop.text_encoders import text_encoder

__all__ = [
    "Component",
    "Pipeline",
    "Sampler",
    "autoencoder",
    "autoencoder_component",
    "component",
    "load",
    "load_component",
    "load_file",
    "parameters",
    "save",
    "save_component",
    "text_encoder",
]
