"""Feature extractors: the spaces in which images are compared."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.errors import choose
from jdiff.pytree import PyTree

NAMES = ("classifier", "inception", "pixels", "resnet50")


@dataclasses.dataclass(frozen=True)
class Extractor:
    """Maps uint8 images `[N, H, W, C]` to float32 features `[N, dim]`; any N is one compilation.

    Attributes:
      name: printed beside every figure that was measured in this space.
      dim: number of features.
      function: a batch of `batch` uint8 images to its features `[batch, dim]`.
      batch: images a call; the last call is padded.
    """

    name: str
    dim: int
    function: Callable[[np.ndarray], jax.Array]
    batch: int = 64

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Raises ValueError for other than uint8 `[N, H, W, C]`, or a function of another dim."""
        images = check_images(images)
        rows = [np.zeros((0, self.dim), np.float32)]
        for part in _padded(images, self.batch):
            out = np.asarray(self.function(part), np.float32)
            if out.shape != (self.batch, self.dim):
                raise ValueError(
                    f"features {self.name!r} have shape {out.shape} for {self.batch} images: "
                    f"{(self.batch, self.dim)} expected"
                )
            rows.append(out)
        return np.concatenate(rows)[: len(images)]


def pixels(shape: tuple[int, int, int]) -> Extractor:
    """The pixels themselves, flattened, in [-1, 1], of images `shape` = (H, W, C)."""
    dim = int(np.prod(shape))
    return Extractor("pixels", dim, lambda x: x.reshape(len(x), -1) / np.float32(127.5) - 1, 256)


def inception(path: str | pathlib.Path | None = None) -> Extractor:
    """The standard FID's InceptionV3, 2048 features; weights of `jdiff prepare fid`."""
    from jdiff.evaluation import inception as network

    params = network.load(path or _prepared("fid"))
    return over_devices("inception", network.DIM, network.features, params, _batch())


def resnet50(path: str | pathlib.Path | None = None) -> Extractor:
    """Keras' ImageNet ResNet50, 2048 features; weights of `jdiff prepare resnet50`."""
    from jdiff.evaluation import resnet50 as network

    params = network.load(path or _prepared("resnet50"))
    return over_devices("resnet50", network.DIM, network.features, params, _batch())


def function(name: str, dim: int, compute: Callable[[jax.Array], jax.Array]) -> Extractor:
    """A user's jax function from uint8 images `[B, H, W, C]` to features `[B, dim]`."""
    return over_devices(name, dim, lambda _, images: compute(images), (), 64)


def over_devices(
    name: str, dim: int, compute: Callable[[PyTree, jax.Array], jax.Array], params: PyTree,
    batch: int,
) -> Extractor:  # fmt: skip
    """An extractor of a network `compute(params, images)`: this process's devices share a batch.

    Each has all of the params. The batch is rounded up to a multiple of the devices.
    """
    devices = jax.local_devices()
    mesh = jax.sharding.Mesh(np.asarray(devices), ("images",))
    split, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P("images"), jax.P()))
    params = jax.device_put(params, whole)
    compute = jax.jit(compute)
    batch = -(-batch // len(devices)) * len(devices)
    return Extractor(name, dim, lambda x: compute(params, jax.device_put(x, split)), batch)


def named(
    name: str,
    shape: tuple[int, int, int],
    *,
    classifier: Callable[[], Extractor] | None = None,
    path: str | pathlib.Path | None = None,
) -> Extractor:
    """The extractor called `name` for images `shape`; `classifier` makes the one of that name.

    Raises UserError for an unknown name, FileNotFoundError for weights that are not prepared.
    """
    allowed = NAMES if classifier is not None else tuple(n for n in NAMES if n != "classifier")
    choose("features", name, allowed)
    if name == "classifier":
        return classifier()
    if name == "pixels":
        return pixels(shape)
    return {"inception": inception, "resnet50": resnet50}[name](path)


def extract(
    extractor: Callable[[np.ndarray], np.ndarray], batches: Iterable[np.ndarray]
) -> Iterator[np.ndarray]:
    """Features `[B, dim]` of each batch of uint8 images, one batch at a time."""
    for images in batches:
        yield extractor(images)


def to_uint8(x: jax.Array) -> jax.Array:
    """Images in [-1, 1] as uint8: x * 127.5 + 128, clipped and truncated, as EDM does.

    The one conversion of jdiff; truncation after + 128 is rounding of x * 127.5 + 127.5.
    """
    return jnp.clip(x * 127.5 + 128, 0, 255).astype(jnp.uint8)


def check_images(images: np.ndarray) -> np.ndarray:
    """Returns them as a numpy array; raises ValueError unless uint8 `[N, H, W, C]`."""
    images = np.asarray(images)
    if images.dtype != np.uint8:
        hint = "; convert with to_uint8" if np.issubdtype(images.dtype, np.floating) else ""
        raise ValueError(f"images have dtype {images.dtype}: uint8 expected{hint}")
    if images.ndim != 4:
        raise ValueError(f"images have shape {images.shape}: [N, H, W, C] expected")
    return images


def _padded(images: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        missing = batch - len(part)
        yield np.pad(part, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else part


def _batch() -> int:
    """Images at a time of an ImageNet network; simulated devices share one CPU."""
    return 8 if jax.default_backend() == "cpu" else 128 * jax.local_device_count()


def _prepared(name: str) -> pathlib.Path:
    from jdiff.data import prepare

    return prepare.location(name)
