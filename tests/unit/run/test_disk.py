"""Whether the disk has room for what a run will write, and who holds a lock."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

import pytest

from iterdpo.errors import UserError
from iterdpo.run import disk
from iterdpo.run.disk import check_space, is_locked, size


def test_what_fits_passes_though_the_directory_does_not_exist_yet(tmp_path: Path) -> None:
    check_space(tmp_path / "runs" / "new", 1)
    assert not (tmp_path / "runs").exists()


def test_what_does_not_fit_is_refused_with_both_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3 << 30)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    check_space(tmp_path, 3 << 30)
    with pytest.raises(UserError, match=r"need about 4\.5 GiB, but the disk has 3\.0 GiB free"):
        check_space(tmp_path / "run", 9 << 29)


@pytest.mark.parametrize(("count", "shown"), [(0, "0.0 MiB"), (5 << 20, "5.0 MiB"), (3 << 29, "1.5 GiB")])
def test_a_size_is_shown_in_the_unit_that_shows_it(count: int, shown: str) -> None:
    assert size(count) == shown


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written \(.*file is no directory\); choose another run_dir"):
        check_space(tmp_path / "file" / "run", 1)


def test_a_directory_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # nothing is forbidden to root
    with pytest.raises(UserError, match=f"cannot be written \\(no permission in {tmp_path}\\)"):
        check_space(tmp_path / "runs" / "new", 1)


def test_a_look_at_a_lock_keeps_nobody_from_taking_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lock").touch()
    with open(tmp_path / "lock") as look, open(tmp_path / "lock") as run:
        fcntl.flock(look, fcntl.LOCK_SH)  # as `is_locked` does, for a moment
        monkeypatch.setattr("time.sleep", lambda seconds: look.close())
        disk.lock(run, fcntl.LOCK_EX | fcntl.LOCK_NB, "lock")
        assert is_locked(tmp_path / "lock")
        with open(tmp_path / "lock") as other, pytest.raises(BlockingIOError):
            disk.lock(other, fcntl.LOCK_EX | fcntl.LOCK_NB, "lock")
    assert not is_locked(tmp_path / "lock")
