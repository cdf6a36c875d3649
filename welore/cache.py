"""Results on disk, found again by the content of what they were computed from."""

import fcntl
import hashlib
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from welore.locks import acquired

LOCKS = "locks"  # the folder of their files

T = TypeVar("T")


def digest(*parts: str | bytes | memoryview) -> str:
    """A name for content: 16 hexadecimal digits of BLAKE2b over the parts, each preceded by its length."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        state.update(len(raw).to_bytes(8, "little"))
        state.update(raw)
    return state.hexdigest()


def half(path: Path) -> Path:
    """Where a file is written before it takes its place, whole: beside it, and named after this process."""
    return path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.part")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file that then takes the place of `path`: it appears whole or not at all.

    A kill or a full disk leaves the one before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = half(path)  # other processes may write it too
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def discard_halves(folder: Path) -> None:
    """Remove what killed processes of this machine have left half-written under `folder`; those of others stay."""
    for part in folder.rglob(f"*.{socket.gethostname()}.*.part"):
        process = part.name.split(".")[-2]
        if process != str(os.getpid()) and not _is_alive(int(process)):
            shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


class Cache:
    """A folder of results. A file that cannot be read is computed again; a file appears whole or not at all."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._said: set[str] = set()

    def holds(self, kind: str, key: str) -> bool:
        return (self.folder / kind / key).exists()

    def get(
        self, kind: str, key: str, read: Callable[[Path], T], write: Callable[[T, Path], None], make: Callable[[], T]
    ) -> T:
        """What `make` returns, computed once for each kind and key: who needs it meanwhile waits for it."""
        path = self.folder / kind / key
        if path.exists():
            with suppress(Exception):  # whatever a truncated file makes its reader raise: it is said below
                return read(path)
        with self.alone(kind, key):
            if path.exists():
                try:
                    return read(path)
                except Exception as error:
                    said = f"{type(error).__name__}: {error}"
                    print(f"cache: {path} is damaged ({said}); it is made again", file=sys.stderr)
            value = make()
            with whole(path) as part:
                write(value, part)
            return value

    @contextmanager
    def alone(self, kind: str, key: str) -> Iterator[None]:
        """Keep out who would make the same: other threads and processes, here or where the folder is shared.

        The file of the lock goes when what it guards is there, and stays after an error, for the next to lock.
        """
        lock = self.folder / LOCKS / f"{kind}-{key}"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("a") as file:
            if not acquired(file, fcntl.flock, lambda: self._say(f"another process makes {kind}; waiting for it")):
                self._say(f"the file system of {self.folder} has no locks: processes may make the same twice")
            if (place := self.folder / kind).exists():
                os.scandir(place).close()  # a network file system remembers for a while that a file was not there
            yield
            lock.unlink(missing_ok=True)

    def _say(self, line: str) -> None:
        """Once: there may be hundreds of keys."""
        if line not in self._said:
            self._said.add(line)
            print(f"cache: {line}", file=sys.stderr, flush=True)
