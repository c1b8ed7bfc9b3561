"""One command in many processes: its flags, and that an error of one ends all."""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from jdiff.commands.options import number, whole
from jdiff.errors import told


def add_hosts(parser: argparse.ArgumentParser) -> None:
    """The options that join this process to others."""
    group = parser.add_argument_group(
        "many hosts",
        "The same command is started once a host. Under SLURM (srun), Open MPI, GKE and on TPU VMs "
        "the processes find each other; elsewhere these say where. Process 0 writes and prints.",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT",
        help="where process 0 listens, the same for all (or JAX_COORDINATOR_ADDRESS)",
    )  # fmt: skip
    group.add_argument(
        "--processes", type=whole(1), metavar="N",
        help="how many there are (or JAX_NUM_PROCESSES); 1 for one on its own whatever the "
        "scheduler says",
    )  # fmt: skip
    group.add_argument(
        "--process", type=whole(0), metavar="I",
        help="which this is, 0 to N - 1 (or JAX_PROCESS_ID)",
    )  # fmt: skip
    group.add_argument(
        "--connect_timeout", type=number(1), default=300.0, metavar="S",
        help="seconds that processes wait for each other at the start (default: %(default).0f)",
    )  # fmt: skip


@contextlib.contextmanager
def joined(args: argparse.Namespace) -> Iterator[Any]:
    """Joins the other processes, if there are some; yields the console, silent but for the first.

    To be entered before jax is asked for anything. An error inside ends all processes with its
    message and code, printed once.
    """
    from rich.console import Console

    from jdiff.parallel import hosts
    from jdiff.parallel.clusters import Given

    given = Given(args.coordinator, args.processes, args.process)
    found = hosts.join(given, args.connect_timeout)
    line = hosts.line()
    try:
        if found:
            _own_words()
        console = Console(quiet=not line.first)
        if found:
            console.print(found, markup=False, highlight=False, soft_wrap=True)
        yield console
        line.finish()
    except (KeyboardInterrupt, Exception) as error:
        text, code = told(error)
        line.fail(traceback.format_exc() if args.traceback else text, code)
        raise


def _own_words() -> None:
    """Leaves stdout to Python: jax's collectives on CPU tell there, from C++, whom they met."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = os.fdopen(kept, "w", buffering=1)
