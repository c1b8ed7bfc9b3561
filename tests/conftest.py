"""Shared by every test: four simulated CPU devices and a quick compiler.

JDIFF_TEST_CACHE=folder keeps compiled programs between runs, for who edits and runs again. It is
off otherwise: a first run is no quicker with it, and writing thousands of programs once crashed
jaxlib.
"""

import os

# Compilation dominates the suite: the compiler takes it easy (tests run little code; at level 0 its
# numbers are wrong), one thread a worker since the workers share the cores.
_FLAGS = "--xla_backend_optimization_level=1 --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"

import jax  # noqa: E402, the flags are read at import

if folder := os.environ.get("JDIFF_TEST_CACHE"):
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_num_cpu_devices", 4)
