"""Couplings: (key, x0, eps, cond) -> (x0, eps, cond), which endpoints of a batch are joined.

Two endpoints of the same batch size go in and come out, matched anew: `x0` the data with their
conditions `cond` (a tree of `[B, ...]`, or None), and `eps` the other end, noise or data of another
distribution. A condition stays with its own x0: every coupling here leaves both where they are and
moves `eps` alone. The batch as a whole keeps its marginals, so a loss on coupled endpoints has the
same distribution of data and noise, and straighter paths between them (Pooladian et al. 2023; Tong
et al. 2024).

A coupling is called before the loss, inside the compiled step:

    x0, eps, cond = couplings.ot()(key, x0, eps, cond)
    loss = losses.flow_matching(key, denoiser, x0, cond, eps=eps)
"""

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.errors import UserError, positive
from jdiff.pytree import Array, PyTree, batch_size, static, struct

Coupled = tuple[PyTree, PyTree, PyTree]


@struct
class Independent:
    """Endpoints of the batch joined by a random permutation."""

    def __call__(self, key: Array, x0: PyTree, eps: PyTree, cond: PyTree = None) -> Coupled:
        """Shuffles eps."""
        _same_batch("independent", x0, eps)
        return x0, _take(eps, jax.random.permutation(key, batch_size(x0))), cond


@struct
class Paired:
    """Endpoints joined as they come."""

    def __call__(self, key: Array, x0: PyTree, eps: PyTree, cond: PyTree = None) -> Coupled:
        """What is given."""
        _same_batch("paired", x0, eps)
        return x0, eps, cond


@struct
class OT:
    """The permutation of least total cost ||x0 - eps||^2."""

    def __call__(self, key: Array, x0: PyTree, eps: PyTree, cond: PyTree = None) -> Coupled:
        """Permutes eps; the key is not used."""
        _same_batch("ot", x0, eps)
        return x0, _take(eps, assignment(squared_distances(x0, eps))), cond


@struct
class Sinkhorn:
    """Draws from the entropic plan, the minimum of E[C] - epsilon H over joint distributions."""

    epsilon: Array | float = 0.05
    relative: bool = static(False)
    iterations: int = static(2000)

    def __call__(self, key: Array, x0: PyTree, eps: PyTree, cond: PyTree = None) -> Coupled:
        """Each x0 draws one of the eps from its row of the plan; an eps may be drawn twice."""
        _same_batch("sinkhorn", x0, eps)
        rows = jax.random.categorical(key, self.log_plan(x0, eps), axis=1)
        return x0, _take(eps, rows), cond

    def log_plan(self, x0: PyTree, eps: PyTree) -> Array:
        """The logarithm of the joint distribution `[B, B]`, both of whose marginals are uniform.

        Raises:
          UserError: ott-jax is not installed.
        """
        try:
            from ott.geometry.geometry import Geometry
            from ott.problems.linear.linear_problem import LinearProblem
            from ott.solvers.linear import sinkhorn as ott
        except ImportError as error:
            raise UserError(
                "couplings.sinkhorn needs ott-jax: pip install 'jdiff[ot]'. couplings.ot does not."
            ) from error
        cost = jax.lax.stop_gradient(squared_distances(x0, eps))
        epsilon = self.epsilon * (jnp.mean(cost) if self.relative else 1.0)
        solver = ott.Sinkhorn(max_iterations=self.iterations)
        out = solver(LinearProblem(Geometry(cost, epsilon=epsilon)))
        # ott's potentials say P = exp((f + g - C) / epsilon); exp would lose the small entries.
        return (out.f[:, None] + out.g[None, :] - cost) / epsilon


def independent() -> Independent:
    """No coupling: a fresh random matching, which also breaks pairs that a data set comes in."""
    return Independent()


def paired() -> Paired:
    """Pairs kept: reflow's noise and image, or a data set of (before, after)."""
    return Paired()


def ot() -> OT:
    """Minibatch optimal transport, exact (OT-CFM: Tong et al. 2024, 2302.00482, section 3.2.3).

    The assignment of least summed squared distance, solved on the host (scipy's
    linear_sum_assignment) from inside the compiled program; B^3 at worst.
    """
    return OT()


def sinkhorn(
    epsilon: float = 0.05, relative: bool = False, iterations: int = 2000
) -> Sinkhorn:  # fmt: skip
    """Minibatch entropic transport on the device, by ott-jax (the extra `ot`).

    Args:
      epsilon: the regularisation, in units of ||x0 - eps||^2. 2 sigma^2 makes it the static
        Schroedinger bridge of Brownian motion with deviation sigma (SB-CFM).
      relative: epsilon is in units of the batch's mean cost instead, which suits images.
      iterations: at most so many.

    Raises:
      UserError: epsilon is not positive; when called, ott-jax is not installed.
    """
    positive("sinkhorn", epsilon=epsilon)
    return Sinkhorn(epsilon, relative, iterations)


#: Couplings by name, as configs give them.
BY_NAME = {"independent": independent, "paired": paired, "ot": ot, "sinkhorn": sinkhorn}


def squared_distances(x: PyTree, y: PyTree) -> Array:
    """||x_i - y_j||^2 `[B, B]`, summed over the leaves: one matrix product a leaf."""

    def leaf(a: Array, b: Array) -> Array:
        dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
        a, b = (v.reshape(len(v), -1).astype(dtype) for v in (a, b))
        middle = a.mean(0)  # a common offset costs digits in the expanded square, and nothing else
        a, b = a - middle, b - middle
        product = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
        square = jnp.sum(a * a, 1)[:, None] + jnp.sum(b * b, 1)[None, :] - 2.0 * product
        return jnp.maximum(square, 0.0)

    return sum(jax.tree.leaves(jax.tree.map(leaf, x, y)))


def assignment(cost: Array) -> Array:
    """The columns `[..., B]` that the rows of cost `[..., B, B]` take in the cheapest matching."""
    shape = jax.ShapeDtypeStruct(cost.shape[:-1], jnp.int32)
    # One call to the host for all matrices of a vmap.
    return jax.pure_callback(_solve, shape, jax.lax.stop_gradient(cost), vmap_method="expand_dims")


def _solve(cost: Array) -> np.ndarray:
    from scipy.optimize import linear_sum_assignment

    cost = np.asarray(cost)
    flat = [linear_sum_assignment(one)[1] for one in cost.reshape(-1, *cost.shape[-2:])]
    return np.asarray(flat, np.int32).reshape(cost.shape[:-1])


def _take(tree: PyTree, index: Array) -> PyTree:
    return jax.tree.map(lambda a: jnp.take(a, index, axis=0), tree)


def _same_batch(where: str, x0: PyTree, eps: PyTree) -> None:
    if jax.tree.structure(x0) != jax.tree.structure(eps):
        raise UserError(
            f"couplings.{where}: x0 and eps are different trees: {jax.tree.structure(x0)} and "
            f"{jax.tree.structure(eps)}."
        )
    batch = batch_size(x0)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(x0), jax.tree.leaves(eps)):
        leaf = f"x0{jax.tree_util.keystr(path)}"
        if a.shape != b.shape:
            raise UserError(f"couplings.{where}: {leaf} is {a.shape} and eps {b.shape}.")
        if len(a) != batch:
            raise UserError(
                f"couplings.{where}: {leaf} has {len(a)} samples, the first leaf {batch}."
            )
