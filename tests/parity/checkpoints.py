"""What the parity tests of networks share: random weights, files on disk, distances."""

import pathlib
import re

import jax
import numpy as np

from jdiff.interop import files, loading, tables
from jdiff.models.functional import flatten


def randomise(network, seed: int = 0, std: float = 0.1):
    """A torch network whose weights are all random, those of its norms around 1.

    As initialised, its zeros would hide what lies behind them.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            centre = 1.0 if "norm" in name and weight.ndim == 1 and name.endswith("weight") else 0.0
            weight.copy_(centre + std * torch.randn(weight.shape, generator=generator))
    return network.eval()


def images(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def channels_first(x: np.ndarray):
    """[B, H, W, C] as torch's [B, C, H, W]."""
    import torch

    return torch.tensor(np.moveaxis(x, -1, 1))


def channels_last(x) -> np.ndarray:
    """torch's [B, C, H, W] as [B, H, W, C]."""
    return np.moveaxis(x.detach().numpy(), 1, -1)


def distance(ours, theirs) -> float:
    """The largest difference, in units of the largest of theirs."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def assert_gradients(component, grads, network, tolerance: float, zero: str = r"(?!)") -> None:
    """Each tensor's gradient is torch's, relative to the tensor's largest entry.

    Tensors that the regular expression `zero` finds have none but for rounding: a key's bias adds
    the same to all scores of a query.
    """
    leaves = dict(flatten(grads))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), grads)
    mine = {}
    for entry in tables.plan(shapes, component.family, component.fields):
        mine |= tables.split(entry, np.asarray(leaves[entry.path]))
    theirs = dict(network.named_parameters())
    assert mine.keys() == theirs.keys()
    largest = max(float(weight.grad.abs().max()) for weight in theirs.values())
    for name, weight in theirs.items():
        if re.search(zero, name):
            assert max(np.abs(mine[name]).max(), weight.grad.abs().max()) < 1e-5 * largest, name
        else:
            assert distance(mine[name], weight.grad.numpy()) < tolerance, name


def assert_same_files(one: pathlib.Path, other: pathlib.Path) -> None:
    """Both folders hold the same tensors, bit for bit."""
    ours, theirs = files.component(one), files.component(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


def assert_round_trip(ours, theirs, folder: pathlib.Path, out: pathlib.Path, **fields) -> None:
    """What `folder` gave is saved bit for bit, and opens here and, as a network of our own, there.

    `ours` is the component that was opened from `folder` with `fields`; `theirs` what wrote it.
    """
    loading.save_component(ours, out / "ours")
    assert_same_files(out / "ours", folder)
    again = loading.load_component(out / "ours", **fields)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, ours.params))
    # A network of our own is written with the config that its fields make.
    written = loading.component(ours.family.cls, ours.params, **ours.fields)
    loading.save_component(written, out / "own")
    back, weights = type(theirs).from_pretrained(out / "own").state_dict(), theirs.state_dict()
    assert back.keys() == weights.keys()
    for key, weight in weights.items():
        np.testing.assert_array_equal(back[key].numpy(), weight.numpy(), err_msg=key)
