import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from welore.cache import Cache, digest


def never():
    pytest.fail("made again")


def test_a_result_is_made_once_for_each_kind_and_key(tmp_path):
    cache, made = Cache(tmp_path), []

    def get(kind, key, value):
        return cache.get(kind, key, torch.load, torch.save, lambda: made.append(value) or torch.tensor(value))

    assert [int(get("a", "x", 1)), int(get("a", "x", 2)), int(get("a", "y", 3)), int(get("b", "x", 4))] == [1, 1, 3, 4]
    assert made == [1, 3, 4]


def test_another_process_finds_what_was_made(tmp_path):
    Cache(tmp_path).get("a", "x", torch.load, torch.save, lambda: torch.arange(3))
    found = Cache(tmp_path).get("a", "x", torch.load, torch.save, never)
    assert torch.equal(found, torch.arange(3))


@pytest.mark.parametrize("keep", [0, 10, 400])
def test_a_truncated_file_is_made_again(tmp_path, keep, capsys):
    cache = Cache(tmp_path)
    cache.get("a", "x", torch.load, torch.save, lambda: torch.arange(1000))
    file = tmp_path / "a" / "x"
    file.write_bytes(file.read_bytes()[:keep])
    for make in (lambda: torch.arange(1000), never):
        assert torch.equal(cache.get("a", "x", torch.load, torch.save, make), torch.arange(1000))
    printed = capsys.readouterr()
    assert "is damaged" in printed.out + printed.err


def test_a_write_that_fails_leaves_no_result_behind(tmp_path):
    def write(value, path):
        path.write_bytes(b"half of")
        raise OSError("the disk is full")

    cache = Cache(tmp_path)
    with pytest.raises(OSError, match="full"):
        cache.get("a", "x", torch.load, write, lambda: 1)
    assert not (tmp_path / "a" / "x").exists()
    assert cache.get("a", "x", torch.load, torch.save, lambda: 2) == 2


def test_who_needs_what_another_makes_waits_for_it(tmp_path, monkeypatch):
    """flock is of the open file, so that threads stand for processes here; two processes meet in test_judges.py."""
    begun, waits, end, made = threading.Event(), threading.Event(), threading.Event(), []
    # What a thread prints may be lost while another one reads the captured output.
    monkeypatch.setattr(Cache, "_say", lambda self, said: waits.set() if "another process makes a" in said else None)

    def make():
        made.append(1)
        begun.set()
        assert end.wait(10)
        return torch.arange(3)

    def get(kind, make):
        return Cache(tmp_path).get(kind, "x", torch.load, torch.save, make)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(get, "a", make)
        assert begun.wait(10)
        assert get("b", lambda: 3) == 3  # other results wait for nobody
        second = threads.submit(get, "a", never)
        assert waits.wait(10) and not second.done()
        end.set()
        assert torch.equal(first.result(), second.result()) and made == [1]
    assert not list((tmp_path / "locks").iterdir())


def test_what_another_failed_to_make_is_made(tmp_path):
    with pytest.raises(ZeroDivisionError):
        Cache(tmp_path).get("a", "x", torch.load, torch.save, lambda: 1 / 0)
    assert Cache(tmp_path).get("a", "x", torch.load, torch.save, lambda: 2) == 2
    assert not list((tmp_path / "locks").iterdir())


def test_a_file_system_without_locks_is_told_once_and_used(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("welore.cache.fcntl.flock", refuse)
    cache = Cache(tmp_path)
    assert [cache.get("a", key, torch.load, torch.save, lambda: 4) for key in "xyx"] == [4, 4, 4]
    assert capsys.readouterr().err.count("has no locks") == 1


def test_what_is_there_is_read_without_a_lock(tmp_path, monkeypatch):
    Cache(tmp_path).get("a", "x", torch.load, torch.save, lambda: 5)
    monkeypatch.setattr("welore.cache.fcntl.flock", lambda *_: pytest.fail("it is locked"))
    assert Cache(tmp_path).get("a", "x", torch.load, torch.save, never) == 5


def test_a_digest_tells_apart_what_differs_and_where_parts_begin():
    parts = [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("c", "ab"), ()]
    assert len({digest(*each) for each in parts}) == len(parts)
    assert digest("é", b"x") == digest("é".encode(), memoryview(b"x"))
