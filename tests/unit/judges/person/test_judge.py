"""A person as a judge, with the page's server and the files on disk real, and the person played by HTTP requests."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from iterdpo.errors import JudgeError, JudgingStopped
from iterdpo.judging.judge import NamedJudge, RunJudge, checked_judgments
from iterdpo.judging.shards import judge_shards
from iterdpo.run.artifacts import read_judgments
from iterdpo.testing import make_group
from iterdpo.types import CompletionGroup, Judgment
from judges import load_judge
from judges.load import expected_abstentions
from judges.person import page
from judges.person.judge import Person, Waiting, plan
from judges.person.page import Desk, review_server
from judges.person.store import Reviews, Task


def good(task: Task) -> str:
    """The choice of somebody who likes the text that says "good"."""
    return "left" if "good" in task.left else "right"


def judged(
    judge: Person, groups: Sequence[CompletionGroup], run_dir: Path, choose: Callable[[Task], str]
) -> tuple[list[Judgment], list[str]]:
    """The judgments, and the ids of what was asked, in the order of the answers."""
    asked: list[str] = []
    judge.attach(run_dir, answering(run_dir, choose, asked))
    return checked_judgments(judge, groups), asked


def answering(run_dir: Path, choose: Callable[[Task], str], asked: list[str]) -> Waiting:
    """A person who answers at once what a judge waits for."""

    @contextmanager
    def answered(message: str) -> Iterator[None]:
        for batch in Reviews(run_dir).pending():
            for task in batch.unanswered():
                asked.append(task.id)
                assert batch.submit(task.id, choose(task))  # type: ignore[arg-type]
        yield

    return answered


def groups_of_two(count: int = 8) -> list[CompletionGroup]:
    return [make_group(f"Question {i}?", [f"bad {i}", f"good {i}"]) for i in range(count)]


def test_what_a_person_prefers_has_the_higher_score_whichever_side_it_was_on(tmp_path: Path) -> None:
    judgments, asked = judged(Person(), groups_of_two(24), tmp_path, good)
    assert [j.scores for j in judgments] == [[0.0, 1.0]] * 24
    assert len(asked) == 24
    winners = {j.comparisons[0].winner for j in judgments}
    assert winners == {"first", "second"}  # `first` is the left one: both sides had the good one


def test_a_tie_is_a_half_and_a_skip_abstains_with_its_reason(tmp_path: Path) -> None:
    choices = iter(["tie", "skip"])
    [tied, skipped], _ = judged(Person(), groups_of_two(2), tmp_path, lambda task: next(choices))
    assert tied.scores == [0.5, 0.5]
    assert skipped.scores == [None, None]
    assert skipped.abstentions == ["skipped by the reviewer"] * 2


def test_one_pair_of_a_larger_group_leaves_the_others_without_a_score(tmp_path: Path) -> None:
    group = make_group("Question?", ["a", "b", "c good", "d"])
    [judgment], asked = judged(Person(), [group], tmp_path, good)
    assert len(asked) == 1
    assert judgment.abstentions.count("not shown to a person") == 2
    assert judgment.scores.count(None) == 2


def test_what_was_not_shown_does_not_stop_the_stage_and_what_was_skipped_does(tmp_path: Path) -> None:
    groups = [make_group(f"Question {i}?", ["a", "b good", "c", "d"]) for i in range(4)]

    def stage(name: str, choose: Callable[[Task], str]) -> list[Judgment]:
        (directory := tmp_path / name).mkdir()
        named = NamedJudge(
            "train_judge",
            "person",
            "1",
            lambda: load_judge("person", {}),
            max_abstained=0.1,
            expected_abstentions=expected_abstentions("clip", {"judge": {"use": "person"}}),
        )
        judge = RunJudge(named, directory, answering(directory, choose, []))
        judge_shards(judge, [("shard-0000", groups)], directory, total=16)
        return list(read_judgments(directory))

    assert sum(s is None for j in stage("judged", good) for s in j.scores) == 8  # two of four were shown
    with pytest.raises(JudgingStopped, match=r"8 of 16 completions(?s:.*)8  skipped by the reviewer"):
        stage("skipped", lambda task: "skip")


@pytest.mark.parametrize(("comparisons", "pairs"), [(1, 1), (2, 2), ("chain", 3), ("all", 6), (99, 6)])
def test_as_many_pairs_are_shown_as_were_asked_for(comparisons: Any, pairs: int) -> None:
    group = make_group("Question?", ["a", "b", "c", "d"])
    asked = plan(group, comparisons=comparisons, question="?", who="", seed=0)
    assert len(asked.tasks) == len({t.id for t in asked.tasks}) == pairs


def test_all_pairs_give_the_share_of_wins(tmp_path: Path) -> None:
    group = make_group("Question?", ["a", "bb", "ccc"])
    longer = lambda task: "left" if len(task.left) > len(task.right) else "right"  # noqa: E731
    [judgment], _ = judged(Person(comparisons="all"), [group], tmp_path, longer)
    assert judgment.scores == [0.0, 0.5, 1.0]


def test_completions_of_one_text_are_one_and_nobody_is_asked_about_equal_ones(tmp_path: Path) -> None:
    groups = [make_group("Same?", ["x", "x"]), make_group("Twice?", ["bad", "good", "bad"]), make_group("One?", ["x"])]
    [same, twice, one], asked = judged(Person(), groups, tmp_path, good)
    assert len(asked) == 1
    assert same.scores == [0.5, 0.5]
    assert twice.scores == [0.0, 1.0, 0.0]
    assert one.abstentions == ["nothing to compare it with"]


def test_a_pair_that_was_judged_is_not_asked_again_in_whatever_order_it_comes_back(tmp_path: Path) -> None:
    first, asked = judged(Person(), groups_of_two(), tmp_path, good)
    swapped = [make_group(g.prompt.text, [c.text for c in reversed(g.completions)]) for g in groups_of_two()]
    again, asked_again = judged(Person(seed=5), [*swapped, *groups_of_two(10)[8:]], tmp_path, good)
    assert len(asked) == 8
    assert len(asked_again) == 2
    assert [j.scores for j in again] == [[1.0, 0.0]] * 8 + [[0.0, 1.0]] * 2
    assert [j.scores for j in first] == [[0.0, 1.0]] * 8


def test_another_person_or_another_question_is_asked_anew(tmp_path: Path) -> None:
    judged(Person(who="ann"), groups_of_two(), tmp_path, good)
    assert len(judged(Person(who="bob"), groups_of_two(), tmp_path, good)[1]) == 8
    assert len(judged(Person(who="ann", question="Which is kinder?"), groups_of_two(), tmp_path, good)[1]) == 8
    assert judged(Person(who="ann"), groups_of_two(), tmp_path, good)[1] == []


def test_a_skipped_pair_is_asked_again_where_the_judge_is_asked_again(tmp_path: Path) -> None:
    _, asked = judged(Person(), groups_of_two(2), tmp_path, lambda task: "skip")
    judgments, asked_again = judged(Person(), groups_of_two(2), tmp_path, good)
    assert asked == asked_again
    assert [j.scores for j in judgments] == [[0.0, 1.0]] * 2


class Killed(BaseException):
    pass


def test_a_run_that_is_killed_finds_the_verdicts_given_meanwhile(tmp_path: Path) -> None:
    @contextmanager
    def killed(message: str) -> Iterator[None]:
        raise Killed
        yield

    for _ in range(2):  # a second start asks nothing twice
        judge = Person()
        judge.attach(tmp_path, killed)
        with pytest.raises(Killed):
            judge.judge(groups_of_two())
    [batch] = Reviews(tmp_path).pending()
    for task in batch.unanswered()[:5]:
        batch.submit(task.id, good(task))  # type: ignore[arg-type]
    judgments, asked = judged(Person(), groups_of_two(), tmp_path, good)
    assert len(asked) == 3
    assert [j.scores for j in judgments] == [[0.0, 1.0]] * 8
    assert len(Reviews(tmp_path).batches()) == 1

    def never(message: str) -> Any:
        raise AssertionError("everything is answered: there is nothing to wait for")

    judge = Person()
    judge.attach(tmp_path, never)
    assert judge.judge(groups_of_two()) == judgments


def test_a_line_that_was_cut_short_loses_nothing_else(tmp_path: Path) -> None:
    _, batches = Reviews(tmp_path).ask(plan(groups_of_two(1)[0], comparisons=1, question="?", who="", seed=0).tasks)
    [task] = batches[0].tasks()
    (batches[0].path / "verdicts.jsonl").write_bytes(b'{"task":"' + task.id.encode()[:5])
    assert batches[0].verdicts() == {}
    assert batches[0].submit(task.id, "left", "a note")
    verdict = batches[0].verdicts()[task.id]
    assert (verdict.choice, verdict.note) == ("left", "a note")


def test_a_verdict_is_taken_back_until_the_run_has_taken_it(tmp_path: Path) -> None:
    _, [batch] = Reviews(tmp_path).ask(plan(groups_of_two(1)[0], comparisons=1, question="?", who="", seed=0).tasks)
    [task] = batch.tasks()
    assert batch.submit(task.id, "left")
    assert not batch.submit(task.id, "right")  # it stands
    assert batch.undo(task.id)
    assert batch.close() is None
    assert batch.submit(task.id, "right")
    closed = batch.close()
    assert closed is not None
    assert closed[task.id].choice == "right"
    assert not batch.undo(task.id)


def test_verdicts_from_many_threads_are_all_there_once(tmp_path: Path) -> None:
    tasks = [plan(g, comparisons=1, question="?", who="", seed=0).tasks[0] for g in groups_of_two(10)]
    _, [batch] = Reviews(tmp_path).ask(tasks)
    accepted: list[bool] = []

    def person() -> None:
        accepted.extend(batch.submit(t.id, "left") for t in tasks)

    threads = [threading.Thread(target=person) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(accepted) == 10
    assert len((batch.path / "verdicts.jsonl").read_text().splitlines()) == 10


def test_without_a_run_there_is_nobody_to_ask() -> None:
    with pytest.raises(JudgeError, match="within a run"):
        Person().judge(groups_of_two(1))


@pytest.mark.parametrize(
    "args", [{"comparisons": 0}, {"comparisons": "some"}, {"comparisons": True}, {"question": " "}, {"aggregate": "x"}]
)
def test_bad_arguments_are_refused_by_name(args: dict[str, Any]) -> None:
    with pytest.raises(JudgeError, match=next(iter(args))):
        Person.check(**args)


def test_it_is_found_by_its_name() -> None:
    judge = load_judge("person", {"who": "ann"})
    assert judge.name == "person:ann"
    assert judge.version


@pytest.fixture
def tasks(tmp_path: Path) -> list[Task]:
    asked = [plan(g, comparisons=1, question="Which?", who="", seed=0).tasks[0] for g in groups_of_two(6)]
    Reviews(tmp_path).ask(asked)
    return asked


def post(url: str, action: str, **fields: str) -> Any:
    request = urllib.request.Request(url + action, json.dumps(fields).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as reply:
        return json.load(reply)


def test_tabs_get_different_tasks_and_a_double_submit_counts_once(tmp_path: Path, tasks: list[Task]) -> None:
    with review_server(Desk(tmp_path)) as url:
        one, two = (post(url, "next", tab=tab) for tab in ("one", "two"))
        assert one["task"]["id"] != two["task"]["id"]
        assert (one["done"], one["total"]) == (0, 6)
        first = post(url, "verdict", tab="one", task=one["task"]["id"], choice="left", note="why")
        second = post(url, "verdict", tab="one", task=one["task"]["id"], choice="right")
        assert (first["accepted"], second["accepted"]) == (True, False)
        assert first["done"] == second["done"] == 1
        assert post(url, "verdict", tab="one", task="nonsense", choice="left")["error"]
        assert post(url, "verdict", tab="one", task=first["task"]["id"], choice="undo")["error"]
        back = post(url, "undo", tab="one", task=one["task"]["id"])
        assert (back["task"]["id"], back["done"]) == (one["task"]["id"], 0)
    [batch] = Reviews(tmp_path).batches()
    rows = [json.loads(line) for line in (batch.path / "verdicts.jsonl").read_text().splitlines()]
    assert [row["choice"] for row in rows] == ["left", "undo"]


def test_one_persons_pairs_are_not_shown_to_another(tmp_path: Path) -> None:
    for who in ("ann", "bob"):
        Reviews(tmp_path).ask(plan(groups_of_two(1)[0], comparisons=1, question="?", who=who, seed=0).tasks)
    desk = Desk(tmp_path, who="bob")
    assert desk.pending() == 1
    task = desk.next("tab")["task"]
    assert desk.submit("tab", task["id"], "left", "")["task"] is None


def test_requests_without_the_token_from_other_hosts_or_pages_are_refused(tmp_path: Path, tasks: list[Task]) -> None:
    with review_server(Desk(tmp_path)) as url:
        base, token = url.rstrip("/").rsplit("/", 1)
        port = int(base.rsplit(":", 1)[1])

        def status(path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> int:
            connection = HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request(method, path, body, {k.capitalize(): v for k, v in headers.items()})
            return connection.getresponse().status

        assert status(f"/{token}/") == 200
        assert status("/") == status("/wrong/") == status(f"/{token}x/") == 404
        assert status(f"/{token}/next") == 404
        assert status("/wrong/next", "POST", b"{}") == 404
        assert status(f"/{token}/", host=f"evil.example:{port}") == 403
        assert status(f"/{token}/", host="localhost:9999") == 200  # an ssh tunnel
        assert status(f"/{token}/next", "POST", b"{}", origin="https://evil.example") == 403
        assert status(f"/{token}/next", "POST", b"{}", origin=f"http://127.0.0.1:{port}") == 200
        assert status(f"/{token}/next", "POST", b"not json") == 400
        assert status(f"/{token}/next", "POST", b"[]") == 400
        assert status(f"/{token}/next", "POST", b" " * 100_000) == 400
        with urllib.request.urlopen(url, timeout=10) as reply:
            policy = reply.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy
            assert reply.headers["X-Frame-Options"] == "DENY"
            assert reply.headers["Cache-Control"] == "no-store"


# Limits of the page


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    monkeypatch.setattr(page, "SECONDS", 0.3)
    monkeypatch.setattr(page, "CONNECTIONS", 4)
    (tmp_path / "review").mkdir()
    with review_server(Desk(tmp_path)) as url:
        yield "127.0.0.1", int(url.split(":")[2].partition("/")[0])


def is_closed(connection: socket.socket) -> bool:
    connection.settimeout(20)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def is_answered(connection: socket.socket) -> bool:
    """Whether a request is refused, and its connection kept. Reads the whole answer, which may come in parts."""
    connection.sendall(b"GET /x HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n")
    answer = b""
    while not answer.endswith(b"not found\n"):
        if not (some := connection.recv(4096)):
            return False
        answer += some
    return answer.startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ",
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1:1\r\nContent-Length: 9\r\n\r\n{",
    ],
)
def test_a_request_that_is_not_whole_in_time_ends_its_connection(address: tuple[str, int], sent: bytes) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(sent)
        received = b""
        connection.settimeout(20)
        with contextlib.suppress(ConnectionResetError):
            while some := connection.recv(4096):
                received += some
        assert not received or received.startswith(b"HTTP/1.1 4")


def test_more_connections_than_the_page_takes_are_closed_at_once(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "SECONDS", 60.0)
    with contextlib.ExitStack() as stack:
        first = [stack.enter_context(socket.create_connection(address)) for _ in range(4)]
        assert all(is_answered(connection) for connection in first)  # each is taken before the next comes
        assert is_closed(stack.enter_context(socket.create_connection(address)))
        assert is_answered(first[0])


def test_headers_longer_than_a_request_may_be_are_refused(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * 4 * page.LIMIT)
        connection.settimeout(20)
        try:
            answer = connection.recv(4096)
        except ConnectionResetError:
            answer = b""
        assert not answer or answer.startswith(b"HTTP/1.1 4")


def test_tabs_that_ask_are_forgotten_the_oldest_first(tmp_path: Path) -> None:
    reviews = Reviews(tmp_path)
    reviews.ask([Task("1", "ann", "Which?", "A", left="a", right="b")])
    desk = Desk(tmp_path)
    for number in range(page.CONNECTIONS + 10):
        desk.next(f"tab {number}")
    assert list(desk._shown) == [f"tab {number}" for number in range(10, page.CONNECTIONS + 10)]
