"""Calling the programs of schedulers: sbatch, kubectl, gcloud."""

import shlex
import subprocess
from collections.abc import Sequence

from jdiff.errors import UserError

# Where a program comes from, for who does not have it.
_WHERE = {
    "sbatch": "SLURM's; run this where you would run sbatch yourself, on a login node",
    "scontrol": "SLURM's; run this where you would run sbatch yourself, on a login node",
    "scancel": "SLURM's; run this where you would run sbatch yourself, on a login node",
    "kubectl": "Kubernetes'; `gcloud components install kubectl`, then "
    "`gcloud container clusters get-credentials CLUSTER`",
    "gcloud": "Google Cloud's; install its command line, then `gcloud auth login`",
}


def call(words: Sequence[str], *, timeout: float = 120.0) -> str:
    """What the program prints.

    Raises:
      UserError: it is not installed, does not answer in time, or fails; with its own last words.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout)
    except FileNotFoundError as error:
        where = _WHERE.get(words[0], "it is not installed")
        raise UserError(f"{words[0]} is not on this machine ({where}).") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"`{line(words)}` has not answered for {timeout:.0f} s.") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(
            f"`{line(words)}` failed with exit code {done.returncode}: "
            f"{' '.join(said[-3:]) or 'it said nothing'}"
        )
    return done.stdout


def line(words: Sequence[str]) -> str:
    """The words as a line of shell."""
    return shlex.join(words)
