"""DPM-Solver++ (Lu et al. 2022, 2211.01095): exponential integrators in the predicted x0."""

from typing import ClassVar

from jdiff.errors import UserError
from jdiff.pytree import Array, struct
from jdiff.solvers import phi
from jdiff.solvers.multistep import Multistep
from jdiff.solvers.singlestep import TwoStage


@struct
class DPMpp2S(TwoStage):
    """Order 2, two evaluations a step."""

    of: ClassVar[str] = "x0"

    def weights(self, z: Array, nodes: list[Array]) -> list[Array]:
        """Algorithm 1: x0 at the middle of the step, extrapolated from its inner stage."""
        return phi.midpoint(z, nodes)


@struct
class DPMpp2M(Multistep):
    """Order 2, one evaluation a step."""

    order: ClassVar[int] = 2

    def weights(self, z: Array, nodes: list[Array]) -> list[Array]:
        """Algorithm 2: x0 at the middle of the step, extrapolated from the step before."""
        return phi.midpoint(z, nodes)


@struct
class DPMpp3M(Multistep):
    """Order 3, one evaluation a step."""

    order: ClassVar[int] = 3
    curvature: ClassVar[float] = 2.0  # of the second divided difference: h^2 x0'' is twice it

    def weights(self, z: Array, nodes: list[Array]) -> list[Array]:
        """phi_2 h x0' + phi_3 h^2 x0'', both derivatives from divided differences."""
        if len(nodes) == 1:
            return phi.adams(z, nodes)
        u1, u2 = nodes
        _, phi_2, phi_3 = phi.phis(z, 3)
        # x0[0, u1, u2] = q1 (y1 - y) + q2 (y2 - y), and h x0' = x0[0, u1] - u1 x0[0, u1, u2].
        q1, q2 = -1.0 / (u1 * (u2 - u1)), 1.0 / (u2 * (u2 - u1))
        bend = self.curvature * phi_3 - u1 * phi_2
        return [phi_2 / u1 + bend * q1, bend * q2]


@struct
class DPMpp3MPublished(DPMpp3M):
    """Half the second derivative, as the authors' code has it: order 2, with a smaller constant."""

    order: ClassVar[int] = 2
    length: ClassVar[int] = 2
    curvature: ClassVar[float] = 1.0


def dpmpp_2s(r: Array | float = 0.5) -> DPMpp2S:
    """DPM-Solver++(2S) (2211.01095, algorithm 1), order 2 with two evaluations a step.

    Args:
      r: where in (0, 1] of the step, in log SNR, the second evaluation lies.

    Raises:
      UserError: r outside (0, 1].
    """
    if isinstance(r, int | float) and not 0 < r <= 1:
        raise UserError(f"dpmpp_2s: r={r} given; it lies in (0, 1].")
    return DPMpp2S(r)


def dpmpp_2m() -> DPMpp2M:
    """DPM-Solver++(2M) (2211.01095, algorithm 2), order 2 with one evaluation a step.

    The "midpoint" of diffusers; its "heun" is `res_multistep`.
    """
    return DPMpp2M()


def dpmpp_3m() -> DPMpp3M:
    """DPM-Solver++(3M) with its missing factor restored: order 3, one evaluation a step.

    The published code adds phi_3 D2 for the second derivative, where D2 is the second divided
    difference: half of it. Here it is 2 phi_3 D2, and the step is exact for x0 quadratic in lambda.
    """
    return DPMpp3M()


def dpmpp_3m_published() -> DPMpp3MPublished:
    """DPM-Solver++(3M) as in its authors' code, diffusers and k-diffusion: order 2.

    See `dpmpp_3m` for the factor that it lacks.
    """
    return DPMpp3MPublished()
