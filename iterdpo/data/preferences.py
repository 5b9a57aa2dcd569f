r"""Offline preference data, in the formats that people have, as pairs of one prompt and two completions of it.

- `pairs`: `prompt`, `chosen`, `rejected`: texts, or lists of chat messages. If the chosen and rejected messages
  repeat the prompt (as in UltraFeedback binarized), or there is no prompt column, the prompt is their shared part.
- `hh`: HH-RLHF transcripts: `chosen` and `rejected` hold the whole dialogue, as `\n\nHuman: …\n\nAssistant: …`.
- `unpaired`: `prompt`, `completion` and a true or false `label`: a pair that has one of its sides only.
- `sharegpt`: `conversations` (the prompt; a `system` column before it), `chosen` and `rejected` in ShareGPT's turns,
  `{"from": "human", "value": "2+2?"}`: one object, or a list of them that may repeat the prompt.

A row that teaches no preference is left out, counted by reason. Rows of the wrong shape are an error that names them, or
are left out and counted, too. Rows are read in batches and forgotten, so that the size of the data does not matter.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from iterdpo.config import MixedDataConfig, PreferenceFileConfig
from iterdpo.data.chats import COMPANIONS, EMPTY_PROMPT, LAST_TURN, content_of, messages_in, with_companions
from iterdpo.data.files import Row
from iterdpo.data.pairs import ABSENT, Kind, pairs_table
from iterdpo.data.rendering import TokenizerError, common_length, completion_token_ids, prompt_token_ids
from iterdpo.data.rows import BadRows, column_value, located_rows, reasons, whole
from iterdpo.data.thinking import Thinking
from iterdpo.errors import DataError, RowError
from iterdpo.escape import printable
from iterdpo.run.rundir import digest
from iterdpo.run.supervise import end_with
from iterdpo.types import Completion, Content, Message, PreferencePair, Prompt, content_to_json, message_text

if TYPE_CHECKING:
    import pyarrow as pa

Format = Literal["auto", "pairs", "hh", "unpaired", "sharegpt"]
Batch = list[tuple[int, str, Row]]
"""Rows with their numbers, from 1, and their places, for messages."""

BATCH = 1000  # rows that one process works on at a time
LISTED = 1000  # row numbers that are kept for a reason
MOST_PROCESSES = 16  # more wait for the one that reads

NOT_PROMPTS = {
    *("id", "uuid", "uid", "hash", "idx", "index", "source", "dataset", "subset", "category", "split", "type", "task"),
    *("language", "lang", "label", "tie", "license", "url", "model", "date", "timestamp", "conversation_hash"),
}
"""Columns of text that are known to be no part of a prompt; so are those whose name ends in `_` and one of these words."""
DIVERGE = "diverge before the last turn"
EMPTY = "have an empty completion"
IDENTICAL = "have identical completions"
IDENTICAL_TOKENS = "have identical completions after truncation"
IDENTICAL_ANSWERS = "have identical answers, and dpo.train_on is answer"
NO_ANSWER = "have a thought without an answer, and dpo.train_on is answer"
NO_PROMPT = "share no prompt"
OTHER_PROMPT = "do not continue their prompt"
NO_TRANSCRIPT = "are not Human and Assistant transcripts"
NO_LAST_TURN = "do not end with an assistant turn after a human one"
USERS_TURN = "have a turn of the user in the completion"
NO_ASSISTANT = "have a completion of the role {} and no assistant turn"
NOT_LAST = "have a completion that does not end with an assistant turn"
ROLES = {"user", "system", "tool", "developer", "function", "human", "gpt", "model", "bot"}
NOT_RENDERED = "cannot be rendered or tokenized"
NO_MARGIN = "have a smaller margin of scores than data.min_margin"

SCORES = tuple(
    names
    for word in ("score", "rating", "reward")
    for names in ((f"{word}_chosen", f"{word}_rejected"), *((f"chosen{s}{word}", f"rejected{s}{word}") for s in "_-"))
)
"""Names of columns with the two scores of a pair, as UltraFeedback and others have them."""


@dataclass(frozen=True, slots=True)
class RawPair:
    """One pair before tokenization; `row` is its row in the data, from 1, and `where` the row's place, for messages.

    `RawPair(Prompt("p-5a1c…", [{"role": "user", "content": "2+2?"}]), chosen="4", rejected="5", row=1, where="a.csv: row 1")`

    Of unpaired data, one side is None.
    """

    prompt: Prompt
    chosen: Content | None
    rejected: Content | None
    row: int
    where: str


@dataclass
class Account:
    """What became of the rows that were read: how many were kept, and for which reason the others were left out.

    `Account("test.jsonl", kept=2303, left_out={"have an empty completion": {"count": 4, "rows": [87, 517, …]}})`

    Rows are numbered from 1; the first 1,000 of each reason are listed.
    """

    source: str
    kind: Kind = "pairs"
    kept: int = 0
    prompts_truncated: int = 0
    completions_truncated: int = 0
    unfinished_thoughts: int = 0  # of a thinking model: completions that are cut before their answer
    desirable: int = 0  # unpaired examples that are kept and have the label true
    contradicting: list[int] = field(default_factory=list)  # rows kept whose rejected completion has the higher score
    left_out: dict[str, dict[str, Any]] = field(default_factory=dict)
    bad: BadRows = field(default_factory=BadRows)  # those of the rows left out that cannot be used as they are
    first: dict[str, int] = field(default_factory=dict)  # {"text": 1}: the first row whose prompt is of that kind
    unit: str | None = None  # what `summary` calls the rows; by default as `kind` says

    @property
    def rows(self) -> int:
        return self.kept + sum(int(entry["count"]) for entry in self.left_out.values())

    def keep(self, pair: RawPair) -> None:
        self.kept += 1
        self.desirable += pair.rejected is None
        self._note_kind({"messages" if pair.prompt.conversational else "text": pair.row})

    def take_back(self, pair: RawPair) -> None:
        """Count a pair as if it had not been kept."""
        self.kept -= 1
        self.desirable -= pair.rejected is None
        if pair.row in self.contradicting:
            self.contradicting.remove(pair.row)

    def refuse(self, error: RowError, row: int) -> None:
        """Count a row that cannot be used."""
        self.leave_out(error.reason, row)
        self.bad.add(error)

    def check_rows(self, key: str = "data.bad_rows") -> None:
        """A DataError that names the rows that cannot be used, if there are any; `key` says how to leave them out."""
        if self.bad.counts:
            raise self.bad.error(self.source, self.rows, key)

    def leave_out(self, reason: str, *rows: int, count: int = 1) -> None:
        """Count rows that are left out; `rows` are the numbers of the first of them."""
        entry = self.left_out.setdefault(reason, {"count": 0, "rows": []})
        entry["count"] += count
        entry["rows"] += rows[: LISTED - len(entry["rows"])]

    def add(self, later: Account) -> None:
        """Add the account of the rows after these. A DataError if some prompts are text and others are messages."""
        self.kept += later.kept
        self.desirable += later.desirable
        self.contradicting += later.contradicting
        self.prompts_truncated += later.prompts_truncated
        self.completions_truncated += later.completions_truncated
        self.unfinished_thoughts += later.unfinished_thoughts
        for reason, entry in later.left_out.items():
            self.leave_out(reason, *entry["rows"], count=entry["count"])
        self.bad.update(later.bad)
        self._note_kind(later.first)

    def _note_kind(self, first: dict[str, int]) -> None:
        self.first = first | self.first
        if len(self.first) > 1:
            raise DataError(
                f"{self.source}: row {self.first['text']} is all text, and row {self.first['messages']} has messages; give "
                'all rows as the same kind: as messages, a prompt of text is [{"role": "user", "content": TEXT}], and a '
                'completion [{"role": "assistant", "content": TEXT}]'
            )

    def summary(self) -> str:
        """`kept 2,303 of 2,312 pairs (5 diverge before the last turn, 4 have an empty completion)`."""
        largest_first = sorted(self.left_out.items(), key=lambda item: -item[1]["count"])
        why = reasons({reason: entry["count"] for reason, entry in largest_first})
        unit = self.unit or ("pairs" if self.kind == "pairs" else "examples")
        said = f"kept {self.kept:,} of {self.rows:,} {unit}" + (f" ({why})" if why else "")
        if self.contradicting:
            said += (
                f"; in {len(self.contradicting):,} of them, such as row {self.contradicting[0]}, the rejected completion has "
                "the higher score (data.min_margin=0 leaves them out)"
            )
        return said


class PreferenceData:
    """The preference data of a data set (see `load_rows`), of its first `limit` rows or all. To be read once.

    `account` says what became of the rows that were read so far. `auto` recognises the format by the first row that can
    be read. `bad_rows`: whether rows that cannot be used are an error at the end, or are left out and counted ("skip"). Errors name
    keys of the configuration's `section`.

    Raises:
        DataError: a file that cannot be read, or whose first row is plainly of another format than the one given.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        format: Format = "auto",
        limit: int | None = None,
        min_margin: float | None = None,
        bad_rows: Literal["error", "skip"] = "error",
        section: str = "data",
    ) -> None:
        if format not in get_args(Format):
            raise DataError(f"format {format!r} is not one of {', '.join(get_args(Format))}")
        self._min_margin, self._skips = min_margin, bad_rows == "skip"
        self.account = Account(path)
        self._section = section
        self.format: Format = "pairs"
        self._numbered: Iterator[tuple[int, str, Row]] = iter(())
        rows = ((number, *row) for number, row in enumerate(located_rows(path, split, limit=limit), 1))
        for number, where, row in rows:
            if isinstance(row, RowError):
                self.account.refuse(row, number)
                continue
            self.format = _settled(format, row, where)
            self._numbered = chain([(number, where, row)], rows)
            break
        self.account.kind = "unpaired" if self.format == "unpaired" else "pairs"

    def parsed(self) -> Iterator[list[RawPair]]:
        """The pairs, in batches, without tokenizing them.

        Raises:
            DataError: at the end, a column that is missing or a value of the wrong type, with all such rows; or no pair
                that can be used.
        """
        for batch in self._batches():
            yield parse_rows(batch, self.format, self.account, self._min_margin)
        self.check()

    def tokenized(
        self,
        tokenizer: Any,
        *,
        max_prompt_tokens: int,
        max_completion_tokens: int,
        thinking: Thinking | None = None,
        answers_alone: bool = False,
        processes: int | None = None,
    ) -> Iterator[pa.Table]:
        """The pairs as token ids, in batches as `pairs_table` makes them. Raises what `parsed` does. See `tokenize_pairs`.

        Data of more than a few batches are tokenized by as many processes as there are cores, or `processes`. Their
        number changes nothing in the result. A pair that cannot be rendered is a bad row.
        """
        batches = self._batches()
        head = list(islice(batches, 3))
        if processes is None:
            processes = min(len(os.sched_getaffinity(0)), MOST_PROCESSES) if len(head) == 3 else 1
        limits = {"max_prompt_tokens": max_prompt_tokens, "max_completion_tokens": max_completion_tokens}
        settings = {**limits, "thinking": thinking, "answers_alone": answers_alone}
        work = partial(_tokenized_batch, tokenizer, self.account.source, self.format, self._min_margin, settings)
        for table, account in map_in_order(work, chain(head, batches), processes):
            self.account.add(account)
            if table is not None:
                yield table
        self.check()

    def _batches(self) -> Iterator[Batch]:
        while batch := list(islice(self._numbered, BATCH)):
            yield batch

    def check(self) -> None:
        """Refuse the data if rows that were read cannot be used and are not to be left out, or if none is kept."""
        account = self.account
        if not self._skips or account.bad.counts.total() == account.rows:
            account.check_rows(f"{self._section}.bad_rows")
        if not account.kept:
            longer = (
                f", and raise {self._section}.max_completion_tokens" if IDENTICAL_TOKENS in account.left_out else ""
            )
            raise DataError(
                f"{account.source}: no pair can be used: {account.summary()}; see {self._section}.format{longer}"
            )


def preferences_of(data: PreferenceFileConfig) -> PreferenceData:
    """The data that the configuration names, to be read."""
    settings = data.model_dump(include={"split", "format", "limit", "min_margin", "bad_rows"})
    section = "pairing.offline" if isinstance(data, MixedDataConfig) else "data"
    return PreferenceData(data.path, **settings, section=section)


def parse_rows(batch: Batch, format: Format, account: Account, min_margin: float | None = None) -> list[RawPair]:
    """The pairs of the rows, each recorded in `account`; one of the wrong shape as a bad row."""
    pairs = []
    for number, where, row in batch:
        try:
            row = whole(row)
            found = _parsed(row, format, where)
            margin = None if isinstance(found, str) else margin_of(row)
            if min_margin is not None and not isinstance(found, str):
                if margin is None:
                    message = (
                        f"{where}: data.min_margin is set, but no two scores; name them score_chosen and score_rejected"
                    )
                    raise RowError(message, "have no two scores for data.min_margin")
                if margin < min_margin or margin == 0:
                    found = NO_MARGIN
            if not isinstance(found, str):
                content, chosen, rejected = found
                content = with_companions(content, row, where)
        except RowError as error:
            account.refuse(error, number)
            continue
        if isinstance(found, str):
            account.leave_out(found, number)
            continue
        prompt = Prompt(f"p-{digest(content_to_json(content))}", content)
        pairs.append(RawPair(prompt, chosen, rejected, number, where))
        account.keep(pairs[-1])
        if margin is not None and margin < 0:
            account.contradicting.append(number)
    return pairs


def margin_of(row: dict[str, Any]) -> float | None:
    """The score of the chosen completion minus that of the rejected; None if the row does not have both as numbers.

    A number may be text, as it is in CSV.
    """
    for names in SCORES:
        chosen, rejected = (_score(row.get(name)) for name in names)
        if math.isfinite(margin := chosen - rejected):
            return margin
    return None


def _score(value: Any) -> float:
    """The number in a column of scores; NaN if there is none."""
    try:
        return math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def tokenize_pairs(
    pairs: Iterable[RawPair],
    tokenizer: Any,
    account: Account,
    *,
    max_prompt_tokens: int,
    max_completion_tokens: int,
    thinking: Thinking | None = None,
    answers_alone: bool = False,
) -> list[PreferencePair]:
    """The pairs as token ids; truncated and omitted ones are recorded in `account`.

    A prompt that is too long loses its beginning, except a BOS token. A completion that is too long loses its end,
    including the end token, and its `finish_reason` is "length". Pairs whose completions are equal after that are left
    out. The absent side of an unpaired one is `ABSENT`. A pair that cannot be rendered is recorded as a bad row. A
    tokenizer that renders none is a DataError.

    `thinking` divides the completions of a thinking model. With `answers_alone`, pairs with a completion that has no
    answer, or with two equal answers, are left out.
    """
    assert max_prompt_tokens >= 1  # so truncation always leaves a token
    assert max_completion_tokens >= 1
    found = []
    for raw in pairs:
        content = raw.prompt.content
        try:
            ids = prompt_token_ids(tokenizer, content)
            chosen = given_completion(tokenizer, content, ids, raw.chosen, max_completion_tokens, thinking)
            rejected = given_completion(tokenizer, content, ids, raw.rejected, max_completion_tokens, thinking)
        except TokenizerError as error:
            raise DataError(f"{raw.where}: {error}") from error
        except DataError as error:
            account.take_back(raw)
            account.refuse(RowError(f"{raw.where}: {error}", NOT_RENDERED), raw.row)
            continue
        reason = IDENTICAL_TOKENS if chosen.token_ids == rejected.token_ids else None
        if answers_alone and reason is None:
            reason = _nothing_to_compare(chosen, rejected)
        if reason is not None:
            account.take_back(raw)
            account.leave_out(reason, raw.row)
            continue
        if len(ids) > max_prompt_tokens:
            account.prompts_truncated += 1
            kept = 1 if ids[0] == tokenizer.bos_token_id else 0
            ids = ids[:kept] + ids[len(ids) - max_prompt_tokens + kept :]
        account.completions_truncated += chosen.truncated + rejected.truncated
        account.unfinished_thoughts += chosen.unfinished + rejected.unfinished
        found.append(PreferencePair(raw.prompt, ids, chosen, rejected))
    return found


# Processes


def _tokenized_batch(
    tokenizer: Any, source: str, format: Format, min_margin: float | None, settings: dict[str, Any], batch: Batch
) -> tuple[pa.Table | None, Account]:
    account = Account(source, "unpaired" if format == "unpaired" else "pairs")
    pairs = tokenize_pairs(parse_rows(batch, format, account, min_margin), tokenizer, account, **settings)
    table = pairs_table(pairs, account.kind, answers_alone=settings["answers_alone"]) if pairs else None
    return table, account


Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(work: Callable[[Item], Result], items: Iterable[Item], processes: int) -> Iterator[Result]:
    """`map(work, items)` in this many processes, in order. They are at most a few items ahead of the consumer.

    By hand, since `multiprocessing.Pool.imap` and (before Python 3.14) `Executor.map` read all of their input at once,
    `datasets.map` writes all of it to disk first, and none of them ends its processes if this one is killed.
    Forked, since a spawned process would import a user's script a second time; the tokenizer has not been used in this
    one, so that none of its threads is lost.
    """
    if processes == 1:
        yield from map(work, items)
        return
    waiting: deque[Future[Result]] = deque()
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, initializer=_become_worker, initargs=(work, os.getpid())) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(_worker, item))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


_work: Callable[[Any], Any]  # of a worker


def _become_worker(work: Callable[[Any], Any], parent: int) -> None:
    global _work
    _work = work
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads in each of as many processes as cores


def _worker(item: Any) -> Any:
    return _work(item)


# Formats

Parts = tuple[Content, Content | None, Content | None]  # prompt, chosen, rejected


def _settled(format: Format, first: dict[str, Any], where: str) -> Format:
    """The format of the data, which `auto` leaves to the first row."""
    found = _recognised(first)
    if format == "auto":
        return found
    if format != found and not {format, found} <= {"pairs", "hh"}:  # transcripts are texts, too
        raise DataError(
            f"{where} has the columns of data.format={found} ({printable(', '.join(first))[:300]}), but data.format is {format}; set "
            f"data.format={found}, or leave it out"
        )
    return format


def _recognised(row: dict[str, Any]) -> Format:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if any(_is_sharegpt(row.get(c)) for c in ("conversations", "prompt", "chosen", "rejected")):
        return "sharegpt"
    if "completion" in row and not (chosen or rejected):
        return "unpaired"
    transcripts = row.get("prompt") is None and _is_transcript(chosen) and _is_transcript(rejected)
    return "hh" if transcripts else "pairs"


def _is_sharegpt(value: Any) -> bool:
    value = messages_in(value)
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and "from" in first


def _parsed(row: dict[str, Any], format: Format, where: str) -> Parts | str:
    """The parts of a pair, or the reason why the row is left out."""
    if format == "unpaired":
        return _from_unpaired(row, where)
    prompt, chosen, rejected = _columns(row, format, where)
    return _from_transcripts(chosen, rejected, where) if format == "hh" else _from_columns(prompt, chosen, rejected)


def _columns(row: dict[str, Any], format: Format, where: str) -> tuple[Content | None, Content, Content]:
    remedy = "preference data has chosen, rejected and, if they do not repeat it, prompt"
    chosen = content_of(column_value(row, "chosen", where, remedy), f"{where}, column 'chosen'")
    rejected = content_of(column_value(row, "rejected", where, remedy), f"{where}, column 'rejected'")
    if isinstance(chosen, list) and isinstance(rejected, str) and not rejected.strip():
        rejected = []  # an empty field of CSV has no kind
    if isinstance(rejected, list) and isinstance(chosen, str) and not chosen.strip():
        chosen = []
    if isinstance(chosen, str) != isinstance(rejected, str):
        text, messages = ("chosen", "rejected") if isinstance(chosen, str) else ("rejected", "chosen")
        raise RowError(
            f"{where}: {text} is text, and {messages} is messages; give two of the same kind",
            "have one completion as text and one as messages",
        )
    names = ["prompt"]
    if format == "sharegpt":
        names.insert(0, "conversations")
    if _opens(chosen) and _opens(rejected):
        names.append("messages")
    for name in names:
        if row.get(name) is not None:
            return _prompt(row[name], where, name), chosen, rejected
    _refuse_other_name_for_prompt(row, chosen, where)
    return None, chosen, rejected


def _opens(completion: Content) -> bool:
    """Whether it begins with the assistant's words, so that it cannot have its prompt in it."""
    return isinstance(completion, str) or (bool(completion) and completion[0]["role"] == "assistant")


def _prompt(value: Any, where: str, column: str = "prompt") -> Content:
    prompt = content_of(value, f"{where}, column {column!r}")
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise RowError(
            f"{where}, column {column!r} is empty; remove the row, or the column if all its values are empty",
            EMPTY_PROMPT,
        )
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise RowError(
            f"{where}, column {column!r} ends with an assistant turn; a prompt ends before the completion", LAST_TURN
        )
    return prompt


def _refuse_other_name_for_prompt(row: dict[str, Any], chosen: Content, where: str) -> None:
    """Without this, a prompt in another column would be dropped, and the words that two completions happen to share
    would take its place. A column whose text the completions repeat is no such column.
    """
    said = chosen if isinstance(chosen, str) else "\n".join(map(message_text, chosen))
    for name, value in row.items():
        words = str(name).lower().split("_")
        if name in ("prompt", "chosen", "rejected", *COMPANIONS) or words[-1] in NOT_PROMPTS:
            continue
        messages = isinstance(value, list) and any(isinstance(m, dict) and "content" in m for m in value)
        if not messages and not (isinstance(value, str) and value.strip() and not _is_number(value)):
            continue
        parts = [str(m.get("content") or "") if isinstance(m, dict) else "" for m in value] if messages else [value]
        if not all(part.strip() in said for part in parts):
            raise RowError(
                f"{where}: no prompt column, but {name!r}; rename it to prompt if it is the prompt, else remove it",
                "have no prompt, but another column that may be it",
            )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _from_columns(prompt: Content | None, chosen: Content, rejected: Content) -> Parts | str:
    if chosen == rejected:
        return IDENTICAL
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            cut = _shared_words(chosen, rejected)
            prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
            if not prompt.strip():
                return NO_PROMPT
        return (prompt, chosen, rejected) if chosen.strip() and rejected.strip() else EMPTY
    assert isinstance(chosen, list)
    assert isinstance(rejected, list)
    return _from_messages(prompt, chosen, rejected)


def _from_messages(prompt: Content | None, chosen: list[Message], rejected: list[Message]) -> Parts | str:
    """Both are made whole conversations first; the prompt is what these share, up to the first assistant turn at issue."""
    if not chosen or not rejected:
        return EMPTY
    if prompt is None:
        prompt = []
    for side in (chosen, rejected):
        if prompt and not _opens(side) and not _repeats(side, prompt):
            return _wrong_role(side) or OTHER_PROMPT
    shared_prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    chosen, rejected = ([*shared_prompt, *side] if _opens(side) else side for side in (chosen, rejected))

    cut = common_length(chosen, rejected)
    while cut and chosen[cut - 1]["role"] == "assistant":
        cut -= 1
    shared, ends = chosen[:cut], (chosen[cut:], rejected[cut:])
    if not shared:
        return NO_PROMPT
    if any(map(_is_empty, ends)):
        return EMPTY
    for end in ends:
        if reason := _wrong_role(end):
            return reason
    if any(map(_has_users_turn, ends)):
        return DIVERGE
    if any(end[-1]["role"] != "assistant" for end in ends):
        return NOT_LAST
    return shared, *ends


def _is_empty(completion: Content) -> bool:
    texts = [completion] if isinstance(completion, str) else map(message_text, completion)
    return not any(text.strip() for text in texts)


def _wrong_role(completion: list[Message]) -> str | None:
    """Why messages without an assistant turn are no completion; None of those with one."""
    if any(message["role"] == "assistant" for message in completion):
        return None
    role = completion[0]["role"]
    return NO_ASSISTANT.format(role if role in ROLES else "another")


def _has_users_turn(completion: Content) -> bool:
    return not isinstance(completion, str) and any(m["role"] in ("user", "system") for m in completion)


def _repeats(conversation: list[Message], prompt: Content) -> bool:
    if isinstance(prompt, str):  # the first question, or the last one of a longer talk
        return any(message_text(m).strip() == prompt.strip() for m in conversation if m["role"] != "assistant")
    return conversation[: len(prompt)] == prompt


def _shared_words(a: str, b: str) -> int:
    """Where two texts begin to differ, moved back to a word's start. The space before it belongs to the completions."""
    cut = common_length(a, b)
    while cut and not (a[cut - 1] in "\n\t" or a[cut : cut + 1] == b[cut : cut + 1] == " "):
        cut -= 1
    return cut


def _from_unpaired(row: dict[str, Any], where: str) -> Parts | str:
    remedy = "unpaired data has prompt, completion and label"
    prompt = _prompt(column_value(row, "prompt", where, remedy), where)
    completion = content_of(column_value(row, "completion", where, remedy), f"{where}, column 'completion'")
    label = _label(column_value(row, "label", where, remedy), where)
    if not isinstance(completion, str):
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if completion[: len(prompt)] == prompt:
            completion = completion[len(prompt) :]
    if _is_empty(completion):
        return EMPTY
    if not isinstance(completion, str):
        if reason := _wrong_role(completion):
            return reason
        if _has_users_turn(completion):
            return USERS_TURN
        if completion[-1]["role"] != "assistant":
            return NOT_LAST
    return (prompt, completion, None) if label else (prompt, None, completion)


def _label(value: Any, where: str) -> bool:
    """True and false; in a CSV file, their names."""
    label = {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
    if label is None:
        raise RowError(
            f"{where}, column 'label' is {repr(value)[:60]}; it must be true (desirable) or false (undesirable)",
            "have a label that is neither true nor false",
        )
    return label


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def _from_transcripts(chosen: Content, rejected: Content, where: str) -> Parts | str:
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise RowError(
            f"{where}: chosen and rejected are messages, not transcripts; set data.format=pairs",
            "have messages in place of transcripts",
        )
    if not _is_transcript(chosen) or not _is_transcript(rejected):
        return NO_TRANSCRIPT
    *before, last = _turns(chosen)
    *rejected_before, rejected_last = _turns(rejected)
    if before != rejected_before:
        return DIVERGE
    if not before or before[-1]["role"] != "user" or {last["role"], rejected_last["role"]} != {"assistant"}:
        return NO_LAST_TURN
    if not last["content"].strip() or not rejected_last["content"].strip():
        return EMPTY
    if last == rejected_last:
        return IDENTICAL
    return _joined(before), last["content"], rejected_last["content"]


def _turns(transcript: str) -> list[Message]:
    """One message a marker. A marker is a paragraph's start: "Human:" inside a line is the speaker's own word."""
    roles = {"Human": "user", "Assistant": "assistant"}
    _, *parts = re.split(r"\n\n(Human|Assistant):", transcript)
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[speaker], "content": text.removeprefix(" ")} for speaker, text in turns]


def _joined(turns: list[Message]) -> list[Message]:
    """Turns of one speaker in a row as one message: many templates refuse roles that do not alternate."""
    joined: list[Message] = []
    for turn in turns:
        if joined and joined[-1]["role"] == turn["role"]:
            joined[-1] = {**turn, "content": f"{joined[-1]['content']}\n\n{turn['content']}"}
        else:
            joined.append(turn)
    return joined


def _nothing_to_compare(chosen: Completion, rejected: Completion) -> str | None:
    """Why nothing is left of a pair if its answers alone are trained on; None if something is."""
    sides = [side for side in (chosen, rejected) if side is not ABSENT]
    if not all(side.answer_ids for side in sides):
        return NO_ANSWER
    return IDENTICAL_ANSWERS if chosen.answer_ids == rejected.answer_ids else None


def given_completion(
    tokenizer: Any,
    prompt: Content,
    prompt_ids: list[int],
    content: Content | None,
    limit: int,
    thinking: Thinking | None,
) -> Completion:
    """A completion of the data as token ids, at most `limit` of them; `ABSENT` if there is none.

    Raises:
        DataError: it cannot be rendered; see `completion_token_ids`.
    """
    if content is None:
        return ABSENT
    tags = () if thinking is None else (thinking.tags.start, thinking.tags.end)
    ids = completion_token_ids(tokenizer, prompt, content, tags=tags)
    if len(ids) > limit:
        text = tokenizer.decode(ids[:limit], skip_special_tokens=True)
        completion = Completion(text, ids[:limit], [], "length")
    else:
        text = content if isinstance(content, str) else "\n\n".join(map(message_text, content))
        completion = Completion(text, ids, [], "stop")
    return completion if thinking is None else thinking.split(prompt_ids, completion)
