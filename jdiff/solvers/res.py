"""RES (Zhang et al. 2023, 2308.02157): refined exponential solvers in x0.

DPM-Solver++ takes x0 at the middle of the step; RES meets the order conditions of exponential
integrators for steps of any length: it is exact for x0 a straight line in lambda.
"""

from typing import ClassVar

from jdiff.errors import UserError
from jdiff.pytree import Array, struct
from jdiff.solvers import phi
from jdiff.solvers.multistep import Multistep
from jdiff.solvers.singlestep import TwoStage


@struct
class RESMultistep(Multistep):
    """Order 2, one evaluation a step."""

    order: ClassVar[int] = 2

    def weights(self, z: Array, nodes: list[Array]) -> list[Array]:
        """phi_2 / c_2 with the step before for a stage: c_2 = u is negative."""
        return phi.adams(z, nodes)


@struct
class RESSinglestep(TwoStage):
    """Order 2, two evaluations a step."""

    of: ClassVar[str] = "x0"

    def weights(self, z: Array, nodes: list[Array]) -> list[Array]:
        """b_2 = phi_2 / c_2 and b_1 = phi_1 - b_2."""
        return phi.adams(z, nodes)


def res_multistep() -> RESMultistep:
    """RES, multistep: order 2 with one evaluation a step (diffusers' 2M "heun")."""
    return RESMultistep()


def res_singlestep(c2: Array | float = 0.5) -> RESSinglestep:
    """RES, singlestep: order 2 with two evaluations a step.

    Args:
      c2: where in (0, 1] of the step, in log SNR, the second evaluation lies.

    Raises:
      UserError: c2 outside (0, 1].
    """
    if isinstance(c2, int | float) and not 0 < c2 <= 1:
        raise UserError(f"res_singlestep: c2={c2} given; it lies in (0, 1].")
    return RESSinglestep(c2)


def exp_heun() -> RESSinglestep:
    """Exponential Heun in x0 (ComfyUI's exp_heun_2_x0): RES with its stage at the step's end."""
    return RESSinglestep(1.0)
