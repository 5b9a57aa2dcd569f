"""A judge over HTTP: real servers, what they do wrong, and the example of the documentation."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from iterdpo.errors import JudgeError
from iterdpo.judging.judge import checked_judgments
from iterdpo.testing import make_group
from iterdpo.types import Completion, CompletionGroup, Judgment, Prompt
from judges import check_judge, judge_version, load_judge
from judges.load import probe_judge

Answer = Callable[[int, dict[str, Any]], tuple[int, bytes]]


class Server:
    """Answers request n, counted from 0, with `answer(n, body)`: a status and a body. Status 0 hangs up."""

    def __init__(self, answer: Answer) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with lock:
                    number = len(self.requests)
                    self.requests.append(body)
                    self.headers.append(dict(handler.headers))
                status, data = answer(number, body)
                if status == 0:
                    handler.close_connection = True
                    return
                handler.send_response(status)
                if status == 429:
                    handler.send_header("Retry-After", "0")
                handler.send_header("Content-Length", str(len(data)))
                handler.end_headers()
                handler.wfile.write(data)

            def log_message(handler, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=[0.02], daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/judge"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("judges.llm.transport.random.uniform", lambda low, high: 0.01 * high)


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], Server]]:
    started: list[Server] = []

    def start(answer: Answer) -> Server:
        started.append(Server(answer))
        return started[-1]

    yield start
    for each in started:
        each.server.shutdown()
        each.server.server_close()


def lengths(_: int, body: dict[str, Any]) -> tuple[int, bytes]:
    """Scores completions by the length of their text."""
    return said([{"scores": [len(c["text"]) for c in g["completions"]]} for g in body["groups"]])


def said(judgments: Any) -> tuple[int, bytes]:
    return 200, json.dumps({"judgments": judgments}).encode()


def judged(url: str, *groups: CompletionGroup, **args: Any) -> list[Judgment]:
    return checked_judgments(load_judge("remote", {"url": url, **args}), groups)


GROUP = make_group("2+2?", ["It is 4", "5"], gold="4")


def test_the_example_of_the_documentation_is_a_judge(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "judges.md").read_text(encoding="utf-8")
    lines = page.partition("```python\nfrom fastapi")[2].partition("```")[0]
    (tmp_path / "my_server.py").write_text(f"from fastapi{lines}")
    assert sum(bool(line.strip()) for line in lines.splitlines()) <= 10
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "my_server:app", "--port", str(port)]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(300):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/docs", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.05)
            groups = [make_group(f"{n}+{n}?", [f"It is {2 * n}", "no idea"], gold=str(2 * n)) for n in range(20)]
            judgments = judged(f"http://127.0.0.1:{port}/judge", *groups, batch_size=3)
        finally:
            process.terminate()
    assert [j.scores for j in judgments] == [[1.0, 0.0]] * 20


def test_what_is_sent_is_what_the_documentation_says(serve: Any) -> None:
    server = serve(lengths)
    chat = CompletionGroup(
        Prompt("p-chat", [{"role": "user", "content": "hi"}]), [1], [Completion("yo", [1, 2, 3], [-1.0] * 3, "length")]
    )
    judged(server.url, GROUP, chat)
    assert server.requests == [
        {
            "groups": [
                {
                    "prompt": {"id": GROUP.prompt.id, "text": "2+2?", "columns": {"gold": "4"}},
                    "completions": [
                        {"text": "It is 4", "tokens": 7, "finish_reason": "stop"},
                        {"text": "5", "tokens": 1, "finish_reason": "stop"},
                    ],
                },
                {
                    "prompt": {"id": "p-chat", "messages": [{"role": "user", "content": "hi"}], "columns": {}},
                    "completions": [{"text": "yo", "tokens": 3, "finish_reason": "length"}],
                },
            ]
        }
    ]


def test_batches_come_back_in_the_groups_order(serve: Any) -> None:
    def slow_first(number: int, body: dict[str, Any]) -> tuple[int, bytes]:
        time.sleep(0.3 if number == 0 else 0)
        return lengths(number, body)

    groups = [make_group(f"p{n}", ["x" * n]) for n in range(1, 8)]
    server = serve(slow_first)
    assert [j.scores for j in judged(server.url, *groups, batch_size=2)] == [[float(n)] for n in range(1, 8)]
    assert sorted(len(r["groups"]) for r in server.requests) == [1, 2, 2, 2]


@pytest.mark.parametrize("fault", [(429, b""), (503, b"busy"), (200, b'{"judgments": [{"sco'), (200, b""), (0, b"")])
def test_a_passing_fault_is_tried_again(serve: Any, fault: tuple[int, bytes]) -> None:
    server = serve(lambda n, body: fault if n < 2 else lengths(n, body))
    judge: Any = load_judge("remote", {"url": server.url})
    assert judge.judge([GROUP])[0].scores == [7.0, 1.0]
    assert judge.usage() == {"calls": 3, "retries": 2, "failed": 0}


@pytest.mark.parametrize(
    ("fault", "reason", "calls"),
    [
        ((500, b"secret internals"), "HTTP 500", 2),
        ((0, b""), "connection closed", 2),
        ((200, b"<html>"), "the reply was cut off, or no JSON", 2),
        ((422, b"{}"), "HTTP 422", 1),
    ],
)
def test_a_fault_that_stays_abstains_for_its_batch_alone(
    serve: Any, fault: tuple[int, bytes], reason: str, calls: int
) -> None:
    def answer(number: int, body: dict[str, Any]) -> tuple[int, bytes]:
        return fault if body["groups"][0]["prompt"]["text"] == "bad" else lengths(number, body)

    server = serve(answer)
    bad, good = judged(server.url, make_group("bad", ["a", "b"]), GROUP, batch_size=1, attempts=2)
    assert bad.scores == [None, None]
    assert bad.abstentions == [reason] * 2
    assert good.scores == [7.0, 1.0]
    assert len(server.requests) == calls + 1


def test_a_server_that_does_not_answer_in_time_abstains(serve: Any) -> None:
    server = serve(lambda n, body: (time.sleep(2), lengths(n, body))[1])
    [judgment] = judged(server.url, GROUP, timeout=0.2, attempts=1)
    assert judgment.abstentions == ["timed out after 0.2 s"] * 2


def test_nobody_there_abstains() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        [judgment] = judged(f"http://127.0.0.1:{free.getsockname()[1]}/judge", GROUP, attempts=2)
    assert judgment.abstentions == ["connection refused"] * 2


@pytest.mark.parametrize("status", [301, 401, 403, 404, 405])
def test_a_wrong_address_or_key_stops_at_once(serve: Any, status: int) -> None:
    server = serve(lambda n, body: (status, b""))
    with pytest.raises(JudgeError, match=f"answers HTTP {status}; check its address"):
        judged(server.url, GROUP)
    assert len(server.requests) == 1


def test_what_is_no_finite_number_abstains(serve: Any) -> None:
    body = (
        b'{"judgments": [{"scores": [0.5, null, null, NaN, 1e999, 1' + b"0" * 400 + b', "7", [1]],'
        b' "reasons": [null, "too vague", null, null, null, null, null, null]}]}'
    )
    server = serve(lambda n, _: (200, body))
    [judgment] = judged(server.url, make_group("x", list("abcdefgh")))
    assert judgment.scores == [0.5] + [None] * 7
    assert judgment.abstentions[1] == "too vague"
    assert judgment.abstentions[2] == "the judge returned None"
    assert all(judgment.abstentions[1:])


@pytest.mark.parametrize(
    "reply",
    [
        [],
        {"scores": [1, 2]},
        {"judgments": []},
        {"judgments": [{"scores": [1]}]},
        {"judgments": [{"scores": "12"}]},
        {"judgments": [[1, 2]]},
        {"judgments": [{"scores": [1, None], "reasons": ["why"]}]},
    ],
)
def test_a_reply_of_another_shape_stops_the_run(serve: Any, reply: Any) -> None:
    server = serve(lambda n, body: (200, json.dumps(reply).encode()))
    with pytest.raises(JudgeError, match="must answer with a list"):
        judged(server.url, GROUP)


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    serve: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_JUDGE_KEY", "sk-very-secret")
    good = serve(lengths)
    judge: Any = load_judge("remote", {"url": good.url, "api_key_env": "MY_JUDGE_KEY"})
    judge.judge([GROUP])
    assert good.headers[0]["Authorization"] == "Bearer sk-very-secret"
    assert "secret" not in repr(vars(judge))
    echoing = serve(lambda n, body: (401, b"no such key: sk-very-secret"))
    with pytest.raises(JudgeError) as raised:
        judged(echoing.url, GROUP, api_key_env="MY_JUDGE_KEY")
    assert "secret" not in str(raised.value) + caplog.text
    monkeypatch.delenv("MY_JUDGE_KEY")
    with pytest.raises(JudgeError, match="the environment variable MY_JUDGE_KEY"):
        judged(good.url, GROUP, api_key_env="MY_JUDGE_KEY")


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ({"url": "localhost:8001/judge"}, "give http://host:port/path"),
        ({"url": "http://me:pw@host/judge"}, "has a user or a password"),
        ({"url": "http://h/", "api_key_env": "sk-very-secret"}, "name of an environment variable"),
        ({"url": "http://h/", "timeout": 0}, "timeout is 0"),
        ({"url": "http://h/", "batch_size": 0}, "batch_size is 0"),
    ],
)
def test_a_mistake_is_found_before_asking(args: dict[str, Any], complaint: str) -> None:
    with pytest.raises(JudgeError, match=complaint) as raised:
        check_judge("remote", args)
    assert not re.search("pw|secret", str(raised.value))


def test_the_version_follows_the_revision_and_not_the_speed() -> None:
    version = judge_version("remote", {"url": "http://h/"})
    assert version == judge_version("remote", {"url": "http://h/", "concurrency": 2, "timeout": 5})
    assert version != judge_version("remote", {"url": "http://h/", "revision": 2})


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ((200, b'{"judgments": []}'), None),
        ((400, b""), None),  # it may refuse a request without groups
        ((503, b""), None),
        ((429, b""), None),
        ((404, b""), "answers HTTP 404"),
        ((401, b""), "answers HTTP 401"),
        ((0, b""), "connection closed; start the server, or check url"),
    ],
)
def test_the_server_is_asked_once_before_a_run(serve: Any, answer: tuple[int, bytes], complaint: str | None) -> None:
    server = serve(lambda number, body: answer)
    with pytest.raises(JudgeError, match=complaint) if complaint else nullcontext():
        probe_judge("remote", {"url": server.url})
    assert server.requests == [{"groups": []}] * (3 if answer[0] in (0, 429, 503) else 1)


def test_a_server_that_is_not_there_is_noticed_before_a_run() -> None:
    with pytest.raises(JudgeError, match=r"http://127\.0\.0\.1:9/judge: .*connection refused; start the server"):
        probe_judge("remote", {"url": "http://127.0.0.1:9/judge"})
