"""What was written is recorded before the file has its name, and compared when it is read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from iterdpo.errors import DamagedError
from iterdpo.run import sums
from iterdpo.run.rundir import write_text
from iterdpo.run.sums import RECORD, check_files, damages, note, read_checked, record, recorded


def written(directory: Path, **files: str) -> list[Path]:
    for name, text in files.items():
        write_text(directory / name, text, record=directory)
    return [directory / name for name in files]


@pytest.mark.parametrize("text", ["012345678A", "0123", "", "01234567890"])
def test_a_file_that_is_not_what_was_written_is_named(tmp_path: Path, text: str) -> None:
    (file,) = written(tmp_path, data="0123456789")
    assert read_checked(file) == b"0123456789"
    check_files([file])
    file.write_text(text)
    for read in (lambda: read_checked(file), lambda: check_files([file])):
        with pytest.raises(DamagedError, match="data: damaged: its bytes are not those that were written"):
            read()


def test_a_file_without_a_record_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("any")
    assert recorded(tmp_path / "data") is None
    assert read_checked(tmp_path / "data") == b"any"


def test_any_of_the_contents_that_were_written_is_right(tmp_path: Path) -> None:
    written(tmp_path, data="one")
    (file,) = written(tmp_path, data="two")
    file.write_text("one")  # a process ended between the record and the file
    assert read_checked(file) == b"one"


def test_a_last_line_that_was_cut_counts_for_nothing_and_is_gone_with_the_next(tmp_path: Path) -> None:
    (file,) = written(tmp_path, data="one")
    whole = (tmp_path / RECORD).read_bytes()
    (tmp_path / RECORD).write_bytes(whole + whole[:30])
    assert read_checked(file) == b"one"
    note(tmp_path, {"other": "00"})
    assert (tmp_path / RECORD).read_bytes().startswith(whole)
    assert set(record(tmp_path)) == {"data", "other"}


@pytest.mark.parametrize("at", range(0, 80, 7))
def test_a_changed_byte_of_the_record_is_named_wherever_it_is(tmp_path: Path, at: int) -> None:
    (file, _) = written(tmp_path, data="one", more="two")
    raw = bytearray((tmp_path / RECORD).read_bytes())
    raw[at] ^= 1
    (tmp_path / RECORD).write_bytes(raw)
    with pytest.raises(DamagedError, match=r"\.sha256: damaged: line 1 is not what was written; .*delete it"):
        read_checked(file)


def test_all_damages_are_found_in_the_order_of_the_files(tmp_path: Path) -> None:
    a, b, c, d = written(tmp_path, a="a", b="b", c="c", d="d")
    b.write_text("B")
    c.unlink()
    assert list(damages([a, b, c, d])) == [(b, sums.CHANGED), (c, "is missing")]


def test_a_file_is_hashed_again_only_if_its_size_or_a_time_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    sha256_file = sums.sha256_file
    monkeypatch.setattr(sums, "sha256_file", lambda path: read.append(path.name) or sha256_file(path))
    (file,) = written(tmp_path, data="one")
    check_files([file])
    check_files([file])
    assert read == ["data"]
    file.write_text("two")
    os.utime(file, (1, 1))
    assert [problem for _, problem in damages([file])] == [sums.CHANGED]
