"""Shared by every test: four simulated CPU devices, one compilation cache, a quick compiler."""

import os
import pathlib
import tempfile

# Compilation dominates the suite: the compiler takes it easy (tests run little code), one thread a
# worker since the workers share the cores, and what it makes is kept between runs.
_FLAGS = "--xla_backend_optimization_level=1 --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"

import jax  # noqa: E402, the flags are read at import

_CACHE = pathlib.Path(os.environ.get("JDIFF_TEST_CACHE", tempfile.gettempdir())) / "jdiff-tests"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_num_cpu_devices", 4)
