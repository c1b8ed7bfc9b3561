"""A whole diffusers folder: prompts to images, by what its model_index.json names.

    pipe = interop.load("stable-diffusion-v1-5")
    images = pipe(key, ["a red fox"], steps=30)         # [1, 512, 512, 3] in [-1, 1]

gives what the diffusers pipeline gives from the same `noise`. It is made of the same parts as any
draw: conditions (`interop.prompts`: what texts become), a guided denoiser, `jdiff.sample` over it,
and an autoencoder. `pipe.latents` stops before the autoencoder decodes, and `pipe.sample` takes
conditions that are arrays, of any network that jdiff knows.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import denoisers, guidance
from jdiff.autoencoders import Autoencoder
from jdiff.batching import pieces
from jdiff.errors import UserError, choose
from jdiff.interop.latents import autoencoder
from jdiff.interop.loading import Component
from jdiff.interop.progress import shown
from jdiff.interop.prompts import BY_CLASS, Parts, Prompts, listed, paired, taken
from jdiff.interop.sampler import Sampler
from jdiff.pytree import Array, PyTree, noise_like
from jdiff.sampling import sample as draw
from jdiff.sampling import stream
from jdiff.schedules import Schedule
from jdiff.solvers import Solver

#: The names under which a pipeline has the network that is sampled from.
NETWORKS = ("transformer", "unet")


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """What `load` reads of a pipeline's folder.

    Attributes:
      components: the networks, by name: the one that is sampled from, autoencoder, text encoders.
      sampler: the scheduler, as ours.
      unread: folders of what jdiff does not read, by name.
      index: model_index.json.
      folder: where it was read.
    """

    components: Mapping[str, Component]
    sampler: Sampler
    unread: Mapping[str, pathlib.Path]
    index: Mapping[str, Any]
    folder: pathlib.Path = pathlib.Path()

    @property
    def name(self) -> str:
        """The name of the network that is sampled from, "unet" or "transformer"."""
        return next(name for name in NETWORKS if name in self.components)

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

    @cached_property
    def prompts(self) -> Prompts:
        """How this pipeline is asked: its text encoders, and what its guidance means.

        Raises:
          UserError: a class of pipelines that is not known, or a part that is missing.
        """
        where = f"{self.folder / 'model_index.json'}: _class_name"
        name = choose(where, self.index.get("_class_name", ""), BY_CLASS)
        return BY_CLASS[name].open(self._parts)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """What decodes the latents.

        Raises:
          UserError: the folder has none, it was not read, or its latents are another network's.
        """
        coder = autoencoder(self._parts.component("vae"))
        wanted = self.network.fields.get("in_channels", coder.channels)
        if coder.channels != wanted:
            raise UserError(
                f"{self.folder}: the latents of vae have {coder.channels} channels, those of "
                f"{self.name} {wanted}; the parts are of different models."
            )
        return coder

    def __call__(
        self, key: Array, prompts: str | Sequence[str],
        negative: str | Sequence[str] | None = None, *, batch: int | None = None,
        sharding: jax.sharding.Sharding | None = None, progress: Any = None, **options: Any,
    ) -> Array:  # fmt: skip
        """Images float32 `[len(prompts) * num, H, W, 3]` in [-1, 1], a prompt's together.

        Args:
          key: one key for the whole draw; image i depends on it, on i and on its prompt alone.
          prompts: what is to be drawn.
          negative: what to guide away from: one for all, or one a prompt.
          batch: images at a time; all at once unless given.
          sharding: how the images of a batch are laid out over devices.
          progress: True, or a rich console: shows how many are drawn.
          **options: of `latents`: steps, guidance_scale, size, num, noise, solver, grid, ...

        Raises:
          UserError: as `latents`; a folder without an autoencoder.

        >>> images = pipe(key, ["a red fox", "a blue door"], steps=30, num=4, batch=4)
        """
        how = {"batch": batch, "sharding": sharding}
        latents = self.latents(key, prompts, negative, progress=progress, **how, **options)
        return _decoded(self.autoencoder, latents, **how)

    def latents(
        self, key: Array, prompts: str | Sequence[str],
        negative: str | Sequence[str] | None = None, *, steps: int | None = None,
        guidance_scale: float | None = None, size: int | tuple[int, int] | None = None,
        num: int = 1, noise: Array | None = None, latents: Array | None = None,
        start: float = 0.0, end: float = 1.0, solver: Solver | None = None,
        grid: Callable[..., Array] | None = None, guide: Callable[[Any], Any] | None = None,
        batch: int | None = None, sharding: jax.sharding.Sharding | None = None,
        progress: Any = None, texts: Mapping[str, Any] | None = None, **options: Any,
    ) -> Array:  # fmt: skip
        """What is decoded to the images: latents `[len(prompts) * num, H / f, W / f, C]`.

        Args:
          key, prompts, negative, batch, sharding, progress: as of the pipeline's call.
          steps: solver steps; the family's usual number unless given.
          guidance_scale: as diffusers counts it for this family; its usual one unless given.
          size: (H, W) of the images in pixels, or one number for both; the network's unless given.
          num: images a prompt.
          noise: standard normal `[N, h, w, C]` to start from (diffusers' `latents`); drawn from the
            key unless given.
          latents: the state at `start` of another draw, in place of noise.
          start, end: the share of the way from noise to data where this draw begins and stops:
            diffusers' denoising_start and denoising_end.
          solver: any of jdiff's, in place of the scheduler's.
          grid: (schedule, n) -> times, any of `jdiff.grids`, in place of the scheduler's.
          guide: any guidance around the family's own, e.g. `lambda d: guidance.rescale(d, 0.7)`.
          texts: of its encoders: "length" (tokens), "weights" ((word:1.3)), "chunks" (long texts).
          **options: of the family (`interop.prompts`): sizes and crops of SDXL, true_cfg_scale.

        Raises:
          UserError: prompts that are no texts, negative ones of another number, a size that the
            network or the autoencoder cannot divide, an option that the family has not, and what
            `jdiff.sample` refuses.
        """
        prompts = listed(prompts)
        family = self.prompts.tuned(texts or {})
        family.check(options)
        height, width, channels = self._latent_shape(size)
        factor = self.autoencoder.factor
        cond, null, weight = family.asked(
            prompts, paired(negative, len(prompts)), (height * factor, width * factor),
            guidance_scale, **options,
        )  # fmt: skip
        away = {name: guidance.per_sample(f"null {name}") for name in null}
        cond |= {f"null {name}": value for name, value in null.items()}
        guided = lambda denoise: denoise if guide is None else guide(denoise)
        if null:
            own = lambda denoise: guided(family.guide(denoise, **options))
            denoise = self.denoiser(own, scale=weight, null=away)
        else:
            denoise = self.denoiser(guided)

        steps = family.steps if steps is None else steps
        times = self._times(steps, (height // 2) * (width // 2), grid)
        if latents is None:
            number = len(prompts) * num
            noise = _noise(key, number, (height, width, channels)) if noise is None else noise
            latents = _started(self.sampler, noise, times)
        rows = np.repeat(np.arange(len(prompts)), num)
        parts = stream(
            key, denoise, cond=taken(cond, rows), x=latents, batch=batch, sharding=sharding,
            times=between(times, self.sampler.schedule, start, end),
            solver=self.sampler.solver if solver is None else solver,
        )  # fmt: skip
        return jnp.concatenate(list(shown(parts, progress, len(prompts) * num)))

    @cached_property
    def _patch(self) -> int:
        """What divides a side of the latents: patches, or a U-Net's levels."""
        network = self.network.apply.skeleton()
        return getattr(network, "multiple", None) or getattr(network, "patch", 1)

    @property
    def _parts(self) -> Parts:
        return Parts(self.folder, self.index, self.components, self.network)

    def _times(self, steps: int, tokens: int, grid: Callable[..., Array] | None) -> Array:
        if grid is not None:
            return grid(self.sampler.schedule, steps)
        return self.sampler.times(steps, tokens=tokens)

    def _latent_shape(self, size: int | tuple[int, int] | None) -> tuple[int, int, int]:
        """(h, w, C) of images of this size in pixels.

        Raises:
          UserError: a side that factor and patches do not divide, with the nearest that they do.
        """
        coder, patch = self.autoencoder, self._patch
        if size is None:
            return self.prompts.side, self.prompts.side, coder.channels
        sides = (size, size) if isinstance(size, int) else tuple(size)
        unit = coder.factor * patch
        if any(side < unit or side % unit for side in sides):
            nearest = " x ".join(str(max(unit, unit * round(side / unit))) for side in sides)
            raise UserError(
                f"size={' x '.join(map(str, sides))}: sides are multiples of {unit} here (the "
                f"autoencoder's {coder.factor}, the network's {patch}); the nearest: {nearest}."
            )
        return sides[0] // coder.factor, sides[1] // coder.factor, coder.channels

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
            noise = _noise(key, num, tuple(self.shape() if shape is None else shape))
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


@partial(jax.jit, static_argnums=(1, 2))
def _noise(key: Array, num: int, shape: tuple[int, ...]) -> Array:
    """As `jdiff.sample` draws it: sample i from its own key."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num))
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
    return noise_like(keys, jax.ShapeDtypeStruct((num, *shape), jnp.result_type(float)))


@jax.jit
def _started(sampler: Sampler, noise: Array, times: Array) -> Array:
    return sampler.start(noise, times)


def between(times: Array, schedule: Schedule, start: float, end: float) -> Array:
    """The times of a share of the way from noise to data: diffusers' denoising_start and _end.

    A step belongs to the part in which it starts, so that the parts of one grid follow each other.

    Raises:
      UserError: shares that are not 0 <= start < end <= 1, or a part without a step.
    """
    if not 0 <= start < end <= 1:
        raise UserError(f"start={start}, end={end} given; 0 <= start < end <= 1 is needed.")
    if schedule.T:
        place, line = np.asarray(times) - 1.0, lambda share: round((1 - share) * schedule.T)
    else:
        place, line = np.asarray(times), lambda share: (1 - share) * float(schedule.t_max)
    count = lambda share: int((place[:-1] >= line(share)).sum())
    first = count(start) if start > 0 else 0
    last = count(end) if end < 1 else len(times) - 1
    if first >= last:
        raise UserError(f"no step of {len(times) - 1} starts from start={start} to end={end}.")
    return times[first : last + 1]


def _decoded(
    coder: Autoencoder, latents: Array, batch: int | None, sharding: jax.sharding.Sharding | None
) -> Array:
    """Images in [-1, 1], a batch at a time; the last one is padded, not compiled anew."""
    parts = pieces(latents, len(latents), batch or len(latents), sharding)
    images = jnp.concatenate([coder.decode(rows)[:keep] for keep, rows in parts])
    return jnp.clip(images.astype(jnp.float32), -1.0, 1.0)
