"""The directory of the user's own, among temporary files that every user can write."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from iterdpo.errors import UserError
from iterdpo.run.folder import default_cache, own_folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"iterdpo-{os.getuid()}"


def test_the_folder_is_made_once_and_only_its_owner_enters_it(place: Path) -> None:
    assert own_folder() == own_folder() == place
    assert place.stat().st_mode & 0o777 == 0o700


PLANTED: dict[str, Callable[[Path], object]] = {
    "a file": Path.touch,
    "a link": lambda place: place.symlink_to(place.parent),
    "a directory that others can write": lambda place: (place.mkdir(), place.chmod(0o777)),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_what_another_user_may_have_planted_is_refused(place: Path, kind: str) -> None:
    PLANTED[kind](place)
    with pytest.raises(UserError, match=f"{place}: not a directory of your own"):
        own_folder()


def test_a_place_for_temporary_files_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere/at/all")
    with pytest.raises(UserError, match=r"/nowhere/at/all/iterdpo-.*: cannot be made .*; set TMPDIR"):
        own_folder()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ITERDPO_CACHE": "/one", "XDG_CACHE_HOME": "/two", "HOME": "/three"}, "/one"),
        ({"XDG_CACHE_HOME": "/two", "HOME": "/three"}, "/two/iterdpo"),
        ({"HOME": "/three"}, "/three/.cache/iterdpo"),
    ],
)
def test_the_cache_follows_the_environment(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ITERDPO_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
        if name in environment:
            monkeypatch.setenv(name, environment[name])
    assert default_cache() == Path(expected)
