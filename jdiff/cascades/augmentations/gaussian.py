"""Gaussian noise on the low-resolution image: conditioning augmentation in diffusion time."""

from jdiff import schedules
from jdiff.cascades.augmentations.base import Augmentation, ranged
from jdiff.errors import UserError
from jdiff.predictions import corrupt
from jdiff.pytree import Array, noise_like, struct
from jdiff.schedules import Schedule, is_schedule
from jdiff.schedules.base import finite_data

_BEYOND = 1.001  # of t_max: schedules with limits of their log SNR end a little before 1


@struct
class Gaussian(Augmentation):
    """The augmentation that `gaussian` makes."""

    schedule: Schedule
    low: Array | float
    high: Array | float

    name, tells = "gaussian", True

    def apply(self, keys: Array, images: Array, level: Array) -> Array:
        """alpha(level) x + sigma(level) eps, eps of each sample from its own key."""
        return corrupt(self.schedule, images, noise_like(keys, images), level)


def gaussian(
    schedule: Schedule | None = None,
    low: Array | float = 0.0,
    high: Array | float | None = None,
) -> Gaussian:
    """The forward process up to time `level`, of which the network is told.

    z = alpha(s) x + sigma(s) eps with s ~ U(low, high) a sample: the non-truncated conditioning
    augmentation of CDM (Ho et al. 2022); with the default schedule, s ~ U(0, 1) is Imagen's
    aug_level (Saharia et al. 2022, section 2.4). With low = high the level is fixed, as in
    CDM's ablations. The truncated form has the same training; in sampling, the stage before stops
    at s and hands over its noisy state.

    Args:
      schedule: whose time s is; alpha = cos(pi s / 2) (`gvp`) if not given.
      low: the lowest s of training.
      high: the highest; the schedule's last time if not given.

    Raises:
      UserError: no schedule, one whose data lies at no finite time, or a range outside of its
        times.
    """
    schedule = schedules.gvp() if schedule is None else schedule
    if not is_schedule(schedule):
        raise UserError(f"gaussian: schedule: a Schedule is needed, given {schedule!r}.")
    finite_data("gaussian", schedule)
    high = schedule.t_max if high is None else high
    ranged("gaussian", "low", low, "high", high, (0.0, _BEYOND * schedule.t_max))
    return Gaussian(schedule, low, high)
