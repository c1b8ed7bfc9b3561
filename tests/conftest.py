"""Shared by every test: four simulated CPU devices and a quick compiler.

JDIFF_TEST_CACHE=folder keeps compiled programs between runs, for who edits and runs again. It is
off otherwise: a first run is no quicker with it, and writing thousands of programs once crashed
jaxlib.
"""

import gc
import os
import sys

# Compilation dominates the suite: the compiler takes it easy (tests run little code; at level 0 its
# numbers are wrong), one thread a worker since the workers share the cores.
_FLAGS = "--xla_backend_optimization_level=1 --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"

import jax  # noqa: E402, the flags are read at import

if folder := os.environ.get("JDIFF_TEST_CACHE"):
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_num_cpu_devices", 4)

# The kernel gives a process 65,530 mappings of memory, a compiled program takes a dozen, and jaxlib
# crashes when there are no more. The whole suite compiles more programs than that.
_MAPPINGS = 20_000


def pytest_runtest_teardown(item, nextitem):
    """Between two files, drops the compiled programs when they have become too many."""
    if nextitem is None or item.path == nextitem.path or not sys.platform.startswith("linux"):
        return
    with open("/proc/self/maps", "rb") as maps:
        many = sum(1 for _ in maps) > _MAPPINGS
    if many:
        jax.clear_caches()
        gc.collect()
