"""A function run in a process of its own with as many simulated CPU devices as it asks for.

jax fixes the number of devices when it first counts them, so the process of the tests has four for
good. Starting another costs seconds: let one function measure all that a file of tests asserts.
"""

import inspect
import os
import pathlib
import pickle
import runpy
import subprocess
import sys
import tempfile

TESTS = pathlib.Path(__file__).resolve().parent


def simulated(devices: int, function, *args, timeout: float = 900):
    """`function(*args)` on `devices` CPU devices; fails with what the process wrote if it fails.

    Args:
      function: of a module's level in a test file, which the process imports anew.
      args: and what it returns: pickled. Arrays of jax come back as numpy's, if it returns those.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, returned = (pathlib.Path(folder) / name for name in ("given", "returned"))
        file = os.path.abspath(inspect.getsourcefile(function))
        given.write_bytes(pickle.dumps((devices, file, function.__qualname__, args)))
        try:
            done = subprocess.run(
                [sys.executable, __file__, given, returned], cwd=TESTS.parent, timeout=timeout,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired as late:
            raise AssertionError(f"no end after {timeout} s: {late.stdout!r}") from None
        if done.returncode or not returned.exists():
            raise AssertionError(f"exit code {done.returncode}:\n{done.stdout[-6000:]}")
        value, output = pickle.loads(returned.read_bytes()), done.stdout
    return value, output


def _main(given: str, returned: str) -> None:
    import jax

    devices, file, name, args = pickle.loads(pathlib.Path(given).read_bytes())
    jax.config.update("jax_num_cpu_devices", devices)
    if folder := os.environ.get("JDIFF_TEST_CACHE"):
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    sys.path[:0] = [str(TESTS), os.path.dirname(file)]
    function = runpy.run_path(file)[name]
    value = function(*args)
    partial = pathlib.Path(returned + ".partial")
    partial.write_bytes(pickle.dumps(value))
    partial.replace(returned)


if __name__ == "__main__":
    _main(*sys.argv[1:])
