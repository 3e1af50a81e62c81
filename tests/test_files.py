"""What popc keeps in files: whole or not there, under keys of its own, and no other file gone."""

from __future__ import annotations

import bz2
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from popc import models
from popc.files import key_of, write_whole
from popc.ops import native
from popc.tools import text


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """Each text is there as a whole or not at all, and nothing else is left."""
    target = tmp_path / "figures.json"
    texts = [letter * 500_000 for letter in "abcd"]

    def write(number: int) -> bool:
        write_whole(target, texts[number % 4])
        return target.read_text() in texts

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(write, range(40)))
    assert os.listdir(tmp_path) == ["figures.json"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "page.html"
    write_whole(target, "before")
    with pytest.raises(UnicodeEncodeError):
        write_whole(target, "a lone surrogate: \ud800")

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_whole(target, "after")
    assert target.read_text() == "before" and os.listdir(tmp_path) == ["page.html"]


def test_what_is_written_is_readable_as_any_file_is(tmp_path: Path) -> None:
    write_whole(tmp_path / "ours", "")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_keys_differ_from_file_to_file(tmp_path: Path) -> None:
    """By folder, by size and by time; the same file by any path has the same key."""
    paths = [tmp_path / name / "model.gguf" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(b"1234")
        os.utime(path, ns=(1, 1))
    first = key_of(paths[0])
    assert first.startswith("model-") and first != key_of(paths[1])
    (tmp_path / "link").symlink_to(paths[0].parent)
    assert key_of(tmp_path / "link" / "model.gguf") == first
    os.utime(paths[0], ns=(2, 2))
    touched = key_of(paths[0])
    assert touched != first
    paths[0].write_bytes(b"12345")
    os.utime(paths[0], ns=(2, 2))
    assert key_of(paths[0]) not in (first, touched)


def test_two_models_of_one_name_are_converted_separately(tmp_path: Path, monkeypatch) -> None:
    """And each is found again, without being converted once more."""
    converted: list[bytes] = []

    def convert(gguf: Path, folder: Path) -> None:
        converted.append(gguf.read_bytes())
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setenv("POPC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_convert", convert)
    for name in ("a", "b", "a"):
        package = tmp_path / name
        package.mkdir(exist_ok=True)
        if not (package / "smollm2.gguf").exists():
            (package / "smollm2.gguf").write_text(name)
        monkeypatch.setattr(models, "package_folder", lambda *_, source=package: source)
        assert (models._smollm2() / "model.safetensors").read_text() == name
    assert converted == [b"a", b"b"]


def test_two_dumps_of_one_name_are_read_separately(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("POPC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(text, "_parse", lambda dump: [bz2.open(dump, "rt").read()])
    for name in ("a", "b", "a"):
        data = tmp_path / name / "test" / "test_data"
        data.mkdir(parents=True, exist_ok=True)
        dump = data / "enwiki-latest-shortened.bz2"
        if not dump.exists():
            dump.write_bytes(bz2.compress(name.encode()))
        monkeypatch.setattr(text, "package_folder", lambda *_, folder=tmp_path / name: folder)
        assert text.wikipedia_articles() == [name]
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("how", ["absolute", "upwards", "symlink", "folder"])
def test_a_record_that_names_a_file_elsewhere_is_left_alone(tmp_path: Path, how: str) -> None:
    cache, other = tmp_path / "cache", tmp_path / "precious.so"
    cache.mkdir()
    other.write_bytes(b"not as it was built")
    named = {
        "absolute": other,
        "upwards": cache / ".." / "precious.so",
        "symlink": cache / "library.so",
        "folder": cache,
    }[how]
    if how == "symlink":
        named.symlink_to(other)
    record = cache / "popc-record.json"
    record.write_text(json.dumps([str(named), "another digest"]))
    native._discard_if_damaged(record)
    assert other.read_bytes() == b"not as it was built" and record.exists()
    assert how != "symlink" or named.is_symlink()


@pytest.mark.parametrize(
    "content", ["", "null", "[1, 2]", '["a"]', '{"a": 1, "b": 2}', '["\\u0000", 1]']
)
def test_a_record_that_says_nothing_is_ignored(tmp_path: Path, content: str) -> None:
    record = tmp_path / "popc-record.json"
    record.write_text(content)
    native._discard_if_damaged(record)
    assert record.read_text() == content


def test_a_damaged_library_in_the_cache_is_removed(tmp_path: Path) -> None:
    library, record = tmp_path / "in" / "library.so", tmp_path / "popc-record.json"
    library.parent.mkdir()
    library.write_bytes(b"half")
    record.write_text(json.dumps([str(library), native._digest(b"half")]))
    native._discard_if_damaged(record)
    assert library.exists()
    record.write_text(json.dumps([str(library), native._digest(b"half and half")]))
    native._discard_if_damaged(record)
    assert not library.exists()
