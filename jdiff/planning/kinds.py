"""Kinds of operations, by their primitives: what the compiler stores and what it fuses."""

#: Results that show what they are made of, or that are folded into whoever reads them.
VIEWS = {
    "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "iota", "convert_element_type", "copy",
    "copy_p", "transpose", "rev", "slice", "dynamic_slice", "split", "unstack", "pad", "stack",
    "concatenate", "bitcast_convert_type", "stop_gradient", "optimization_barrier",
    "sharding_constraint",
    "layout_constraint", "reshard", "mesh_cast", "pvary", "pbroadcast", "random_wrap",
    "random_unwrap", "create_token", "enter_manual", "leave_manual",
}  # fmt: skip
#: Elementwise, and dear enough that nobody computes them twice.
DEAR = {
    "exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "sin", "cos", "tan", "erf", "erfc",
    "erf_inv", "rsqrt", "sqrt", "cbrt", "pow", "atan2", "lgamma", "digamma",
}  # fmt: skip
#: Elementwise and cheap.
CHEAP = {
    "add", "sub", "mul", "div", "neg", "max", "min", "select_n", "lt", "le", "gt", "ge", "eq", "ne",
    "and", "or", "not", "xor", "sign", "abs", "floor", "ceil", "round", "integer_pow", "square",
    "is_finite", "clamp", "rem", "shift_left", "shift_right_logical", "shift_right_arithmetic",
    "add_any", "nextafter", "reduce_precision", "zeros_like",
}  # fmt: skip
FUSED = VIEWS | DEAR | CHEAP
#: They are stored, but read through what is fused into them.
REDUCTIONS = {
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax",
    "argmin", "cumsum", "cumprod", "cummax",
}  # fmt: skip
