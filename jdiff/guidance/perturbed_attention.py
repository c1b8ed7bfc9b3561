"""Perturbed-attention guidance, PAG (Ahn et al. 2024, 2403.17377)."""

from typing import Any

from jdiff.denoisers import as_denoiser
from jdiff.errors import UserError
from jdiff.guidance.weak import Against, Weak, against, checked
from jdiff.pytree import Array, static, struct


def identity_map(q: Array, k: Array, v: Array, *, mask: Array | None = None) -> Array:
    """Self-attention whose map is the identity: each token gets its own value, seen or not."""
    if q.shape != v.shape:
        raise UserError(
            f"the identity map needs self-attention: {q.shape[1:-2]} queries meet {v.shape[1:-2]} "
            "values; choose other layers by where=."
        )
    return v


@struct
class Perturbed(Weak):
    """The denoiser that `perturbed` makes."""

    denoiser: Any
    where: str = static()

    def edit(self, apply: Any) -> Any:
        """With the identity as attention map."""
        return apply.with_attention(identity_map, self.where)


def perturbed(denoise: Any, where: str = ".*") -> Perturbed:
    """The denoiser with identity attention maps in the layers `where` of its networks."""
    return checked("perturbed", Perturbed(as_denoiser(denoise), where))


def perturbed_attention(denoise: Any, scale: Any, where: str = ".*") -> Against:
    """perturbed + scale (denoise - perturbed); scale = 1 is `denoise`, s is ours - 1.

    The structure of an image is what attention maps hold, so the perturbed member loses it. Needs
    no condition. With CFG: see `jdiff.guidance.weak`.

    Args:
      denoise: a denoiser with a network inside, on the same weights for both members.
      scale: a number, `[B]`, `per_sample(...)` or one of `guidance.scales`.
      where: regular expression for whole steps of the paths of the attention layers; the paper
        perturbs the middle of a U-Net, "middle"; one layer of a transformer is "blocks/13".

    Raises:
      UserError: no network inside, or no attention there; the paths that exist are named.

    >>> denoise = guidance.perturbed_attention(denoise, 3.0, "middle")
    """
    return against(checked("perturbed_attention", Perturbed(as_denoiser(denoise), where)), scale)
