"""Shared by every test: four simulated CPU devices and one compilation cache."""

import os
import pathlib
import tempfile

import jax

# Compilation dominates the suite: the cache is shared by the workers and kept between runs.
_CACHE = pathlib.Path(os.environ.get("JDIFF_TEST_CACHE", tempfile.gettempdir())) / "jdiff-tests"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_num_cpu_devices", 4)
