"""A judge behind an HTTP address: `use: remote`, `args: {url: "http://localhost:8001/judge"}`.

It is sent, by POST, some groups at a time:

    {"groups": [{"prompt": {"id": "p-1f0c…", "text": "2+2?", "columns": {"gold": "4"}},
                 "completions": [{"text": "It is 4", "tokens": 5, "finish_reason": "stop"},
                                 {"text": "5", "tokens": 1, "finish_reason": "stop"}]}]}

and answers with a judgment for each group, with a score for each completion, both in their order:

    {"judgments": [{"scores": [1.0, null], "reasons": [null, "no number in it"]}]}

A prompt of chat messages has `messages`, `[{"role": "user", "content": "2+2?"}]`, in the place of `text`. `tokens` is a
number, and `finish_reason` is "stop", or "length" for a completion that was cut off. A score of null abstains; `reasons`
may be left out. docs/judges.md has a whole server in ten lines.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from iterdpo.errors import JudgeError
from iterdpo.types import CompletionGroup, Judgment
from judges.adapter import Abstention, judgment_from_outcomes
from judges.llm.client import REFUSED, RETRIED, connection_reason, in_own_loop, retry_after_seconds, run_each

if TYPE_CHECKING:
    import aiohttp

LONGEST_WAIT = 60.0
"""Seconds between two attempts, at most, whatever a server asks for."""


@dataclass(eq=False, repr=False)
class Remote:
    """Asks a server of yours; see the module for what goes to and fro.

    HTTP 408, 409, 425, 429 and 5xx, time-outs, connections that break and replies that are no JSON are tried again, and
    abstain in the end; a request that is refused with 400, 413 or 422 abstains. What cannot be a passing fault stops the
    run: any other status, and a reply of another shape than the one above. A score that is no finite number abstains.
    """

    url: str
    """The address that the groups are sent to."""
    api_key_env: str | None = None
    """The NAME of the environment variable with the key, sent as `Authorization: Bearer KEY`."""
    revision: str | int | None = None
    """Part of this judge's version; change it when what the server does has changed."""
    comparative: bool = False
    """The scores mean "against the others of this group"."""
    timeout: float = 60
    """Seconds for one attempt."""
    attempts: int = 5
    """Of one request."""
    concurrency: int = 8
    """Requests at once."""
    batch_size: int = 8
    """Groups in one request."""

    SPEED_ONLY = frozenset({"api_key_env", "timeout", "attempts", "concurrency", "batch_size"})
    needs_device = False

    def __post_init__(self) -> None:
        parts = urlsplit(self.url) if isinstance(self.url, str) else urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise JudgeError("remote: url is no address; it reads http://host:port/path")
        if parts.username is not None:  # not repeated: it may be a key
            raise JudgeError("remote: url has a user or a password; name the key's environment variable in api_key_env")
        if self.api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", str(self.api_key_env)):
            raise JudgeError(
                "remote: api_key_env is the name of an environment variable, in capitals: MY_JUDGE_KEY. The key itself "
                "belongs into the environment, never into a configuration"
            )
        if not isinstance(self.timeout, int | float) or self.timeout <= 0:
            raise JudgeError(f"remote: timeout is {self.timeout!r}; it is a number of seconds above 0")
        for name in ("attempts", "concurrency", "batch_size"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise JudgeError(f"remote: {name} is {value!r}; it is a number of at least 1")
        self.name = f"remote:{parts.netloc}"
        self.version = ""
        self._usage: dict[str, float] = {"calls": 0, "retries": 0, "failed": 0}

    @classmethod
    def check(cls, **args: Any) -> None:
        """Refuse bad arguments: the constructor does, and asks nobody.

        Raises:
            JudgeError: naming the argument.
        """
        cls(**args)

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        """One judgment for each group.

        Raises:
            JudgeError: the key is missing or refused, nothing answers such requests at the address, or the reply has
                another shape.
        """
        return list(self.judge_each(groups))

    def judge_each(self, groups: Iterable[CompletionGroup]) -> Generator[Judgment]:
        """The same one after the other, while requests with further groups are under way."""
        headers = {"Content-Type": "application/json", **self._authorization()}
        with closing(in_own_loop(self._ask_each(groups, headers))) as answers:
            for judgments in answers:
                yield from judgments

    def usage(self) -> dict[str, float]:
        return dict(self._usage)

    def _authorization(self) -> dict[str, str]:
        """Made for each stage's requests, because the key is kept nowhere."""
        if self.api_key_env is None:
            return {}
        key = os.environ.get(self.api_key_env, "").strip()
        if not key or not (key.isascii() and key.isprintable()):
            raise JudgeError(f"remote: the environment variable {self.api_key_env} (api_key_env) has no key; set it")
        return {"Authorization": f"Bearer {key}"}

    async def _ask_each(
        self, groups: Iterable[CompletionGroup], headers: dict[str, str]
    ) -> AsyncGenerator[list[Judgment]]:
        import aiohttp

        limit = aiohttp.ClientTimeout(total=self.timeout)
        local = urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")
        rest = iter(groups)
        async with aiohttp.ClientSession(headers=headers, timeout=limit, trust_env=not local) as session:
            batches = iter(lambda: list(islice(rest, self.batch_size)), [])
            jobs = (partial(self._ask, session, batch) for batch in batches)
            async with aclosing(run_each(jobs, concurrency=self.concurrency)) as judged:
                async for judgments in judged:
                    yield judgments

    async def _ask(self, session: aiohttp.ClientSession, batch: Sequence[CompletionGroup]) -> list[Judgment]:
        import aiohttp

        payload = json.dumps({"groups": [_request(group) for group in batch]}, default=str).encode()
        reason, wait = "", 0.0
        for attempt in range(self.attempts):
            if attempt:
                self._usage["retries"] += 1
                # Full jitter; it changes no score, and so has no seed.
                await asyncio.sleep(min(LONGEST_WAIT, max(wait, random.uniform(0, 0.5 * 2**attempt))))
            self._usage["calls"] += 1
            wait = 0.0
            try:
                async with session.post(self.url, data=payload, allow_redirects=False) as response:
                    data = await response.read()
            except TimeoutError:
                reason = f"timed out after {self.timeout:g} s"
                continue
            except (aiohttp.ClientError, OSError) as error:
                reason = connection_reason(error)
                continue
            status = response.status
            if 200 <= status < 300:
                try:
                    reply = json.loads(data, parse_int=float)  # an integer too long for a float becomes infinite
                except (ValueError, RecursionError):
                    reason = "the reply was cut off, or no JSON"
                    continue
                return _judgments(batch, reply, self.url)
            reason = f"HTTP {status}"
            if status in RETRIED or status >= 500:
                wait = retry_after_seconds(response.headers.get("Retry-After"))
                continue
            if status in REFUSED:
                break
            raise JudgeError(f"remote: {self.url} answers HTTP {status}; check its address, and its key (api_key_env)")
        self._usage["failed"] += 1
        return [judgment_from_outcomes(g, [Abstention(reason)] * len(g.completions)) for g in batch]


def _request(group: CompletionGroup) -> dict[str, Any]:
    prompt = group.prompt
    content = {"messages" if prompt.conversational else "text": prompt.content}
    return {
        "prompt": {"id": prompt.id, **content, "columns": prompt.columns},
        "completions": [
            {"text": c.text, "tokens": len(c.token_ids), "finish_reason": c.finish_reason} for c in group.completions
        ],
    }


def _judgments(batch: Sequence[CompletionGroup], reply: Any, url: str) -> list[Judgment]:
    """A parsed reply as judgments.

    Raises:
        JudgeError: it has another shape.
    """

    def listed(found: Any, key: str, count: int, what: str) -> list[Any]:
        values = found.get(key) if isinstance(found, dict) else None
        if not isinstance(values, list) or len(values) != count:
            got = f"{len(values)} of them" if isinstance(values, list) else type(found if values is None else values)
            raise JudgeError(
                f"remote: {url} must answer with a list `{key}`, one for each of {count} {what}; it has {got}"
            )
        return values

    judged = []
    for group, row in zip(batch, listed(reply, "judgments", len(batch), "groups"), strict=True):
        count = len(group.completions)
        scores = listed(row, "scores", count, "completions")
        reasons = [None] * count if row.get("reasons") is None else listed(row, "reasons", count, "completions")
        outcomes = [
            Abstention(str(reason)[:200]) if score is None and reason else score
            for score, reason in zip(scores, reasons, strict=True)
        ]
        judged.append(judgment_from_outcomes(group, outcomes))
    return judged
