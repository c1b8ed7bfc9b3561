"""Skip-layer guidance: SLG of SD3.5, and STG's residual skip (Hyung et al. 2024, 2411.18664)."""

from typing import Any

from jdiff.denoisers import as_denoiser
from jdiff.guidance.weak import Against, Weak, against, checked
from jdiff.pytree import static, struct


@struct
class Skipping(Weak):
    """The denoiser that `skipping` makes."""

    denoiser: Any
    where: str = static()

    def edit(self, apply: Any) -> Any:
        """Without those blocks."""
        return apply.without_blocks(self.where)


def skipping(denoise: Any, where: str) -> Skipping:
    """The denoiser with the residual blocks `where` of its networks left out."""
    return checked("skipping", Skipping(as_denoiser(denoise), where))


def skip_layer(denoise: Any, scale: Any, where: str) -> Against:
    """skipping + scale (denoise - skipping); scale = 1 is `denoise`, STG's s is ours - 1.

    SD3.5 skips blocks 7, 8 and 9 of its transformer, on top of CFG, early in the sampling only:
    scale=`scales.interval(2.8, low, high)`, where="blocks/[789]". STG's other form, attention with
    the identity as map, is `perturbed_attention`.

    Args:
      denoise: a denoiser with a network inside, on the same weights for both members.
      scale: a number, `[B]`, `per_sample(...)` or one of `guidance.scales`.
      where: regular expression for whole steps of the paths of the residual blocks.

    Raises:
      UserError: no network inside, or no block there; at the call, a block that changes the shape.
    """
    return against(checked("skip_layer", Skipping(as_denoiser(denoise), where)), scale)
