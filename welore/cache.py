"""Results on disk, found again by the content of what they were computed from."""

import hashlib
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

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

    def holds(self, kind: str, key: str) -> bool:
        return (self.folder / kind / key).exists()

    def get(
        self, kind: str, key: str, read: Callable[[Path], T], write: Callable[[T, Path], None], make: Callable[[], T]
    ) -> T:
        """What `make` returns, computed once for each kind and key."""
        path = self.folder / kind / key
        if path.exists():
            try:
                return read(path)
            except Exception as error:  # whatever a truncated file makes its reader raise
                print(f"cache: {path} is damaged ({type(error).__name__}: {error}); it is made again", file=sys.stderr)
        value = make()
        with whole(path) as part:
            write(value, part)
        return value
