"""A whole diffusers folder: the networks and the scheduler that its model_index.json names.

    pipeline = interop.load("stable-diffusion-v1-5")
    latents = pipeline.sample(key, {"text": states}, null={"text": empty}, scale=7.5, steps=30)

gives what the diffusers pipeline does before its autoencoder decodes: from the same `noise`, the
same latents. Texts and images are not encoded here: conditions are arrays (see `jdiff.models`), and
the folders that jdiff does not read (text encoders, autoencoders) are named in `unread`.
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jdiff import denoisers, guidance
from jdiff.errors import UserError, choose
from jdiff.interop import loading, schedulers
from jdiff.interop.families import BY_CLASS
from jdiff.interop.loading import Component
from jdiff.interop.sampler import Sampler
from jdiff.pytree import Array, PyTree, noise_like
from jdiff.sampling import sample as draw

#: The names under which a pipeline has the network that is sampled from.
_NETWORKS = ("transformer", "unet")


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """What `load` reads of a pipeline's folder.

    Attributes:
      components: the networks, by name.
      sampler: the scheduler, as ours.
      unread: folders of what jdiff does not read, by name.
      index: model_index.json.
    """

    components: Mapping[str, Component]
    sampler: Sampler
    unread: Mapping[str, pathlib.Path]
    index: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of the network that is sampled from, "unet" or "transformer"."""
        return next(name for name in _NETWORKS if name in self.components)

    @property
    def network(self) -> Component:
        """The network that is sampled from."""
        return self.components[self.name]

    def replace(self, params: PyTree) -> "Pipeline":
        """The same pipeline with other weights of its network, e.g. trained ones."""
        changed = {**self.components, self.name: self.network.replace(params)}
        return dataclasses.replace(self, components=changed)

    def denoiser(
        self, guide: Callable[[Any], Any] | None = None, *,
        scale: Array | float = 1.0, null: dict[str, PyTree] | None = None,
    ) -> Any:  # fmt: skip
        """The network as a denoiser (x `[B, H, W, C]`, t `[B]`, cond) -> Prediction, guided.

        Args:
          guide: any guidance, denoiser -> denoiser; with `null` it is applied to what
            classifier-free guidance gives, e.g. `lambda d: guidance.rescale(d, 0.7)`.
          scale: of classifier-free guidance: null + scale (conditional - null). Z-Image's pipeline
            counts from 0: its guidance_scale is scale - 1.
          null: the conditions that mean none, or a negative prompt's, e.g. {"text": `[L, D]`}.

        Raises:
          UserError: a scale without a null.
        """
        told = self.sampler.parameterization
        given = self.network.config
        if given.get("out_channels") == 2 * given.get("in_channels", 0):  # a learned variance
            told = dataclasses.replace(told, variance="learned_range")
        network = self.network
        denoise = denoisers.network(network.apply, network.params, self.sampler.schedule, told)
        if null is not None:
            denoise = guidance.cfg(denoise, scale, null)
        elif not isinstance(scale, float | int) or scale != 1:
            raise UserError(
                f"Pipeline: scale={scale} needs null=, the conditions that mean none, e.g. "
                '{"text": states of the empty prompt}.'
            )
        return self.sampler.denoiser(denoise if guide is None else guide(denoise))

    def sample(
        self, key: Array, cond: PyTree = None, *, steps: int = 50,
        shape: tuple[int, int, int] | None = None, scale: Array | float = 1.0,
        null: dict[str, PyTree] | None = None, guide: Callable[[Any], Any] | None = None,
        noise: Array | None = None, num: int | None = None, **options: Any,
    ) -> Array:  # fmt: skip
        """Samples `[num, H, W, C]`, as the diffusers pipeline draws its latents.

        Args:
          key: one key for the whole draw; sample i depends on it and i alone.
          cond: the conditions, `[num, ...]` each, as the network names them.
          steps: num_inference_steps.
          shape: (H, W, C) of one sample; the config's sample_size unless given.
          scale, null, guide: as for `denoiser`.
          noise: standard normal `[num, H, W, C]` to start from (diffusers' `latents`); drawn unless
            given.
          num: how many, where neither cond nor noise says.
          **options: of `jdiff.sample`: batch, sharding, observe, solver, ...

        Raises:
          UserError: a network that has no size of its own without a shape, and what
            `jdiff.sample` and `denoiser` refuse.

        >>> pipeline.sample(key, {"label": labels}, null={"label": 1000}, scale=4.0)
        """
        if noise is None:
            leaves = jax.tree.leaves(cond)
            num = num or (len(leaves[0]) if leaves else 1)
            noise = _noise(key, num, self.shape() if shape is None else shape)
        height, width = noise.shape[1:3]
        times = self.sampler.times(steps, tokens=(height // 2) * (width // 2))
        return draw(
            key, self.denoiser(guide, scale=scale, null=null), cond=cond, times=times,
            x=self.sampler.start(noise, times), **{"solver": self.sampler.solver, **options},
        )  # fmt: skip

    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one sample, by the network's config.

        Raises:
          UserError: the config has no sample_size.
        """
        config = self.network.config
        size = config.get("sample_size")
        # More in than out: images beside x; more out than in: a variance beside the prediction.
        counts = [config[key] for key in ("in_channels", "out_channels") if config.get(key)]
        if size is None or not counts:
            raise UserError(
                f"Pipeline: the config of {self.name} has no sample_size; give "
                "shape=(height, width, channels) of the latents."
            )
        height, width = (size, size) if isinstance(size, int) else size
        return height, width, min(counts)


def load(folder: str | pathlib.Path, **options: Any) -> Pipeline | Component:
    """Opens a local diffusers folder: a whole pipeline's, or one component's.

    Args:
      folder: with a model_index.json, or with a config.json.
      **options: of `load_component`, for each network: variant, dtype, sharding, compute, ...

    Raises:
      UserError: neither file, no network that jdiff knows, or what `load_component` and
        `schedulers.from_config` refuse.

    >>> pipeline = interop.load("stable-diffusion-v1-5", variant="fp16", compute="bfloat16")
    """
    folder = pathlib.Path(folder)
    path = folder / "model_index.json"
    if not path.is_file():
        if (folder / "config.json").is_file():
            return loading.load_component(folder, **options)
        raise UserError(
            f"{folder} has neither a model_index.json (a pipeline) nor a config.json (a component)."
        )
    index = json.loads(path.read_text())
    named = {name: entry[1] for name, entry in index.items() if _is_component(entry)}
    known = {name: cls for name, cls in named.items() if cls in BY_CLASS}
    if not any(name in known for name in _NETWORKS):
        given = next((named[name] for name in _NETWORKS if name in named), None)
        if given is None:
            raise UserError(f"{path} names neither a unet nor a transformer.")
        choose(f"{path}: network", given, BY_CLASS)
    if "scheduler" not in named:
        raise UserError(f"{path} names no scheduler; load the component's folder instead.")
    components = {name: loading.load_component(folder / name, **options) for name in known}
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    network = next(known[name] for name in _NETWORKS if name in known)
    others = {name: folder / name for name in named if name not in {*known, "scheduler"}}
    unread = {name: path for name, path in others.items() if path.is_dir()}
    return Pipeline(components, schedulers.from_config(config, network), unread, index)


def save(what: Pipeline | Component, folder: str | pathlib.Path, **options: Any) -> None:
    """Writes a pipeline or a component in the layout that it was read from.

    What was not read is copied from where it lies.

    Args:
      **options: of `save_component`, for each network: variant, dtype, shard_bytes.

    Raises:
      UserError: a sampler that was changed since (`schedulers.to_config`).
    """
    folder = pathlib.Path(folder)
    if isinstance(what, Component):
        loading.save_component(what, folder, **options)
        return
    config = schedulers.to_config(what.sampler)
    for name, component in what.components.items():
        loading.save_component(component, folder / name, **options)
    _write(folder / "scheduler" / "scheduler_config.json", config)
    for name, source in what.unread.items():
        if source.resolve() != (folder / name).resolve():
            shutil.copytree(source, folder / name, dirs_exist_ok=True)
    _write(folder / "model_index.json", what.index)


def _is_component(entry: Any) -> bool:
    """A pair (library, class); a component that a pipeline goes without is a pair of nulls."""
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)


def _noise(key: Array, num: int, shape: tuple[int, ...]) -> Array:
    """As `jdiff.sample` draws it: sample i from its own key."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num))
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
    return noise_like(keys, jax.ShapeDtypeStruct((num, *shape), jnp.result_type(float)))


def _write(path: pathlib.Path, config: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(config), indent=2) + "\n")
