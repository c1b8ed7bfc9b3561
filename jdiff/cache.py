"""The cache of compiled programs, which lets a second start skip most of the compiler's work."""

import os
import pathlib

import jax

from jdiff.errors import UserError


def enable(wanted: bool = True, folder: str | None = None) -> None:
    """Keeps compiled programs in `folder` between processes.

    jax names an entry by the program, the compiler's version and options, and the kind of device;
    many processes may share a folder.

    Args:
      wanted: False leaves jax as it is, as does a folder that jax was given already
        (JAX_COMPILATION_CACHE_DIR).
      folder: by default `$JDIFF_CACHE/xla`, or `~/.cache/jdiff/xla`.

    Raises:
      UserError: a folder that was named cannot be written.
    """
    if not wanted or jax.config.jax_compilation_cache_dir:
        return
    from jdiff.data.prepare.packages import cache_root

    path = pathlib.Path(folder).expanduser().absolute() if folder else cache_root() / "xla"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        if folder:
            raise UserError(f"cache_dir={folder} cannot be written: {error.strerror}.") from error
        return  # a home that cannot be written: only slower
    jax.config.update("jax_compilation_cache_dir", str(path))
    # A network's initialisation is hundreds of programs that take a tenth of a second each.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
