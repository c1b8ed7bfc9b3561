"""LPIPS against PyTorch's layers, on the published weights where they are prepared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import peer

from jdiff.data import prepare
from jdiff.evaluation import lpips

torch = peer("torch")


def reference(params, a, b):
    """LPIPS v0.1 with its VGG16 as its code has it: scaling, five slices, unit lengths, heads."""
    F = torch.nn.functional
    shift, scale = ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
    column = lambda values: torch.tensor(values).reshape(1, 3, 1, 1)

    def slices(x):
        x = (torch.from_numpy(x).permute(0, 3, 1, 2) - column(shift)) / column(scale)
        i = 0
        for k, count in enumerate((2, 2, 3, 3, 3)):
            x = F.max_pool2d(x, 2, 2) if k else x
            for _ in range(count):
                conv = {n: torch.from_numpy(np.array(v)) for n, v in params[f"conv{i}"].items()}
                x = F.relu(F.conv2d(x, conv["kernel"].permute(3, 2, 0, 1), conv["bias"], padding=1))
                i += 1
            yield x / (torch.sqrt((x**2).sum(1, keepdim=True)) + 1e-10)

    total = 0
    for k, (x, y) in enumerate(zip(slices(a), slices(b))):
        head = torch.from_numpy(np.array(params[f"lin{k}"])).reshape(1, -1, 1, 1)
        total = total + F.conv2d((x - y) ** 2, head).mean((2, 3))[:, 0]
    return total.numpy()


@pytest.mark.parametrize("side", [32, 17])
def test_distances_are_those_of_pytorch(side):
    """17 pixels are halved with a row and a column left out."""
    rng = np.random.default_rng(side)
    if prepare.location("lpips").is_file():
        params = lpips.load()
        assert all(float(params[f"lin{k}"].min()) >= 0 for k in range(5))  # as they were trained
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
        assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), lpips.shapes())
    else:
        params = jax.tree.map(
            lambda leaf: jnp.asarray(
                rng.standard_normal(leaf.shape, np.float32) / np.sqrt(np.prod(leaf.shape[:-1]))
            ),
            lpips.shapes(),
        )
    a, b = rng.uniform(-1, 1, (2, 2, side, side, 3)).astype(np.float32)
    found = jax.jit(lpips.distance)(params, a, b)
    np.testing.assert_allclose(found, reference(params, a, b), rtol=1e-4)
