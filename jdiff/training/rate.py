"""How fast training is: images a second and chip, and model FLOPs utilisation (MFU)."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jdiff.errors import UserError
from jdiff.models.flops import PEAKS, mfu, step_flops

#: What jax calls a device (`device_kind`), whole -> its name in `PEAKS`. Variants of another peak
#: (the H100 on PCIe, the H100 NVL) are left out: better no utilisation than a wrong one.
DEVICE_KINDS: Mapping[str, str] = {
    r"NVIDIA A100.*": "a100",
    r"NVIDIA H100( 80GB HBM3| SXM.*)?": "h100",
    r"NVIDIA (H200|GH200)( 1\d\dGB.*| 480GB)?": "h200",
    r"TPU v4": "tpu-v4",
    r"TPU (v5e|v5 lite)": "tpu-v5e",
    r"TPU (v5p|v5)": "tpu-v5p",
    r"TPU (v6e|v6 lite)": "tpu-v6e",
}


class Speed(NamedTuple):
    """What is known of a run's speed before it begins.

    Attributes:
        batch_size: images a step, on all devices.
        devices: how many they are; a chip of a TPU is one.
        flops: operations of a step, on all devices, or None.
        peak: operations a second of one device, or None.
    """

    batch_size: int
    devices: int
    flops: int | None = None
    peak: float | None = None

    def of(self, images_per_s: float) -> dict[str, float]:
        """Images a second as metrics: in all, a chip, and the MFU where it is known."""
        out = {"images_per_s": images_per_s, "images_per_s_chip": images_per_s / self.devices}
        if self.flops and self.peak and images_per_s > 0:
            seconds = self.batch_size / images_per_s
            out["mfu"] = mfu(self.flops, seconds, self.peak, devices=self.devices)
        return out

    def text(self, images_per_s: float) -> str:
        """The same in words: "1,437 images/s (359 a chip), MFU 41.0 %"."""
        known = self.of(images_per_s)
        words = f"{images_per_s:,.0f} images/s"
        if self.devices > 1:
            words += f" ({known['images_per_s_chip']:,.0f} a chip)"
        return f"{words}, MFU {100 * known['mfu']:.1f} %" if "mfu" in known else words


def peak(device_kind: str) -> float | None:
    """Dense bfloat16 operations a second of a device by jax's name of it; None if not known."""
    for pattern, name in DEVICE_KINDS.items():
        if re.fullmatch(pattern, device_kind):
            return PEAKS[name]
    return None


def flops(traced: Any) -> tuple[int | None, str]:
    """(operations of a step, why they are not known), from `step_fn.trace(state, batch)`.

    jit keeps what it traces for the call that follows, so counting costs a walk over the program:
    50 ms for a U-Net of 300 million weights.
    """
    try:
        return step_flops(traced.jaxpr.jaxpr), ""
    except UserError as error:
        return None, str(error)
