"""Where the data lies, and that writing it is all or nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memplan.errors import InputError
from memplan.store import profiles_path, read_json, write_json


def test_profiles_hold_the_cards():
    assert (profiles_path() / "gpus").is_dir()


def test_what_is_written_is_read(tmp_path: Path):
    path = tmp_path / "a.json"
    obj = {"bytes": 2**40, "text": "é", "none": None, "list": [1.5, True]}

    write_json(path, obj)
    write_json(path, obj)

    assert read_json(path) == obj
    assert path.read_text(encoding="utf-8").endswith("}\n")
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "a.json"
    write_json(path, 1)

    with pytest.raises(TypeError):
        write_json(path, object())

    assert read_json(path) == 1
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_link_still_points_to_the_file_written(tmp_path: Path):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("0")
    link.symlink_to(target)

    write_json(link, 1)

    assert link.is_symlink()
    assert read_json(target) == 1


def test_a_new_file_has_the_rights_of_any_new_file(tmp_path: Path):
    path, plain = tmp_path / "a.json", tmp_path / "plain"
    plain.touch()

    write_json(path, 1)

    assert path.stat().st_mode == plain.stat().st_mode


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"cannot be written \(No such file"):
        write_json(tmp_path / "missing" / "a.json", 1)


def test_writing_over_a_folder_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="cannot be written"):
        write_json(tmp_path, 1)

    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_what_is_not_json_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "a.json"
    path.write_bytes(content)

    with pytest.raises(InputError, match="is not JSON"):
        read_json(path)


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="cannot be read"):
        read_json(tmp_path / "a.json")
