"""Progress: plain lines in a log, a bar on a terminal, nothing by default."""

from __future__ import annotations

import io
import os
import pty
import re
import threading

import pytest

from iterdpo.run.progress import Progress


def lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_nothing_is_said_by_default(capfd: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.say("hello")
    with progress.stage("sample", 3, "prompts") as stage:
        stage.advance(3)
    assert capfd.readouterr() == ("", "")


def test_a_stage_ends_with_one_line_of_counts_time_and_remark() -> None:
    stream = io.StringIO()
    with Progress(stream).stage("pair", 4, "pairs") as stage:
        stage.advance(1)
        stage.advance(2)
        stage.remark = "kept 3 of 4"
    (line,) = lines(stream)
    assert re.fullmatch(r"  pair           3 pairs +\d+\.\d s, [\d,.]+ pairs/s · kept 3 of 4", line)


def test_neither_a_start_up_nor_what_was_there_before_counts_in_the_rate() -> None:
    now = 100.0
    stream = io.StringIO()
    with Progress(stream, clock=lambda: now).stage("sample", 64, "completions") as stage:
        stage.to(32)
        now += 60
        stage.begin()
        now += 4
        stage.to(64)
    assert lines(stream) == ["  sample        64 completions    64.0 s, 60.0 s to start, 8.0 completions/s"]


def test_a_stage_that_fails_says_how_far_it_came_and_that_it_stopped() -> None:
    stream = io.StringIO()

    def train() -> None:
        with Progress(stream).stage("train", 24, "steps") as stage:
            stage.to(7)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    (line,) = lines(stream)
    assert line.startswith("  train          7 steps")
    assert line.endswith(" (stopped)")


def test_a_stage_without_work_has_no_rate() -> None:
    stream = io.StringIO()
    with Progress(stream).stage("judge", 0, "prompts"):
        pass
    assert re.fullmatch(r"  judge          0 prompts +\d+\.\d s", lines(stream)[0])


def test_a_log_gets_a_line_now_and_then_with_the_time_left() -> None:
    clock = iter([0.0, 50.0, 60.0, 75.0, 90.0, 100.0, 200.0])
    stream = io.StringIO()
    with Progress(stream, every=20, clock=lambda: next(clock)).stage("sample", 10_000, "prompts") as stage:
        stage.to(1000)  # at 50 s: start-up, mostly, which says nothing of the rate
        stage.to(1500)  # at 60 s: 500 in 10 s, 8,500 left
        stage.to(3000)  # at 75 s: too soon for another line
        stage.to(5000)  # at 90 s: 4,000 in 40 s, 5,000 left
        stage.to(10_000)  # at 100 s: the last line says it
    assert lines(stream) == [
        "  sample     1,500 of 10,000 prompts, about 170 s left",
        "  sample     5,000 of 10,000 prompts, about 50 s left",
        "  sample    10,000 prompts       200.0 s, 50.0 prompts/s",
    ]


def terminal_output(fail: bool) -> str:
    """What a terminal is sent by a stage of three prompts, up to its end."""
    reading, writing = pty.openpty()
    read: list[bytes] = []

    def drain() -> None:
        while True:
            try:
                read.append(os.read(reading, 1 << 16))
            except OSError:  # the other end is closed
                return

    thread = threading.Thread(target=drain)
    thread.start()
    with os.fdopen(writing, "w") as stream:
        assert stream.isatty()
        try:
            with Progress(stream).stage("sample", 3, "prompts") as stage:
                stage.to(1)
                if fail:
                    raise ZeroDivisionError
                stage.to(3)
        except ZeroDivisionError:
            pass
        Progress(stream).say("next")
    thread.join(5)
    os.close(reading)
    return b"".join(read).decode()


def shown(output: str) -> list[str]:
    """The lines on the screen after `output`: carriage returns, cursor up, and erase-line are all that rich uses."""
    screen, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.", output, flags=re.DOTALL):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            screen += [""] * (row + 1 - len(screen))
        elif re.fullmatch(r"\x1b\[\d*A", token):
            row = max(0, row - int(token[2:-1] or 1))
        elif token == "\x1b[2K":
            screen[row] = ""
        elif not token.startswith("\x1b"):
            screen[row] = screen[row].ljust(column)[:column] + token + screen[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in screen if line.strip()]


@pytest.mark.parametrize("fail", [False, True])
def test_a_terminal_is_shown_a_bar_and_then_the_line(fail: bool) -> None:
    output = terminal_output(fail)
    assert "━" in output
    assert re.search(rf"  sample +{1 if fail else 3} prompts", output)
    assert ("(stopped)" in output) == fail
    assert "\x1b[?25h" in output.rpartition("\x1b[?25l")[2]  # the cursor is back


def test_when_the_stage_is_over_the_bar_is_gone_from_the_terminal() -> None:
    line, after = shown(terminal_output(fail=False))
    assert re.fullmatch(r"  sample +3 prompts +\d+\.\d s, [\d,.]+ prompts/s", line)
    assert after == "next"
