"""The SQLite cache; the tests of its two users have processes, threads and damaged files."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from iterdpo.errors import JudgeError
from judges.cache import SQLiteCache


def opened(path: Path) -> closing[SQLiteCache]:
    return closing(SQLiteCache(path, table="replies", column="reply", owner="endpoint", remedy="or set `cache: off`"))


def test_a_text_is_found_again_by_its_key_and_the_first_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "calls.sqlite"
    with opened(path) as cache:
        assert cache.get("k", str) is None
        cache.put({"k": "1", "l": "2"})
        cache.put({"k": "3"})
    with opened(path) as cache:
        assert [cache.get(key, int) for key in "klm"] == [1, 2, None]


def test_two_may_have_it_open_at_once(tmp_path: Path) -> None:
    with opened(tmp_path / "calls.sqlite") as one, opened(tmp_path / "calls.sqlite") as other:
        one.put({"k": "1"})
        other.put({"l": "2"})
        assert (one.get("l", str), other.get("k", str)) == ("2", "1")


def test_an_entry_that_cannot_be_read_names_the_file_and_the_remedy(tmp_path: Path) -> None:
    with opened(tmp_path / "calls.sqlite") as cache:
        cache.put({"k": "no number"})
        with pytest.raises(JudgeError, match=r"endpoint: cache .*calls\.sqlite: cannot be used: .*or set `cache: off`"):
            cache.get("k", int)
