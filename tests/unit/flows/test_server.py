"""The password of our Prefect servers, and what their log says of services that fail."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.server import PrefectAPI, _Failures, only_once, password_file
from iterdpo.errors import UserError


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    from prefect.settings import PREFECT_HOME, temporary_settings

    with temporary_settings({PREFECT_HOME: tmp_path / "prefect"}):
        yield tmp_path / "prefect"


def test_the_password_is_written_once_and_only_its_owner_can_read_it(home: Path) -> None:
    path = password_file()
    password = path.read_text()
    assert path.parent == home
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(password) >= 24
    assert password_file().read_text() == password


def test_a_password_that_others_can_read_is_refused(home: Path) -> None:
    password_file().chmod(0o644)
    with pytest.raises(UserError, match="other users may read this password; delete the file"):
        password_file()


def test_a_name_is_served_once_and_keeps_its_port_unless_another_has_it(home: Path) -> None:
    refused = pytest.raises(UserError, match="--name 'nightly': another process serves it")
    with only_once("nightly") as port, refused, only_once("nightly"):
        pass
    with only_once("nightly") as again, only_once("weekly") as other:
        assert (again, other) == (port, other)
        assert other != port
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", port))
        listening.listen()
        with only_once("nightly") as moved:
            assert moved != port
    with only_once("nightly") as kept:
        assert kept == moved


def test_the_second_failure_of_a_service_within_three_minutes_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = _Failures()
    log = tmp_path / "prefect.log"
    log.write_text("from a server before\n")
    begun = log.stat().st_size

    def failures(at: float, reason: str = "no table\nmore of it") -> list[str]:
        error = ValueError(reason)
        record = logging.LogRecord("docket", logging.ERROR, "", 0, "%s", ("schedule()",), (type(error), error, None))
        record.created = at
        handler.emit(record)
        with open(log, "a") as file:
            file.write(capsys.readouterr().err)
        return PrefectAPI("http://127.0.0.1:1/api", tmp_path / "password", log, begun).failures()

    assert failures(1000.0) == []
    assert failures(2000.0) == []
    for at in (2050.0, 2051.0):  # a busy database is no failure
        assert failures(at, "(sqlite3.OperationalError) database is locked\n[SQL: ...]") == []
    assert failures(2100.0) == ["schedule(): ValueError: no table"]


def test_the_failures_of_the_users_own_server_are_not_known() -> None:
    assert PrefectAPI("http://prefect.example/api").failures() == []
