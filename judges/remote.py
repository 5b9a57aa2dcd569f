"""A judge at an HTTP address: `use: remote`, `args: {url: "http://localhost:8001/judge"}`.

It is sent, by POST, some groups at a time:

    {"groups": [{"prompt": {"id": "p-1f0c…", "text": "2+2?", "columns": {"gold": "4"}},
                 "completions": [{"text": "It is 4", "tokens": 5, "finish_reason": "stop"},
                                 {"text": "5", "tokens": 1, "finish_reason": "stop"}]}]}

and answers with a judgment for each group, with a score for each completion, both in their order:

    {"judgments": [{"scores": [1.0, null], "reasons": [null, "no number in it"]}]}

A prompt of chat messages has `messages`, `[{"role": "user", "content": "2+2?"}]`, in the place of `text`. `tokens` is a
number, and `finish_reason` is "stop", "length" for a completion that was cut off, or "thought" for one that is a thought
without an end. A score of null abstains; `reasons`
may be left out. docs/judges.md has a whole server in ten lines.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from iterdpo.errors import JudgeError
from iterdpo.judging.judge import JudgeBase
from iterdpo.types import CompletionGroup, Judgment
from judges.base import Abstention, judgment_from_outcomes
from judges.llm.transport import (
    REFUSED,
    Failure,
    authorization,
    brief_pause,
    checked_key_name,
    in_own_loop,
    post,
    run_each,
    with_retries,
)

if TYPE_CHECKING:
    import aiohttp

PROBE = 30.0
"""Seconds in which the server must answer before a run begins."""
LONGEST_WAIT = 60.0
"""Seconds between two attempts, at most, whatever a server asks for."""


@dataclass(eq=False, repr=False)
class Remote(JudgeBase):
    """Asks your own server; the module's docstring shows a request and its reply.

    HTTP 408, 409, 425, 429 and 5xx, time-outs, connections that break and replies that are not JSON are tried again, and
    abstain in the end; a request that is refused with 400, 413 or 422 abstains. A lasting fault stops the run: any
    other status, and a reply of another shape. A score that is not a finite number abstains.
    """

    SPEED_ONLY = frozenset({"api_key_env", "timeout", "attempts", "concurrency", "batch_size"})
    needs_device = False
    ahead = True
    url: str
    """The address that the groups are sent to."""
    api_key_env: str | None = None
    """The NAME of the environment variable with the key, sent as `Authorization: Bearer KEY`."""
    revision: str | int | None = None
    """Part of this judge's version; change it whenever your server scores differently."""
    comparative: bool = False
    """The scores mean "against the others of this group"."""
    timeout: float = 60
    """Seconds for one attempt."""
    attempts: int = 5
    """Attempts of one request."""
    concurrency: int = 8
    """Requests at once."""
    batch_size: int = 8
    """Groups in one request."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url) if isinstance(self.url, str) else urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise JudgeError("remote: url is not a valid address; give http://host:port/path")
        if parts.username is not None:  # not repeated: it may be a key
            raise JudgeError("remote: url has a user or a password; name the key's environment variable in api_key_env")
        if self.api_key_env is not None:
            try:
                checked_key_name(str(self.api_key_env))
            except ValueError as error:
                raise JudgeError(f"remote: api_key_env {error}") from None
        if not isinstance(self.timeout, int | float) or self.timeout <= 0:
            raise JudgeError(f"remote: timeout is {self.timeout!r}; it must be a number of seconds above 0")
        for name in ("attempts", "concurrency", "batch_size"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise JudgeError(f"remote: {name} is {value!r}; it must be a whole number of at least 1")
        self.name = f"remote:{parts.netloc}"
        self._usage: dict[str, float] = {"calls": 0, "retries": 0, "failed": 0}

    @classmethod
    def probe(cls, *positional: Any, **args: Any) -> None:
        """Send the server a request without groups.

        Raises:
            JudgeError: nothing answers such requests at the address, or the key is refused.
        """
        asyncio.run(cls(*positional, **args)._probe())

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        """One judgment for each group.

        Raises:
            JudgeError: the key is missing or refused, nothing answers such requests at the address, or the reply has
                another shape.
        """
        return list(self.judge_each(groups))

    def judge_each(self, groups: Iterable[CompletionGroup]) -> Generator[Judgment]:
        """The same judgments one after the other, while requests with further groups are under way."""
        headers = {"Content-Type": "application/json", **authorization(self.api_key_env, owner="remote")}
        with closing(in_own_loop(self._ask_each(groups, headers))) as judgments:
            yield from judgments

    def usage(self) -> dict[str, float]:
        return dict(self._usage)

    async def _ask_each(self, groups: Iterable[CompletionGroup], headers: dict[str, str]) -> AsyncGenerator[Judgment]:
        rest = iter(groups)
        batches = iter(lambda: list(islice(rest, self.batch_size)), [])
        async with self._session(headers) as session:
            jobs = (partial(self._ask, session, batch) for batch in batches)
            async with aclosing(run_each(jobs, concurrency=self.concurrency)) as judged:
                async for judgments in judged:
                    for judgment in judgments:
                        yield judgment

    def _session(self, headers: dict[str, str]) -> aiohttp.ClientSession:
        import aiohttp

        local = urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")
        return aiohttp.ClientSession(headers=headers, trust_env=not local)

    async def _probe(self) -> None:
        headers = {"Content-Type": "application/json", **authorization(self.api_key_env, owner="remote")}
        async with self._session(headers) as session:

            async def attempt() -> tuple[int, bytes] | Failure:
                limit = min(self.timeout, PROBE)
                return await post(session, self.url, b'{"groups": []}', seconds=limit, limit=limit, headers={})

            answer = await with_retries(attempt, brief_pause, 3, 1.0, 1.0)
        if isinstance(answer, Failure) and not answer.reason.startswith("HTTP "):  # a status is an answer
            raise JudgeError(
                f"remote: {self.url}: asked before the run begins: {answer.reason}; start the server, or check url"
            )
        if not isinstance(answer, Failure) and answer[0] not in REFUSED and not 200 <= answer[0] < 300:
            raise JudgeError(_answers(self.url, answer[0]))

    async def _ask(self, session: aiohttp.ClientSession, batch: Sequence[CompletionGroup]) -> list[Judgment]:
        payload = json.dumps({"groups": [_request(group) for group in batch]}, default=str).encode()

        async def attempt() -> list[Judgment] | Failure:
            self._usage["calls"] += 1
            answer = await post(session, self.url, payload, seconds=self.timeout, limit=self.timeout, headers={})
            if isinstance(answer, Failure):
                return answer
            status, data = answer
            if 200 <= status < 300:
                try:
                    reply = json.loads(data, parse_int=float)  # an integer too long for a float becomes infinite
                except (ValueError, RecursionError):
                    return Failure("the reply was cut off, or no JSON")
                return _judgments(batch, reply, self.url)
            if status in REFUSED:
                return Failure(f"HTTP {status}", retry=False)
            raise JudgeError(_answers(self.url, status))

        async def pause(seconds: float, failure: Failure) -> None:
            self._usage["retries"] += 1
            await asyncio.sleep(min(LONGEST_WAIT, seconds))

        outcome = await with_retries(attempt, pause, self.attempts, 1.0, LONGEST_WAIT)
        if isinstance(outcome, Failure):
            self._usage["failed"] += 1
            return [judgment_from_outcomes(g, [Abstention(outcome.reason)] * len(g.completions)) for g in batch]
        return outcome


def _answers(url: str, status: int) -> str:
    return f"remote: {url} answers HTTP {status}; check its address, and its key (api_key_env)"


def _request(group: CompletionGroup) -> dict[str, Any]:
    prompt = group.prompt
    content = {"messages" if prompt.conversational else "text": prompt.content}
    shown = [{"text": c.text, "tokens": len(c.answer_ids), "finish_reason": c.finish_reason} for c in group.completions]
    return {"prompt": {"id": prompt.id, **content, "columns": prompt.columns}, "completions": shown}


def _judgments(batch: Sequence[CompletionGroup], reply: Any, url: str) -> list[Judgment]:
    """A parsed reply as judgments. Raises JudgeError if it has another shape."""

    def listed(found: Any, key: str, count: int, what: str) -> list[Any]:
        values = found.get(key) if isinstance(found, dict) else None
        if not isinstance(values, list) or len(values) != count:
            got = f"{len(values)} of them" if isinstance(values, list) else type(found if values is None else values)
            wanted = f"must answer with a list `{key}`, one for each of {count} {what}"
            raise JudgeError(f"remote: {url} {wanted}; it has {got}")
        return values

    judged = []
    for group, row in zip(batch, listed(reply, "judgments", len(batch), "groups"), strict=True):
        count = len(group.completions)
        scores = listed(row, "scores", count, "completions")
        reasons = [None] * count if row.get("reasons") is None else listed(row, "reasons", count, "completions")
        said = zip(scores, reasons, strict=True)
        outcomes = [Abstention(str(why)[:200]) if score is None and why else score for score, why in said]
        judged.append(judgment_from_outcomes(group, outcomes))
    return judged
