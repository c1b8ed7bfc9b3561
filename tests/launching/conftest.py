"""The one-machine SLURM that `.ci/slurm start` starts; who has none is told so."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest


@pytest.fixture
def slurm(monkeypatch):
    """SLURM_CONF names a running SLURM that is ours to use; its name."""
    home = pathlib.Path(os.environ.get("JDIFF_SLURM", "/tmp/jdiff-slurm"))
    conf = os.environ.get("SLURM_CONF", str(home / "slurm.conf"))
    start = "`export SLURM_CONF=$(.ci/slurm start)` starts one (root; Debian or Ubuntu)"
    if shutil.which("sbatch") is None:
        pytest.skip(f"NOT TESTED ON SLURM: there is no sbatch here. {start}")
    monkeypatch.setenv("SLURM_CONF", conf)
    said = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True)
    found = re.search(r"^ClusterName\s*=\s*(\S+)", said.stdout, re.M)
    if said.returncode or found is None:
        pytest.skip(f"NOT TESTED ON SLURM: no controller answers. {start}. {said.stderr.strip()}")
    if found.group(1) != "jdiff":
        pytest.skip(f"NOT TESTED ON SLURM: {found.group(1)} is a real cluster. {start}")
    return found.group(1)
