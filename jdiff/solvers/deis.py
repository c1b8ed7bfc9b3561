"""DEIS (Zhang and Chen 2022, 2204.13902): Adams-Bashforth steps in the predicted eps."""

from jdiff.errors import UserError
from jdiff.pytree import Array, static, struct
from jdiff.solvers import phi
from jdiff.solvers.multistep import Multistep


@struct
class DEIS(Multistep):
    """Orders 1 to 3, one evaluation a step."""

    order: int = static(3)

    of = "eps"

    def weights(self, z: Array, nodes: list[Array]) -> list[Array]:
        """Equation 15's integrals in closed form, for polynomials in log rho."""
        return phi.adams(z, nodes)


def deis(order: int = 3) -> DEIS:
    """DEIS with eps a polynomial in log rho, rho = sigma / alpha (2204.13902).

    The form of diffusers ("logrho"): the paper's tAB has a polynomial in its schedule's t, whose
    integrals have no closed form. Any grid; order 1 is DDIM.

    Args:
      order: 1, 2 or 3; the step uses order - 1 earlier predictions.

    Raises:
      UserError: another order.
    """
    if order not in (1, 2, 3):
        raise UserError(f"deis: order={order} given; allowed are 1, 2, 3.")
    return DEIS(order)
