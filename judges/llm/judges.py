"""Language models as judges, over any OpenAI-compatible endpoint: pairwise, by a rubric, or ranking all at once.

A verdict is constrained by the server's decoder if that can (`structured_outputs` of vLLM, JSON schemas elsewhere),
parsed otherwise, or soft: read off the probabilities of the verdict's tokens. A reply without a verdict is an abstention
with its reason; it never becomes a number. Prompts are files that users copy and edit (judges/llm/prompts).
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import os
import random
import re
import urllib.request
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from iterdpo.errors import JudgeError
from iterdpo.judging.comparisons import UNCOMPARED, Aggregate, judgment_from_comparisons, resolve_comparisons
from iterdpo.judging.judge import JudgeBase, Waiting
from iterdpo.run.devices import check_devices
from iterdpo.run.rundir import RunDir
from iterdpo.seeds import derive_seed
from iterdpo.types import Comparison, CompletionGroup, Judgment, Prompt
from judges.base import Abstention, check_choice, is_number, judgment_from_outcomes
from judges.llm.client import CallFailed, Client, CountingClient, probe, refused
from judges.llm.parsing import Unclear, read_with
from judges.llm.parsing.scores import parse_ranking, parse_scores
from judges.llm.parsing.verdict import ReplyVerdict, parse_verdict
from judges.llm.reply import Reply, mean_of
from judges.llm.server import Server, ServerSettings
from judges.llm.settings import Endpoint
from judges.llm.templates import Kind, load_template, principles, read_text
from judges.llm.transport import in_own_loop, run_each
from judges.schedules import LOST_COIN_FLIP, Knockout, random_pairs

Constrain = Literal["auto", "structured_outputs", "json_schema", "none"]
REVISION = 5
"""Number of the prompts' and parsers' revision, part of every version: raise it if scores could change."""
REASONING_TOKENS = 512
CUT = "cut off at max_tokens"
NOT_ASKED = Unclear("not asked")
NO_MATCH = Unclear("no match of `pattern`")
TWO_MATCHES = Unclear("several matches of `pattern`")
FIRST_TOKEN: dict[str, Any] = {"logprobs": True, "top_logprobs": 20, "max_tokens": 1}
"""Request fields for reading probabilities. 20 candidates are the most that OpenAI's API gives."""

T = TypeVar("T")


@functools.cache
def _adapter(type_: Any) -> TypeAdapter[Any]:
    return TypeAdapter(type_)


@dataclass(kw_only=True, eq=False, repr=False)
class LLMJudge(JudgeBase):
    """What they have in common: the endpoint, the prompt, and how a reply is held to its form."""

    statement: ClassVar[str]
    kind: ClassVar[Kind]
    dry_reply: ClassVar[str | None] = None
    """What `forecast` takes as the replies, if further calls depend on them."""
    ahead = True
    model: str
    """The name that the endpoint knows it by, or with `serve` a checkpoint."""
    prompt: str
    """A shipped prompt, or your own file."""
    endpoint: Mapping[str, Any] | None = None
    """The server's address and limits; see `judges.llm.settings.Endpoint`."""
    serve: Mapping[str, Any] | None = None
    """Start a vLLM server for it here in place of an endpoint; see `judges.llm.server.ServerSettings`."""
    constrain: Constrain = "auto"
    """How replies are held to their form. `auto` takes vLLM's structured outputs if vLLM answers; with another server the judge
    may reason first, and its last line is parsed."""
    temperature: float = 0.0
    """Temperature of the judge's own sampling."""
    max_tokens: int | None = None
    """Longest reply. Default: what the form needs, and 512 if the judge may reason."""
    seed: int = 0
    """Seed of the judge's own sampling, and of everything that it draws."""
    pattern: str | None = None
    """A regular expression, in the syntax of the package `regex`, for replies in a form of your own. The group of its last
    match is read as if it stood after `Verdict: ` (`Score: `, `Ranking: `); a group named A, B or tie is that verdict."""

    def __post_init__(self) -> None:
        self._check_types()
        self.name = f"{self.kind}:{Path(self.model).name}"
        self.client = Client(Endpoint(**(self.endpoint or {})), model=self.model)
        self.needs_device = self.serve is not None
        if self.needs_device == (self.client.base_url is not None):
            address = "`endpoint: {base_url: http://…/v1}`, the address of a server"
            raise JudgeError(f"judge {self.kind!r}: give either {address}, or `serve: {{}}`, to start one here")
        self.server = None if self.serve is None else Server(self.model, ServerSettings(**self.serve))
        self.template = load_template(self.prompt, self.kind)
        self._texts: Sequence[str | None] = ()  # what further files say that decides the scores
        self._held: Constrain | None = None if self.constrain == "auto" else self.constrain
        if self.pattern is not None:
            self._check_pattern(self.pattern)

    def _check_types(self) -> None:
        """Refuse an argument of another type than its field's, such as an address as `endpoint`."""
        types = get_type_hints(type(self))
        for argument in fields(self):
            value = getattr(self, argument.name)
            try:
                _adapter(types[argument.name]).validate_python(value, strict=True)
                continue
            except ValidationError as error:
                first = error.errors(include_input=False, include_url=False)[0]
            place = "".join(f".{part}" for part in first["loc"] if part in value) if isinstance(value, dict) else ""
            remedy = {"endpoint": ", such as {base_url: http://…/v1}", "serve": ", such as {}"}.get(argument.name, "")
            shown = "" if remedy else f" is {value!r}"  # an endpoint may have a secret in the wrong place
            said = first["msg"].lower().replace("dictionary", "mapping")
            raise JudgeError(f"judge {self.kind!r}: {argument.name}{place}{shown}: {said}{remedy}")

    def _check_pattern(self, pattern: str) -> None:
        import regex

        try:
            groups = regex.compile(pattern).groups
        except regex.error as error:
            raise JudgeError(f"judge {self.kind!r}: the pattern {pattern!r} is not valid: {error}") from None
        if not groups:
            raise JudgeError(f"judge {self.kind!r}: the pattern {pattern!r} has no group; put ( ) around what to read")
        if self.constrain in ("structured_outputs", "json_schema"):
            raise JudgeError(f"judge {self.kind!r}: `pattern` reads free replies; remove it, or `constrain`")
        self._held = "none"

    @classmethod
    def probe(cls, **args: Any) -> None:
        """Ask the endpoint once; of a judge that is served here, count the devices.

        Raises:
            JudgeError: there is no answer, or the key or the model is refused.
        """
        judge = cls(**args)
        if judge.server is None:
            asyncio.run(probe(judge.client.endpoint, judge.model))
        else:
            check_devices(judge.server.settings.tensor_parallel_size, f"judge {cls.kind!r}: serve.tensor_parallel_size")

    @classmethod
    def key(cls, **args: Any) -> Any:
        """What decides the scores: neither the server's address nor its limits."""
        judge = cls(**args)
        rest = {k: v for k, v in args.items() if k not in ("endpoint", "serve", "prompt", "constitution", "rubric")}
        rest["model"] = os.path.expanduser(judge.model)  # a checkpoint counts with its content, if it is found
        if judge.server is not None:
            rest["served"] = judge.server.settings.model_dump(include={"dtype", "max_model_len", "extra"})
        return [REVISION, rest, judge.client.endpoint.extra, judge.template.source, *judge._texts]

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        """One judgment for each group. Calls run side by side, as many as `endpoint.concurrency` says.

        Raises:
            JudgeError: the endpoint refuses every call: no key, no such model.
        """
        return list(self.judge_each(groups))

    def judge_each(self, groups: Iterable[CompletionGroup]) -> Generator[Judgment]:
        """The same one after the other, while those of further groups are under way.

        If the endpoint is down, the groups taken so far abstain; then it gets another chance, and our own server a new start.
        """
        rest = iter(groups)

        def until_down(first: CompletionGroup) -> Iterator[CompletionGroup]:
            yield first
            while not self.client.down and (group := next(rest, None)) is not None:
                yield group

        while (first := next(rest, None)) is not None:
            if self.server is not None:
                self.client.base_url = self.server.start()
            if self._held is None:
                self._held = "structured_outputs" if _is_vllm(str(self.client.base_url)) else "none"
            with closing(in_own_loop(self._judge_each(until_down(first)))) as judgments:
                yield from judgments

    async def _judge_each(self, groups: Iterable[CompletionGroup]) -> AsyncGenerator[Judgment]:
        concurrency = self.client.endpoint.concurrency
        # So that the first calls are under way before the last question is written. Those that wait to be tried again
        # count, so there are some more than the endpoint may be asked at once.
        self._outstanding = asyncio.Semaphore(4 * concurrency)
        jobs = (functools.partial(self._judge_group, group) for group in groups)
        async with self.client, aclosing(run_each(jobs, concurrency=concurrency)) as judgments:
            async for judgment in judgments:
                yield judgment

    async def _judge_group(self, group: CompletionGroup) -> Judgment:
        raise NotImplementedError

    def forecast(self, groups: Sequence[CompletionGroup]) -> dict[str, float]:
        """What `usage` would be after judging these groups, and whether the endpoint has prices as `priced`; sends nothing.

        Tokens are estimates of the requests, and the longest replies. Unreadable replies, which are asked for once more, and
        the cache are left aside. The judge is of no other use afterwards.
        """
        endpoint, self.server, self.pattern = self.client.endpoint, None, None
        self._held = self._held or ("structured_outputs" if self.serve is not None else "none")
        self.client = CountingClient(endpoint, model=self.model, reply=self.dry_reply)
        self.judge(groups)
        return {**self.usage(), "priced": bool(endpoint.price_in or endpoint.price_out)}

    def begin_stage(self) -> None:
        """Budgets and the deadline of the stage begin anew."""
        self.client.begin_stage()

    def attach(self, run_dir: Path, waiting: Waiting) -> None:
        """The server of a run's judge writes its log into the run."""
        if self.server is not None:
            self.server.log = RunDir(run_dir).log_path(f"judge-{self.kind}-{Path(self.model).name}")

    def usage(self) -> dict[str, float]:
        return self.client.usage()

    def close(self) -> None:
        """Release the device of the judge's server. The next judgment wakes the server."""
        if self.server is not None:
            self.server.release()

    async def _ask(self, read: Callable[[Reply], T | Unclear], values: Mapping[str, Any], **body: Any) -> T | Unclear:
        """`read` of the reply, or why there is none.

        A reply that `read` finds unclear is not kept in the cache, and is asked for once more: with another seed, and at
        0.5 in place of temperature 0, which would give the same reply. Probabilities do not depend on either.
        """
        # Another checkpoint may have come to lie at the same path; the version knows its content.
        salt = f"{self.version if self.server else ''} {self.repeat or ''}".strip()
        fields = {"temperature": self.temperature, "seed": self.seed, **body}
        again = {"temperature": self.temperature or 0.5, "seed": self.seed + 1, **body}
        result: T | Unclear = NOT_ASKED
        async with self._outstanding:
            messages = self.template.render(**values)
            for instead in [None] if "logprobs" in body else [None, again]:

                def keep(reply: Reply) -> bool:
                    return not isinstance(read(reply), Unclear)

                try:
                    reply = await self.client.chat(messages, salt=salt, keep=keep, instead=instead, **fields)
                except CallFailed as failure:
                    return Unclear(failure) if result is NOT_ASKED else result
                if self.trace is not None:
                    self.trace.append({"messages": messages, "reply": reply.text, "body": instead or fields})
                if not isinstance(result := read(reply), Unclear):
                    break
        return result

    def _whole(self, parse: Callable[[str], T | Unclear]) -> Callable[[Reply], T | Unclear]:
        """Reads a whole reply, or what `pattern` finds in it. Of one that was cut off nothing: "1" may have been to be 10."""

        def own(text: str) -> T | Unclear:
            import regex

            try:
                *_, last = regex.finditer(str(self.pattern), text, timeout=1)
            except (ValueError, TimeoutError):
                return NO_MATCH
            said = last.lastgroup if last.lastgroup in ("A", "B", "tie") else last[last.lastindex or 1]
            return parse(f"{self.statement}: {said}")

        def read(reply: Reply) -> T | Unclear:
            if reply.finish_reason == "length":
                return Unclear(CUT)
            return parse(reply.text) if self.pattern is None else read_with(reply.text, own, several=TWO_MATCHES)

        return read

    def _first_token(self, values: Mapping[str, float]) -> Callable[[Reply], float | Unclear]:
        """Reads the mean of the values under the probabilities of a reply's first token."""

        def read(reply: Reply) -> float | Unclear:
            if not any(reply.top_logprobs[:1]):
                return Unclear("the endpoint gave no probabilities")
            mean = mean_of(values, reply.top_logprobs[0])
            return Unclear(f"no {self.statement.lower()}") if mean is None else mean

        return read

    def _limits(self, *, choices: Sequence[str] | None, schema: dict[str, Any], longest: int = 16) -> dict[str, Any]:
        """What holds the reply to its form: to one of `choices`, or to a JSON `schema`; and how long it may be."""
        match self._held:
            case "structured_outputs":
                held: dict[str, Any] = {"json": schema} if choices is None else {"choice": list(choices)}
                return {"structured_outputs": held, "max_tokens": self.max_tokens or longest}
            case "json_schema":
                held = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}
                return {"response_format": held, "max_tokens": self.max_tokens or longest + 16}
        return {"max_tokens": self.max_tokens or REASONING_TOKENS}

    def _seed(self, group: CompletionGroup, *what: Any) -> int:
        return derive_seed(self.seed, self.kind, group.prompt.id, *what)

    def _values(self, prompt: Prompt, *, first_token: bool = False) -> dict[str, Any]:
        shown = {"prompt": prompt.text, "messages": prompt.messages, "columns": prompt.columns}
        return {**shown, "constrained": first_token or self._held != "none"}


@dataclass(kw_only=True, eq=False, repr=False)
class PairwiseJudge(LLMJudge):
    """Compares two completions at a time, each two in both orders; a verdict that changes with the order is a tie."""

    kind = "pairwise"
    statement = "Verdict"
    dry_reply = "Verdict: A"
    comparative = True
    EXPECTED_ABSTENTIONS = (LOST_COIN_FLIP, UNCOMPARED)
    prompt: str = "helpfulness"
    """`helpfulness`, `harmlessness`, `summarization`, `instruction_following`, or your own file."""
    schedule: Literal["all_pairs", "random_pairs", "knockout"] = "all_pairs"
    comparisons: int | None = None
    """Pairs a prompt of `random_pairs`."""
    aggregate: Aggregate = "win_rate"
    """How comparisons become scores; a knock-out scores in its own way."""
    soft: bool = False
    """Read the probability of a win off the verdict's token in place of a verdict."""
    ties: bool = True
    """Whether the judge may say "tie"."""
    constitution: str | None = None
    """A file of principles, one a line, one drawn for each comparison. Default: the shipped one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        counted = isinstance(self.comparisons, int) and self.comparisons > 0
        if not (counted if self.schedule == "random_pairs" else self.comparisons is None):
            wrong = "`comparisons` (1 or more) is required by `schedule: random_pairs`, and only allowed there"
            raise JudgeError(f"judge 'pairwise': {wrong}")
        shows_principle = "principle" in self.template.needs
        if self.constitution is not None and not shows_principle:
            raise JudgeError("judge 'pairwise': this prompt has no {{ principle }}, so `constitution` would do nothing")
        if self.pattern is not None and self.soft:
            raise JudgeError("judge 'pairwise': `soft` reads one token, not a reply; remove it, or `pattern`")
        self.principles = principles(self.constitution) if shows_principle else []
        self._texts = self.principles
        self.labels = ["A", "B", "tie"] if self.ties and not self.soft else ["A", "B"]

    async def _judge_group(self, group: CompletionGroup) -> Judgment:
        count = len(group.completions)
        if self.schedule == "knockout":
            knockout, comparisons = Knockout(count, seed=self._seed(group, "knockout")), []
            while matches := knockout.matches():
                fresh = await self._compare_all(group, matches)
                comparisons += fresh
                results = {(r.i, r.j): r for r in resolve_comparisons(fresh)}
                knockout.record([results[min(pair), max(pair)] for pair in matches])
            return knockout.judgment(group, comparisons)
        pairs = list(itertools.combinations(range(count), 2))
        if self.schedule == "random_pairs":
            pairs = random_pairs(count, self.comparisons or 0, seed=self._seed(group, "pairs"))
        compared = await self._compare_all(group, pairs)
        return judgment_from_comparisons(group, compared, aggregate=self.aggregate, is_permanent=refused)

    async def _compare_all(self, group: CompletionGroup, pairs: Sequence[tuple[int, int]]) -> list[Comparison]:
        orders = [order for i, j in pairs for order in ((i, j), (j, i))]
        return list(await asyncio.gather(*(self._compare(group, i, j) for i, j in orders)))

    async def _compare(self, group: CompletionGroup, first: int, second: int) -> Comparison:
        a, b = group.completions[first].text, group.completions[second].text
        if a == b:
            return Comparison(first, second, "tie", None, 0.5 if self.soft else None)
        values = {**self._values(group.prompt, first_token=self.soft), "a": a, "b": b, "ties": "tie" in self.labels}
        if self.principles:
            drawn = random.Random(self._seed(group, "principle", min(first, second), max(first, second)))
            values["principle"] = drawn.choice(self.principles)
        if self.soft:
            likely = await self._ask(self._first_token({"A": 1.0, "B": 0.0}), values, **FIRST_TOKEN)
            if isinstance(likely, Unclear):
                return Comparison(first, second, None, str(likely))
            winner: Any = "tie" if likely == 0.5 else "first" if likely > 0.5 else "second"
            return Comparison(first, second, winner, None, likely)
        form = self._limits(choices=self.labels, schema=_object({"verdict": {"enum": self.labels}}))
        verdict: ReplyVerdict | Unclear = await self._ask(self._whole(self._read), values, **form)
        if isinstance(verdict, Unclear):
            return Comparison(first, second, None, str(verdict))
        return Comparison(first, second, verdict)

    def _read(self, text: str) -> ReplyVerdict | Unclear:
        verdict = parse_verdict(text)
        return Unclear("a tie, which was not offered") if verdict == "tie" and not self.ties else verdict


@dataclass(kw_only=True, eq=False, repr=False)
class RubricJudge(LLMJudge):
    """Scores each completion alone, on a scale, by one criterion or several."""

    kind = "rubric"
    statement = "Score"
    prompt: str = "rubric"
    rubric: str | None = None
    """The meaning of the points: a text, or a file with it. Your own prompt may also use `columns`."""
    criteria: Mapping[str, float] | None = None
    """Names with their weights, `{helpfulness: 2, brevity: 1}`; default: one score. The score is the weighted mean."""
    scale: Sequence[int] = (1, 10)
    """The lowest and the highest score."""
    expected: bool = False
    """The mean of the scale under the probabilities of the score's token, in place of the score said. Of one criterion
    on a scale of single digits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        match self.scale:
            case [int() as low, int() as high] if low < high:
                self.low, self.high = low, high
            case scale:
                raise JudgeError(f"judge 'rubric': scale is {scale!r}; give the lowest and the highest score: [1, 10]")
        weights = {"score": 1.0} if self.criteria is None else self.criteria
        if not isinstance(weights, Mapping) or not weights or not all(is_number(w) and w > 0 for w in weights.values()):
            raise JudgeError("judge 'rubric': criteria are names with weights above 0: {helpfulness: 2, brevity: 1}")
        self.weights = dict(weights)
        if self.expected and (len(self.weights) > 1 or self.low < 0 or self.high > 9):
            raise JudgeError("judge 'rubric': `expected` reads one token: one criterion, and a scale within 0 to 9")
        if self.pattern is not None and (self.expected or len(self.weights) > 1):
            raise JudgeError(
                "judge 'rubric': `pattern` reads one score from a reply: no `expected`, no several `criteria`"
            )
        if self.rubric is not None and "\n" not in self.rubric and self.rubric.endswith((".txt", ".md")):
            remedy = "give the rubric's text, or an existing file"
            self.rubric = read_text(Path(self.rubric).expanduser(), remedy)
        self._texts = [self.rubric]

    async def _judge_group(self, group: CompletionGroup) -> Judgment:
        asked = await asyncio.gather(*(self._score(group.prompt, c.text) for c in group.completions))
        judgment = judgment_from_outcomes(group, [score for score, _ in asked])
        if len(self.weights) > 1:
            judgment.details["criteria"] = [said for _, said in asked]
        return judgment

    async def _score(self, prompt: Prompt, completion: str) -> tuple[object, dict[str, float] | None]:
        shown = self._values(prompt, first_token=self.expected) | {"completion": completion, "rubric": self.rubric}
        values = {**shown, "criteria": list(self.weights), "low": self.low, "high": self.high}
        points = {str(n): float(n) for n in range(self.low, self.high + 1)}
        if self.expected:
            mean = await self._ask(self._first_token(points), values, **FIRST_TOKEN)
            return (Abstention(mean) if isinstance(mean, Unclear) else mean), None
        number = {"type": "integer", "minimum": self.low, "maximum": self.high}
        single = len(self.weights) == 1 and self._held == "structured_outputs"
        schema = _object(dict.fromkeys(self.weights, number))
        form = self._limits(choices=list(points) if single else None, schema=schema, longest=32 * len(self.weights))
        parse = functools.partial(parse_scores, criteria=list(self.weights), low=self.low, high=self.high)
        said = await self._ask(self._whole(parse), values, **form)
        if isinstance(said, Unclear):
            return Abstention(said), None
        total = sum(self.weights.values())
        return sum(weight * said[name] for name, weight in self.weights.items()) / total, said


@dataclass(kw_only=True, eq=False, repr=False)
class ListwiseJudge(LLMJudge):
    """Ranks all completions of a prompt in one call, in a shuffled order; then again in the reverse of it.

    A ranking is kept as the comparisons that follow from it, in the order shown, so that position bias and flips are
    measured as of a pairwise judge. A score is the share of the others that a completion is ranked above, 0.5 for
    each on which the two calls disagree.
    """

    kind = "listwise"
    statement = "Ranking"
    comparative = True
    prompt: str = "listwise"
    orders: int = 2
    """2, or 1 to ask once and not know."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("judge 'listwise'", "orders", self.orders, (1, 2))

    async def _judge_group(self, group: CompletionGroup) -> Judgment:
        texts = [c.text for c in group.completions]
        distinct = [k for k, text in enumerate(texts) if text not in texts[:k]]
        if len(distinct) < 2:
            pairs = itertools.combinations(range(len(texts)), 2)
            return judgment_from_comparisons(group, [Comparison(i, j, "tie") for i, j in pairs])
        shown = random.Random(self._seed(group, "order")).sample(distinct, len(distinct))
        asked = await asyncio.gather(*(self._rank(group, order) for order in (shown, shown[::-1])[: self.orders]))
        judged = [c for comparisons in asked for c in comparisons]
        return judgment_from_comparisons(group, [*judged, *_of_twins(texts, judged)], is_permanent=refused)

    async def _rank(self, group: CompletionGroup, shown: list[int]) -> list[Comparison]:
        count = len(shown)
        values = {**self._values(group.prompt), "completions": [group.completions[k].text for k in shown]}
        numbers = range(1, count + 1)
        orders = itertools.permutations(numbers)  # up to 24; of more, the decoder holds the reply to the form alone
        choices = [" > ".join(map(str, order)) for order in orders] if count <= 4 else None
        items = {"type": "array", "items": {"enum": list(numbers)}, "minItems": count, "maxItems": count}
        form = self._limits(choices=choices, schema=_object({"ranking": items}), longest=16 + 8 * count)
        if self._held == "structured_outputs" and choices is None:
            number = "|".join(map(str, range(count, 0, -1)))
            form |= {"structured_outputs": {"regex": f"({number})( > ({number})){{{count - 1}}}"}}
        ranking = await self._ask(self._whole(lambda text: parse_ranking(text, count)), values, **form)
        if isinstance(ranking, Unclear):
            return [Comparison(i, j, None, str(ranking)) for i, j in itertools.combinations(shown, 2)]
        best_first = [shown[position] for position in ranking]
        pairs = itertools.combinations(shown, 2)
        return [Comparison(i, j, "first" if best_first.index(i) < best_first.index(j) else "second") for i, j in pairs]


def _of_twins(texts: Sequence[str], judged: Sequence[Comparison]) -> Iterator[Comparison]:
    """What follows for completions whose text stands there twice: they tie, and fare alike."""
    alike = {text: [k for k, other in enumerate(texts) if other == text] for text in texts}
    for twins in alike.values():
        yield from (Comparison(i, j, "tie") for i, j in itertools.combinations(twins, 2))
    for c in judged:
        for i, j in itertools.product(alike[texts[c.first]], alike[texts[c.second]]):
            if (i, j) != (c.first, c.second):
                yield Comparison(i, j, c.winner, c.reason)


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _is_vllm(base_url: str) -> bool:
    """Whether vLLM answers there: other servers have no /version beside /v1, or no vLLM's."""
    root = re.sub(r"/v1/?$", "", base_url)
    try:
        with urllib.request.urlopen(f"{root}/version", timeout=10) as reply:
            return "version" in json.load(reply)
    except (OSError, ValueError):
        return False
