"""Where the time goes: a clock of the whole run, and a reading of the profiler's traces.

Who lives here: `clock` splits the wall time of the training loop, `tracer` records a few of its
steps, `xplane` reads what the profiler wrote, `operations` tells collectives from computation by
the names of CPU, GPU and TPU, `breakdown` adds up, and `intervals` is the arithmetic of all. Only
`tracer` needs jax.
"""
