"""One process at a time in a run folder."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from welore.locks import acquired
from welore.report import announce

LOCK = ".lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process works in `folder`, on this machine or on another that shares it, and keep them out.

    The lock is on a file that stays, and falls with its process: no clock and no heartbeat decide whether it stands.
    """
    with (folder / LOCK).open("a+") as file:

        def waits() -> None:
            file.seek(0)
            announce(f"{file.read().strip() or 'another process'} works on this run already; waiting for it to end")

        if not acquired(file, fcntl.lockf, waits):
            announce(f"the file system of {folder} has no locks: see to it that one process alone works there")
        _sign(file)
        yield


def _sign(file: TextIO) -> None:
    """Leave word of who works here, for the one that waits."""
    job = os.environ.get("SLURM_JOB_ID")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}{f', job {job}' if job else ''}\n")
    file.flush()
