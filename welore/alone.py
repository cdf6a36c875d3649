"""One process at a time in a run folder."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from welore.report import announce

LOCK = ".lock"
BUSY = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process works in `folder`, on this machine or on another that shares it, and keep them out.

    A POSIX lock on a file that stays: the kernel, or the server of a network file system, takes it back when the
    process or its machine dies, so that no clock and no heartbeat decide whether it still stands.
    """
    with (folder / LOCK).open("a+") as file:
        try:
            _wait_for(file)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            announce(f"the file system of {folder} has no locks: see to it that one process alone works there")
        _sign(file)
        yield


def _wait_for(file: TextIO) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in BUSY:
            raise
        file.seek(0)
        announce(f"{file.read().strip() or 'another process'} works on this run already; waiting for it to end")
        fcntl.lockf(file, fcntl.LOCK_EX)


def _sign(file: TextIO) -> None:
    """Leave word of who works here, for the one that waits."""
    job = os.environ.get("SLURM_JOB_ID")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}{f', job {job}' if job else ''}\n")
    file.flush()
