"""Texts by key in an SQLite file that processes and threads share: replies of endpoints, judgments of judges.

diskcache would keep values as pickles, which a shared file should not have, and evict them by its own rules.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from iterdpo.errors import JudgeError

T = TypeVar("T")


class SQLiteCache:
    """A table `(key, value)`. `with closing(SQLiteCache(...))` or `close()`; it stays in the thread that opened it.

    Each entry is its own transaction and outlives a killed process. Entries that the operating system had not yet
    written when a machine loses power are lost.

    Args:
        path: made, with its folders, if it does not exist.
        table, column: names of the table and of its second column.
        owner, remedy: the beginning and the end of error messages.

    Raises:
        JudgeError: here and in each method, if the file is no such database or cannot be used.
    """

    def __init__(self, path: Path, *, table: str, column: str, owner: str, remedy: str) -> None:
        self.path, self.owner, self.remedy = path, owner, remedy
        self._select = f"SELECT {column} FROM {table} WHERE key = ?"
        self._insert = f"INSERT OR IGNORE INTO {table} VALUES (?, ?)"
        with self._named_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=60, isolation_level=None)
            try:
                self._write_ahead()
                self._database.execute("PRAGMA synchronous = NORMAL")
                self._database.execute(f"CREATE TABLE IF NOT EXISTS {table} (key TEXT PRIMARY KEY, {column} TEXT)")
            except BaseException:
                self._database.close()
                raise

    def get(self, key: str, read: Callable[[str], T]) -> T | None:
        """`read` of the text under `key`, or None."""
        with self._named_errors():
            row = self._database.execute(self._select, (key,)).fetchone()
            return None if row is None else read(row[0])

    def put(self, texts: Mapping[str, str]) -> None:
        """Keep the texts; a key that is there already keeps its first."""
        with self._named_errors():
            self._database.executemany(self._insert, texts.items())

    def close(self) -> None:
        self._database.close()

    def _write_ahead(self) -> None:
        """WAL mode, so that a writer does not block readers. The switch itself, made once for a file, ignores `timeout`."""
        for attempt in range(1000):
            try:
                self._database.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or attempt == 999:
                    raise
                time.sleep(0.02)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError, TypeError, LookupError) as error:
            wrong = f"{self.owner}: cache {self.path}: cannot be used: {error}"
            raise JudgeError(f"{wrong}; move the file away, {self.remedy}") from error
