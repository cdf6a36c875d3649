"""Exclusive locks on files that processes share, on one machine or on several."""

import errno
import fcntl
from collections.abc import Callable
from typing import TextIO

BUSY = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def acquired(file: TextIO, lock: Callable[[TextIO, int], None], waits: Callable[[], None]) -> bool:
    """Wait for the lock of a file; False where its file system has none. `waits` is called where another holds it.

    `lock` is `fcntl.lockf`, which belongs to the process, or `fcntl.flock`, which belongs to the open file, so that
    threads keep each other out too. The kernel, or the server of a network file system, takes either back when the
    process or its machine dies.
    """
    try:
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in BUSY:
                raise
            waits()
            lock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True
