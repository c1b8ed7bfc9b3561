"""Exit codes of the command line: what a scheduler may conclude without reading the log.

Those from 64 to 78 have the numbers of BSD's sysexits.h, which schedulers and shells leave free.
"""

OK = 0
FAILED = 1  # a defect: something that no message was written for
USER = 2  # a mistake in the command, the config or the files it names: will not go away by itself
DIVERGED = 65  # EX_DATAERR: the loss is not finite; the same command would meet it again
IO = 74  # EX_IOERR: the disk is full, the data cannot be read; goes on once that is repaired
REQUEUE = 75  # EX_TEMPFAIL: asked to stop (SIGTERM), has saved; the same command goes on
PEER_LOST = 76  # EX_PROTOCOL: another process of the run has gone; the same command goes on
INTERRUPTED = 130  # Ctrl-C: has saved, but a person wanted the end, so nothing requeues it

# What a scheduler starts again without a person.
AGAIN = frozenset({REQUEUE, PEER_LOST})
