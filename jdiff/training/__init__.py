"""Training's parts: a step on plain state, averages of weights, optimisers, checkpoints, logs.

Who lives here: what turns a loss and a batch into new weights, and keeps them. The step is a pure
function that jit compiles once. The loop that drives these parts is `jdiff.train`, a floor above.
"""
