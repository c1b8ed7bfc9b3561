"""A small image classifier, trained in seconds on a real training split.

It judges conditional samples (does it find the intended class?) and gives features and class
probabilities suited to the data at hand, which ImageNet networks do not for 8x8 digits.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdiff.evaluation.features import Extractor, check_images, over_devices

DIM = 128
_WIDTHS = (32, 64, 64)
_BATCH = 256  # images a call outside training


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A trained network: `probabilities` and penultimate `features` of uint8 images `[N, H, W, C]`.

    Attributes:
      params: name to array; the leaves decide every shape.
      shape: (H, W, C) of an image.
      num_classes: of the data set.
    """

    params: dict[str, jax.Array]
    shape: tuple[int, int, int]
    num_classes: int

    @property
    def features(self) -> Extractor:
        """The 128 penultimate activations, as an extractor named "classifier"."""
        return self._extractor("classifier", DIM, _features)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Class probabilities `[N, num_classes]`."""
        return self._extractor("probabilities", self.num_classes, _probabilities)(images)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """The most probable class of each image, int64 `[N]`."""
        return self.probabilities(images).argmax(-1)

    def save(self, path: str | pathlib.Path) -> None:
        """Writes the weights as safetensors."""
        from safetensors.numpy import save_file

        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        meta = {"shape": ",".join(map(str, self.shape)), "num_classes": str(self.num_classes)}
        save_file({k: np.asarray(v) for k, v in self.params.items()}, partial, meta)
        partial.replace(path)

    def _extractor(self, name: str, dim: int, compute) -> Extractor:
        extract = over_devices(name, dim, compute, self.params, _BATCH)

        def call(images):
            if images.shape[1:] != self.shape:
                raise ValueError(
                    f"the classifier was trained on images {self.shape}, got {images.shape[1:]}"
                )
            return extract.function(images)

        return dataclasses.replace(extract, function=call)


def load(path: str | pathlib.Path) -> Classifier:
    """Reads what `Classifier.save` wrote. Raises ValueError for another or a truncated file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            meta = file.metadata() or {}
            params = {name: jnp.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        shape = tuple(int(n) for n in meta["shape"].split(","))
        return Classifier(params, shape, int(meta["num_classes"]))
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: not a saved classifier; delete it to train anew") from error


def train(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int | None = None,
    seed: int = 0,
    steps: int = 600,
    batch: int = 64,
    path: str | pathlib.Path | None = None,
) -> Classifier:
    """Trains on uint8 images `[N, H, W, C]` with int labels `[N]`; deterministic in `seed`.

    Adam with a one-cycle rate, label smoothing 0.05, and shifts by up to an eighth of the image.
    With `path` the result is saved there, and read instead of trained if it is there already.
    Raises ValueError for data that do not fit together, or a saved classifier of other images.
    """
    images, labels = check_images(images), np.asarray(labels)
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels {labels.dtype} {labels.shape} for {len(images)} images: int [N] expected"
        )
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels span {labels.min()}..{labels.max()}: 0..{classes - 1} allowed")
    if path is not None and pathlib.Path(path).is_file():
        found = load(path)
        if (found.shape, found.num_classes) != (images.shape[1:], classes):
            raise ValueError(
                f"{path}: a classifier of {found.num_classes} classes of images {found.shape}, "
                f"but the data have {classes} of {images.shape[1:]}; delete it to train anew"
            )
        return found
    params = _fit(
        jax.random.key(seed), jnp.asarray(images), jnp.asarray(labels), classes, steps, batch
    )
    trained = Classifier(params, images.shape[1:], classes)
    if path is not None:
        trained.save(path)
    return trained


def _init(key: jax.Array, shape: tuple[int, int, int], classes: int) -> dict[str, jax.Array]:
    params, inputs = {}, shape[-1]
    keys = iter(jax.random.split(key, len(_WIDTHS) + 2))
    he = jax.nn.initializers.he_normal()
    for i, width in enumerate(_WIDTHS):
        params[f"conv{i}.kernel"] = he(next(keys), (9 * inputs, width))
        params[f"conv{i}.bias"] = jnp.zeros(width)
        inputs = width
    flat = jax.eval_shape(
        functools.partial(_convolve, params), jax.ShapeDtypeStruct((1, *shape), "uint8")
    )
    params["dense.kernel"] = he(next(keys), (flat.shape[-1], DIM))
    params["dense.bias"] = jnp.zeros(DIM)
    params["head.kernel"] = jax.random.normal(next(keys), (DIM, classes)) / np.sqrt(DIM)
    params["head.bias"] = jnp.zeros(classes)
    return params


def _convolve(params: dict, images: jax.Array) -> jax.Array:
    x = images.astype(jnp.float32) / 127.5 - 1
    for i in range(len(_WIDTHS)):
        # A convolution as one matrix product: much the faster on CPU for such small images.
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        _, h, w, _ = x.shape
        around = [padded[:, r : r + h, c : c + w] for r in range(3) for c in range(3)]
        x = jnp.concatenate(around, -1) @ params[f"conv{i}.kernel"]
        x = jax.nn.relu(x + params[f"conv{i}.bias"])
        # The last maps keep about 4 x 4 places: where a stroke lies tells digits apart.
        if min(x.shape[1:3]) > 4:
            x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(-1, h // 2, 2, w // 2, 2, x.shape[-1])
            x = x.max((2, 4))
    return x.reshape(x.shape[0], -1)


@jax.jit
def _features(params: dict, images: jax.Array) -> jax.Array:
    return jax.nn.relu(_convolve(params, images) @ params["dense.kernel"] + params["dense.bias"])


def _logits(params: dict, features: jax.Array) -> jax.Array:
    return features @ params["head.kernel"] + params["head.bias"]


@jax.jit
def _probabilities(params: dict, images: jax.Array) -> jax.Array:
    return jax.nn.softmax(_logits(params, _features(params, images)))


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _fit(key, images, labels, classes: int, steps: int, batch: int) -> dict[str, jax.Array]:
    import optax

    init_key, key = jax.random.split(key)
    params = _init(init_key, images.shape[1:], classes)
    optimizer = optax.adam(optax.schedules.cosine_onecycle_schedule(steps, 3e-3))
    reach = max(1, images.shape[1] // 8)

    def shifted(key, image):
        padding = ((reach, reach), (reach, reach), (0, 0))
        offset = jax.random.randint(key, (2,), 0, 2 * reach + 1)
        return lax.dynamic_slice(jnp.pad(image, padding, mode="edge"), (*offset, 0), image.shape)

    def loss(params, key):
        pick_key, shift_key, drop_key = jax.random.split(key, 3)
        picked = jax.random.randint(pick_key, (batch,), 0, len(images))
        x = jax.vmap(shifted)(jax.random.split(shift_key, batch), images[picked])
        f = _features(params, x)
        f = jnp.where(jax.random.bernoulli(drop_key, 0.7, f.shape), f / 0.7, 0)
        target = optax.smooth_labels(jax.nn.one_hot(labels[picked], classes), 0.05)
        return optax.softmax_cross_entropy(_logits(params, f), target).mean()

    def step(carry, key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    start = (params, optimizer.init(params))
    (params, _), _ = lax.scan(step, start, jax.random.split(key, steps))
    return params
