"""CFG++: manifold-constrained classifier-free guidance (Chung et al. 2024, 2406.08070)."""

from typing import Any

from jdiff.guidance.base import Pair, Refinement, refinable
from jdiff.predictions import Prediction
from jdiff.pytree import Array, PyTree, struct


@struct
class CFGpp(Refinement):
    """The guided denoiser that `cfg_pp` makes."""

    denoiser: Any

    def acts(self, t: Array) -> None:
        """Nothing is known: the bad prediction's eps is needed where the scale is 1 too."""

    def guide(self, x: PyTree, t: Array, pair: Pair) -> Prediction:
        """The guided x0, with the unconditional eps."""
        return self.denoiser.guide(x, t, pair)._replace(eps=pair.bad.eps)


def cfg_pp(denoise: Any) -> CFGpp:
    """Denoises with the guided prediction and renoises with the unconditional one (algorithm 2).

    The prediction is not consistent with x on purpose: it serves the solvers whose update is
    alpha_s x0 + sigma_s eps (`ddim`, any eta). Solvers that take the step from x itself (euler,
    heun, dpmpp_2m) never renoise; there it is not CFG++. The paper's scale lambda is in [0, 1],
    with 1 the conditional x0.

    Raises:
      UserError: `denoise` is not a guidance that extrapolates.

    >>> guided = guidance.cfg_pp(guidance.cfg(denoise, 0.6, null))
    """
    return CFGpp(refinable("cfg_pp", denoise))
