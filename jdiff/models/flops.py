"""Floating-point operations of a network, counted in its jaxpr, and the utilisation they give.

Counted are matrix products and convolutions, a multiply-add as two operations: papers' "Gflops"
(DiT, ADM, EDM2) are mostly multiply-adds, half of these. Additions, norms, softmax and activations
are left out, as in the papers; so is nothing of a scan, which XLA's own count takes for one step.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from jdiff.errors import UserError, choose, positive

#: Dense bfloat16 operations a second of one device, as its maker publishes them.
PEAKS: Mapping[str, float] = {
    "a100": 312e12,  # NVIDIA A100 Tensor Core GPU data sheet
    "h100": 989.4e12,  # NVIDIA H100 data sheet, SXM: 1,979 with sparsity
    "h200": 989.4e12,  # NVIDIA H200 data sheet, SXM: 1,979 with sparsity
    "b200": 2250e12,  # NVIDIA HGX B200 data sheet, a GPU: 4,500 with sparsity
    "tpu-v4": 275e12,  # Google Cloud documentation, "TPU v4", a chip (two cores)
    "tpu-v5e": 197e12,  # Google Cloud documentation, "TPU v5e"
    "tpu-v5p": 459e12,  # Google Cloud documentation, "TPU v5p"
    "tpu-v6e": 918e12,  # Google Cloud documentation, "TPU v6e (Trillium)"
}

#: Calls into compiled code that no jaxpr describes.
OPAQUE = ("ffi_call", "custom_call", "triton_kernel_call", "pure_callback", "io_callback")
OPAQUE += ("dot_product_attention", "ragged_dot", "scaled_matmul")
_ON_HOST = ("pure_callback", "io_callback")


def flops(function: Callable[..., Any], *args: Any) -> int:
    """Operations of `function(*args)`, as of a network: `flops(apply, params, x, t, cond)`.

    Nothing is computed: any argument may be `jax.ShapeDtypeStruct`s, as from `models.abstract`. Of
    the branches of a `cond` the dearest counts. Zeros that a convolution pads count, as in papers;
    those that the gradient of a strided one inserts between pixels do not.

    Raises:
        UserError: if there are products in a `while` loop, whose length is not known, or if there
            is a kernel that the compiler does not see into.
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr, _Part())


def training_flops(apply: Callable[..., jax.Array], params: Any, *inputs: Any) -> int:
    """Operations of `apply(params, *inputs)` and its gradient by params; about 3 times the first.

    What remat computes a second time does not count, by the convention of model FLOPs utilisation
    (Chowdhery et al. 2022, PaLM, appendix B); `flops` of the gradient counts that too.

    Raises:
        UserError: as `flops`.
    """
    forward = jax.make_jaxpr(apply)(params, *inputs)
    call = jaxpr_as_fun(_keep_everything(forward))

    def value(params: Any, inputs: Any) -> jax.Array:
        return sum(
            out.astype(jnp.float32).sum() for out in call(*jax.tree.leaves((params, inputs)))
        )

    return flops(jax.value_and_grad(value), params, inputs)


def step_flops(jaxpr: Jaxpr) -> int:
    """Operations of the gradient in the jaxpr of a training step, `step_fn.trace(...).jaxpr.jaxpr`.

    The same count as `training_flops` of the loss, without tracing anything again: jit keeps the
    trace for the call that follows. Every network that the loss calls counts, and each micro-batch.
    The optimiser does not, nor does what remat computes a second time; callbacks run on the host.

    Raises:
        UserError: as `flops`.
    """
    return _of_jaxpr(jaxpr, _Part(gradient=False))


def of_equation(equation: Any) -> int:
    """Operations of one equation of a jaxpr and of the jaxprs in it.

    Raises:
        UserError: as `flops`.
    """
    return _of_equation(equation, _Part())


def mfu(flops_per_step: float, seconds: float, peak: float | str, *, devices: int = 1) -> float:
    """The fraction of the peak rate that a step uses (model FLOPs utilisation).

    Args:
        flops_per_step: operations of a step, such as `training_flops`, on all devices together.
        seconds: that the step takes.
        peak: operations a second of one device, or its name in `PEAKS`.
        devices: how many there are.

    Raises:
        UserError: for a name not in `PEAKS`, with the nearest, or a number at or below 0.
    """
    rate = PEAKS[choose("peak", peak, PEAKS)] if isinstance(peak, str) else peak
    positive("mfu", flops_per_step=flops_per_step, seconds=seconds, peak=rate, devices=devices)
    return flops_per_step / (seconds * rate * devices)


class _Part(NamedTuple):
    """Which equations count: all, or what a step differentiates.

    jax marks the equations of `value_and_grad` with "jvp" in their name stack, and those that remat
    adds to the backward pass with "rematted_computation".
    """

    gradient: bool | None = None  # whether the equations are inside of it; None: all count

    def of(self, equation: Any) -> "_Part":
        if self.gradient is False and "jvp" in str(equation.source_info.name_stack):
            return _Part(gradient=True)
        return self

    def leaves_out(self, equation: Any) -> bool:
        if self.gradient is None:
            return False
        again = "rematted_computation" in str(equation.source_info.name_stack)
        return again or equation.primitive.name in _ON_HOST


def _of_jaxpr(jaxpr: Jaxpr, part: _Part) -> int:
    return sum(
        _of_equation(equation, part.of(equation))
        for equation in jaxpr.eqns
        if not part.leaves_out(equation)
    )


def _of_equation(equation: Any, part: _Part) -> int:
    name, params = equation.primitive.name, equation.params
    counts = part.gradient is not False
    if name == "dot_general" and counts:
        (contracted, _), _ = params["dimension_numbers"]
        lhs = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(lhs[d] for d in contracted)
    if name == "conv_general_dilated" and counts:
        return _of_convolution(equation)
    if name.startswith(OPAQUE) and counts:
        raise UserError(
            f"flops: {name} is a kernel that the compiler does not see into. "
            "Count the network with a plain one: apply.with_attention(attention.dot_product)."
        )
    inner = [_of_jaxpr(jaxpr, part) for jaxpr in _jaxprs(params)]
    if name == "while" and any(inner):
        raise UserError("flops: a while loop of unknown length holds products. Write it as a scan.")
    if name == "cond":
        return max(inner)
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "shard_map":  # the jaxpr is that of one device
        names = ("newly_manual_axes", "manual_axes")  # of newer and older jax
        axes = next(params[key] for key in names if key in params)
        return math.prod(params["mesh"].shape[axis] for axis in axes) * sum(inner)
    if name == "pallas_call":  # that of one block
        return math.prod(params["grid_mapping"].grid) * sum(inner)
    return sum(inner)


def _of_convolution(equation: Any) -> int:
    """Taps an output: the kernel's size, less those that meet the zeros of `lhs_dilation`."""
    params, out = equation.params, equation.outvars[0].aval
    _, (_, kernel_in, *kernel), (_, _, *space) = params["dimension_numbers"]
    rhs = equation.invars[1].aval.shape
    pairs = 1
    for i, (k, o) in enumerate(zip(kernel, space)):
        outputs = np.arange(out.shape[o]) * params["window_strides"][i] - params["padding"][i][0]
        taps = np.arange(rhs[k]) * params["rhs_dilation"][i]
        meets = np.add.outer(outputs, taps) % params["lhs_dilation"][i] == 0
        pairs *= int(meets.sum())
    others = out.size // math.prod(out.shape[o] for o in space)
    return 2 * others * pairs * rhs[kernel_in]


def _jaxprs(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    """The jaxprs in an equation's parameters, alone or in a tuple."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _keep_everything(value: Any) -> Any:
    """A jaxpr whose checkpoints keep all of the forward pass; other values as they are."""
    if isinstance(value, ClosedJaxpr) and value.jaxpr is not value:  # jax 0.11 has one class
        return value.replace(jaxpr=_keep_everything(value.jaxpr))
    if isinstance(value, tuple | list) and any(isinstance(v, ClosedJaxpr | Jaxpr) for v in value):
        return type(value)(map(_keep_everything, value))
    if not isinstance(value, Jaxpr):
        return value
    equations = []
    for equation in value.eqns:
        params = {name: _keep_everything(param) for name, param in equation.params.items()}
        if equation.primitive.name in ("checkpoint", "remat", "remat2"):
            params["policy"] = jax.checkpoint_policies.everything_saveable
        equations.append(equation.replace(params=params))
    return value.replace(eqns=equations)
