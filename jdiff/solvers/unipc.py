"""UniPC (Zhao et al. 2023, 2302.04867): each predicted step is corrected, at no evaluation more.

The corrector UniC takes a step again with the prediction at its end, which the next step asks for
anyway. Predictor and corrector of one step share their DDIM part, so what the corrector changes is
a sum of differences between stored predictions, and the next step carries it on times
sigma_s / sigma_t. All in all a step is that of any multistep method, with other scalars:

    x_s = alpha_s x0 + sigma_s eps + sum_j c_j (x0_j - x0),

with x0 and eps predicted at the uncorrected x_t. What a step returns is uncorrected too, the last
one included, as published: correcting it would take one evaluation more.
"""

import jax.numpy as jnp

from jdiff.errors import UserError, choose
from jdiff.pytree import Array, static, struct
from jdiff.schedules import Schedule
from jdiff.solvers import phi
from jdiff.solvers.multistep import History, Multistep, nodes_of, ramped


@struct
class UniPC(Multistep):
    """UniP-p and UniC-p in x0, orders p and p + 1; one evaluation a step."""

    p: int = static(2)
    variant: str = static("bh2")

    @property
    def order(self) -> int:
        """Of predictor and corrector together."""
        return self.p + 1

    @property
    def length(self) -> int:
        """The corrector reaches one step further back than the predictor."""
        return self.p

    def weights(self, z: Array, nodes: list[Array]) -> list[Array]:
        """For one node the paper sets B(h) / 2; with more, its equations leave no freedom to B."""
        if len(nodes) > 1:
            return phi.adams(z, nodes)
        return phi.midpoint(z, nodes) if self.variant == "bh2" else [0.5 / nodes[0]]

    def coefficients(self, sched: Schedule, history: History, t: Array, s: Array) -> list[Array]:
        """The predictor's from t to s, plus what the corrector changes at t."""
        predictor = self.predictor(sched, history, t, s)
        carried = sched.sigma(s) / sched.sigma(t)
        both = zip([*predictor, 0.0], self.corrector(sched, history, t))
        return [a + carried * b for a, b in both]

    def predictor(self, sched: Schedule, history: History, t: Array, s: Array) -> list[Array]:
        """Of the differences to x0 predicted at t, all but the oldest."""
        nodes = nodes_of(sched, s, t, history.times[:-1], history.count)
        z = -nodes.h
        return [-sched.alpha(s) * z * w for w in ramped(self.weights, z, nodes)]

    def corrector(self, sched: Schedule, history: History, t: Array) -> list[Array]:
        """What it changes at t, in the same differences."""
        base, *older = history.times  # the step before went from here to t
        nodes = nodes_of(sched, t, base, tuple(older), history.count - 1)
        z, end = -nodes.h, jnp.ones_like(nodes.h)
        # Weights with the node at the end of the step first; of the others, the change.
        (chosen,) = self.weights(z, [end])
        changes = [chosen, *[jnp.zeros_like(z)] * len(older)]
        for k, ok in enumerate(nodes.usable, 1):
            at = nodes.at[:k]
            first, *rest = phi.adams(z, [end, *at])
            change = [a - b for a, b in zip(rest, self.weights(z, at))]
            new = [first, *change, *changes[k + 1 :]]
            changes = [jnp.where(ok, a, b) for a, b in zip(new, changes)]
        made = (history.count > 0) & (nodes.h != 0)
        scale = jnp.where(made, -sched.alpha(t) * z, 0.0)
        # Differences are to x0_1 there, to x0 here: y_j - y_1 = (y_j - y) - (y_1 - y).
        return [scale * change for change in (-sum(changes), *changes[1:])]


def unipc(order: int = 2, variant: str = "bh2") -> UniPC:
    """UniPC-p, multistep, of data prediction (2302.04867), one evaluation a step.

    The corrector makes a method of order p + 1 of a predictor of order p. For p = 3 the first steps
    bound that (see `multistep`): 3 from an ordinary start, 4 with short first steps.

    Args:
      order: p, 1 to 3: 3 for unconditional sampling, 2 with guidance, in the paper.
      variant: "bh1" (B(h) = h) or "bh2" (B(h) = exp(h) - 1). They differ where one node is free: in
        the corrector of order 1 and the predictor of order 2.

    Raises:
      UserError: another order or variant.
    """
    if order not in (1, 2, 3):
        raise UserError(f"unipc: order={order} given; allowed are 1, 2, 3.")
    return UniPC(order, choose("unipc variant", variant, ("bh1", "bh2")))
