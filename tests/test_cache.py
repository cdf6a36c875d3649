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


def test_a_digest_tells_apart_what_differs_and_where_parts_begin():
    parts = [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("c", "ab"), ()]
    assert len({digest(*each) for each in parts}) == len(parts)
    assert digest("é", b"x") == digest("é".encode(), memoryview(b"x"))
