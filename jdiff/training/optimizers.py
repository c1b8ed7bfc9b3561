"""The optimiser of a config: optax, with warm-up, a learning-rate schedule and clipping."""

from typing import Any

import optax

from jdiff.errors import UserError, call, choose

#: Optimisers by name; config.optimizer.arguments are theirs.
BY_NAME = {
    "adam": optax.adam, "adamw": optax.adamw, "radam": optax.radam, "lion": optax.lion,
    "muon": optax.contrib.muon, "sgd": optax.sgd,
}  # fmt: skip


def build(config: Any, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """(optimiser, learning rate by step) of `config.optimizer` for a run of `steps` steps.

    Raises:
      UserError: an unknown optimiser, argument or schedule, or numbers that make no sense.
    """
    if not config.learning_rate > 0:
        raise UserError(f"config.optimizer.learning_rate={config.learning_rate} must be positive.")
    if config.clip is not None and not config.clip > 0:
        raise UserError(f"config.optimizer.clip={config.clip} must be positive, or None.")
    rate = learning_rate(config, steps)
    arguments = {"name": config.name, "learning_rate": rate, **config.arguments}
    optimizer = call("config.optimizer", BY_NAME, arguments)
    clip = optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip)
    return optax.chain(clip, optimizer), rate


def learning_rate(config: Any, steps: int) -> optax.Schedule:
    """step -> learning rate: linear warm-up, then the schedule over what is left of `steps`."""
    peak, warmup = config.learning_rate, config.warmup
    if not 0 <= warmup <= steps:
        raise UserError(f"config.optimizer.warmup={warmup} must lie in 0..{steps} (train.steps).")
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, max(steps - warmup, 1)),
        "linear": lambda: optax.linear_schedule(peak, 0.0, max(steps - warmup, 1)),
        "rsqrt": lambda: _rsqrt(peak, config.decay_from - warmup),
    }
    main = after[choose("config.optimizer.schedule", config.schedule, after)]()
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup])


def _rsqrt(peak: float, start: int) -> optax.Schedule:
    """peak / sqrt(max(step / start, 1)), steps counted after the warm-up (EDM2, equation 67)."""
    import jax.numpy as jnp

    if start < 1:
        raise UserError("config.optimizer.decay_from must be larger than warmup for rsqrt.")
    return lambda step: peak / jnp.sqrt(jnp.maximum(step / start, 1.0))
