r"""Offline preference data, in the formats that people have, as pairs of one prompt and two completions of it.

- `pairs`: `prompt`, `chosen`, `rejected`: texts, or lists of chat messages. If the chosen and rejected messages
  repeat the prompt (as in UltraFeedback binarized), or there is no prompt column, the prompt is their shared part.
- `hh`: HH-RLHF transcripts: `chosen` and `rejected` hold the whole dialogue, as `\n\nHuman: …\n\nAssistant: …`.
- `unpaired`: `prompt`, `completion` and a true or false `label`: a pair that has one of its sides only.
- `sharegpt`: `conversations` (the prompt; a `system` column before it), `chosen` and `rejected` in ShareGPT's turns,
  `{"from": "human", "value": "2+2?"}`: one object, or a list of them that may repeat the prompt.

A row that teaches no preference is left out, counted by reason; data of the wrong shape is an error. Rows are read in
batches and forgotten, so that the size of the data does not matter.
"""

from __future__ import annotations

import difflib
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

from iterdpo.data.pairs import ABSENT, Kind, pairs_table
from iterdpo.data.rendering import common_length, completion_token_ids, prompt_token_ids
from iterdpo.data.rows import column_value, content_of, load_rows
from iterdpo.errors import DataError
from iterdpo.run.rundir import digest
from iterdpo.run.supervise import end_with
from iterdpo.types import Completion, Message, PreferencePair, Prompt

if TYPE_CHECKING:
    import pyarrow as pa

Content = str | list[Message]
Format = Literal["auto", "pairs", "hh", "unpaired", "sharegpt"]
Batch = list[tuple[int, dict[str, Any]]]
"""Rows with their numbers, from 1."""

BATCH = 1000  # rows that one process works on at a time
LISTED = 1000  # row numbers that are kept for a reason
MOST_PROCESSES = 16  # more wait for the one that reads

PROMPT_NAMES = {"question", "instruction", "input", "query", "context"}
SPEAKERS = {"human": "user", "user": "user", **dict.fromkeys(("gpt", "chatgpt", "assistant"), "assistant")}
SPEAKERS |= {"system": "system", "tool": "tool"}

DIVERGE = "diverge before the last turn"
EMPTY = "have an empty completion"
IDENTICAL = "have identical completions"
IDENTICAL_TOKENS = "have identical completions after truncation"
NO_PROMPT = "share no prompt"
OTHER_PROMPT = "do not continue their prompt"
NO_TRANSCRIPT = "are not Human and Assistant transcripts"
NO_LAST_TURN = "do not end with an assistant turn after a human one"
USERS_TURN = "have a turn of the user in the completion"


@dataclass(frozen=True, slots=True)
class RawPair:
    """One pair before tokenization; `row` is its row in the data, from 1. Of unpaired data, one side is None.

    `RawPair(Prompt("p-5a1c…", [{"role": "user", "content": "2+2?"}]), chosen="4", rejected="5", row=1)`
    """

    prompt: Prompt
    chosen: Content | None
    rejected: Content | None
    row: int


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
    left_out: dict[str, dict[str, Any]] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)  # {"text": 1}: the first row whose prompt is of that kind

    @property
    def rows(self) -> int:
        return self.kept + sum(int(entry["count"]) for entry in self.left_out.values())

    def keep(self, pair: RawPair) -> None:
        self.kept += 1
        self._note_kind({"messages" if pair.prompt.conversational else "text": pair.row})

    def leave_out(self, reason: str, *rows: int, count: int = 1) -> None:
        """Count rows that are left out; `rows` are the numbers of the first of them."""
        entry = self.left_out.setdefault(reason, {"count": 0, "rows": []})
        entry["count"] += count
        entry["rows"] += rows[: LISTED - len(entry["rows"])]

    def add(self, later: Account) -> None:
        """Add the account of the rows after these. A DataError if some prompts are text and others are messages."""
        self.kept += later.kept
        self.prompts_truncated += later.prompts_truncated
        self.completions_truncated += later.completions_truncated
        for reason, entry in later.left_out.items():
            self.leave_out(reason, *entry["rows"], count=entry["count"])
        self._note_kind(later.first)

    def _note_kind(self, first: dict[str, int]) -> None:
        self.first = first | self.first
        if len(self.first) > 1:
            problem = f"the prompt is text in row {self.first['text']} and messages in row {self.first['messages']}"
            raise DataError(f"{self.source}: {problem}; give all as the same kind")

    def summary(self) -> str:
        """`kept 2,303 of 2,312 pairs (5 diverge before the last turn, 4 have an empty completion)`."""
        largest_first = sorted(self.left_out.items(), key=lambda item: -item[1]["count"])
        reasons = ", ".join(f"{entry['count']:,} {reason}" for reason, entry in largest_first)
        unit = "pairs" if self.kind == "pairs" else "examples"
        return f"kept {self.kept:,} of {self.rows:,} {unit}" + (f" ({reasons})" if reasons else "")


class PreferenceData:
    """The preference data of a data set (see `load_rows`), of its first `limit` rows or all. To be read once.

    `account` says what became of the rows that were read so far. `auto` recognises the format by the first row.

    Raises:
        DataError: a file that cannot be read, or whose first row is plainly of another format than the one given.
    """

    def __init__(self, path: str, split: str = "train", format: Format = "auto", limit: int | None = None) -> None:
        if format not in get_args(Format):
            raise DataError(f"format {format!r} is not one of {', '.join(get_args(Format))}")
        rows = load_rows(path, split, limit=limit)
        first = next(rows)
        self.format = _settled(format, first, f"{path}: row 1")
        self.account = Account(path, "unpaired" if self.format == "unpaired" else "pairs")
        self._numbered = enumerate(chain([first], rows), 1)

    def parsed(self) -> Iterator[list[RawPair]]:
        """The pairs, in batches, without tokenizing them.

        Raises:
            DataError: a column that is missing, a value of the wrong type (with its row), or no pair that can be used.
        """
        for batch in self._batches():
            yield parse_rows(batch, self.format, self.account)
        self._check_some_are_kept()

    def tokenized(
        self, tokenizer: Any, *, max_prompt_tokens: int, max_completion_tokens: int, processes: int | None = None
    ) -> Iterator[pa.Table]:
        """The pairs as token ids, in batches as `pairs_table` makes them. Raises what `parsed` does.

        Data of more than a few batches are tokenized by as many processes as there are cores, or `processes`. Their
        number changes nothing in the result. A pair that cannot be rendered is a DataError, with its row.
        """
        batches = self._batches()
        head = list(islice(batches, 3))
        if processes is None:
            processes = min(len(os.sched_getaffinity(0)), MOST_PROCESSES) if len(head) == 3 else 1
        limits = {"max_prompt_tokens": max_prompt_tokens, "max_completion_tokens": max_completion_tokens}
        work = partial(_tokenized_batch, tokenizer, self.account.source, self.format, limits)
        for table, account in map_in_order(work, chain(head, batches), processes):
            self.account.add(account)
            if table is not None:
                yield table
        self._check_some_are_kept()

    def _batches(self) -> Iterator[Batch]:
        while batch := list(islice(self._numbered, BATCH)):
            yield batch

    def _check_some_are_kept(self) -> None:
        account = self.account
        if not account.kept:
            longer = ", and raise data.max_completion_tokens" if IDENTICAL_TOKENS in account.left_out else ""
            raise DataError(f"{account.source}: no pair can be used: {account.summary()}; see data.format{longer}")


def parse_rows(batch: Batch, format: Format, account: Account) -> list[RawPair]:
    """The pairs of the rows, each recorded in `account`. A row of the wrong shape is a DataError."""
    pairs = []
    for number, row in batch:
        found = _parsed(row, format, f"{account.source}: row {number}")
        if isinstance(found, str):
            account.leave_out(found, number)
        else:
            content, chosen, rejected = found
            pairs.append(RawPair(Prompt(f"p-{digest(content)}", content), chosen, rejected, number))
            account.keep(pairs[-1])
    return pairs


def tokenize_pairs(
    pairs: Iterable[RawPair], tokenizer: Any, account: Account, *, max_prompt_tokens: int, max_completion_tokens: int
) -> list[PreferencePair]:
    """The pairs as token ids; truncated and omitted ones are recorded in `account`.

    A prompt that is too long loses its beginning, except a BOS token. A completion that is too long loses its end,
    including the end token, and its `finish_reason` is "length". Pairs whose completions are equal after that are left
    out. The absent side of an unpaired one is `ABSENT`. A pair that cannot be rendered is a DataError, with its row.
    """
    assert max_prompt_tokens >= 1  # so truncation always leaves a token
    assert max_completion_tokens >= 1
    found = []
    for raw in pairs:
        content = raw.prompt.content
        try:
            ids = prompt_token_ids(tokenizer, content)
            chosen = _completion(tokenizer, content, raw.chosen, max_completion_tokens)
            rejected = _completion(tokenizer, content, raw.rejected, max_completion_tokens)
        except DataError as error:
            raise DataError(f"{account.source}: row {raw.row}: {error}") from error
        if chosen.token_ids == rejected.token_ids:
            account.kept -= 1
            account.leave_out(IDENTICAL_TOKENS, raw.row)
            continue
        if len(ids) > max_prompt_tokens:
            account.prompts_truncated += 1
            kept = 1 if ids[0] == tokenizer.bos_token_id else 0
            ids = ids[:kept] + ids[len(ids) - max_prompt_tokens + kept :]
        account.completions_truncated += chosen.truncated + rejected.truncated
        found.append(PreferencePair(raw.prompt, ids, chosen, rejected))
    return found


# Processes


def _tokenized_batch(
    tokenizer: Any, source: str, format: Format, limits: dict[str, int], batch: Batch
) -> tuple[pa.Table | None, Account]:
    account = Account(source, "unpaired" if format == "unpaired" else "pairs")
    pairs = tokenize_pairs(parse_rows(batch, format, account), tokenizer, account, **limits)
    return (pairs_table(pairs, account.kind) if pairs else None), account


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
            f"{where} has the columns of data.format={found} ({', '.join(first)}), but data.format is {format}; set "
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
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and "from" in first


def _parsed(row: dict[str, Any], format: Format, where: str) -> Parts | str:
    """The parts of a pair, or the reason why the row is left out."""
    if format == "unpaired":
        return _from_unpaired(row, where)
    prompt, chosen, rejected = _columns(_from_sharegpt(row, where) if format == "sharegpt" else row, where)
    return _from_transcripts(chosen, rejected, where) if format == "hh" else _from_columns(prompt, chosen, rejected)


def _columns(row: dict[str, Any], where: str) -> tuple[Content | None, Content, Content]:
    remedy = "preference data has chosen, rejected and, if they do not repeat it, prompt"
    chosen = content_of(column_value(row, "chosen", where, remedy), f"{where}, column 'chosen'")
    rejected = content_of(column_value(row, "rejected", where, remedy), f"{where}, column 'rejected'")
    if isinstance(chosen, str) != isinstance(rejected, str):
        problem = "one of chosen and rejected is text and the other messages"
        raise DataError(f"{where}: {problem}; give two of the same kind")
    if row.get("prompt") is None:
        _refuse_other_name_for_prompt(row, chosen, where)
        return None, chosen, rejected
    return _prompt(row["prompt"], where), chosen, rejected


def _prompt(value: Any, where: str) -> Content:
    prompt = content_of(value, f"{where}, column 'prompt'")
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise DataError(f"{where}, column 'prompt' is empty; remove the row, or the column if all its values are empty")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise DataError(f"{where}, column 'prompt' ends with an assistant turn; a prompt ends before the completion")
    return prompt


def _refuse_other_name_for_prompt(row: dict[str, Any], chosen: Content, where: str) -> None:
    """Without this, the first words that two completions happen to share would become the prompt."""
    if _is_transcript(chosen) or (isinstance(chosen, list) and chosen and chosen[0]["role"] != "assistant"):
        return
    for name in row:
        if name.lower() in PROMPT_NAMES or difflib.get_close_matches("prompt", [name.lower()], cutoff=0.85):
            raise DataError(f"{where}: no prompt column, but {name!r}; rename it to prompt, or remove it")


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
    opens = {chosen[0]["role"] == "assistant", rejected[0]["role"] == "assistant"}
    if prompt is None:
        prompt = []
    elif opens == {True}:
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        chosen, rejected = [*prompt, *chosen], [*prompt, *rejected]
    elif not (_repeats(chosen, prompt) and _repeats(rejected, prompt)):
        return OTHER_PROMPT

    cut = common_length(chosen, rejected)
    while cut and chosen[cut - 1]["role"] == "assistant":
        cut -= 1
    shared, ends = chosen[:cut], (chosen[cut:], rejected[cut:])
    if not shared:
        return NO_PROMPT
    if any(map(_is_empty, ends)):
        return EMPTY
    if any(map(_has_users_turn, ends)):
        return DIVERGE
    return shared, *ends


def _is_empty(completion: Content) -> bool:
    texts = [completion] if isinstance(completion, str) else [m["content"] for m in completion]
    return not any(map(str.strip, texts))


def _has_users_turn(completion: Content) -> bool:
    return not isinstance(completion, str) and any(m["role"] in ("user", "system") for m in completion)


def _repeats(conversation: list[Message], prompt: Content) -> bool:
    if isinstance(prompt, str):  # the first question, or the last one of a longer talk
        return any(m["content"].strip() == prompt.strip() for m in conversation if m["role"] != "assistant")
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
    if _has_users_turn(completion):
        return USERS_TURN
    return (prompt, completion, None) if label else (prompt, None, completion)


def _label(value: Any, where: str) -> bool:
    """True and false; in a CSV file, their names."""
    label = {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
    if label is None:
        raise DataError(f"{where}, column 'label' is {value!r}; it must be true (desirable) or false (undesirable)")
    return label


def _from_sharegpt(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row's prompt, chosen and rejected, with messages in place of ShareGPT's turns."""
    prompt = "prompt" if row.get("conversations") is None else "conversations"
    names = {"prompt": prompt, "chosen": "chosen", "rejected": "rejected"}
    columns = {c: _messages(row[name], f"{where}, column {name!r}") for c, name in names.items() if name in row}
    system = row.get("system")
    if isinstance(system, str) and system.strip() and isinstance(columns.get("prompt"), list):
        columns["prompt"] = [{"role": "system", "content": system}, *columns["prompt"]]
    return columns


def _messages(value: Any, where: str) -> Any:
    if not _is_sharegpt(value):
        return value
    turns = value if isinstance(value, list) else [value]
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or turn.get("from") not in SPEAKERS:
            right = f'a turn is {{"from": "human", "value": "2+2?"}}, from one of {", ".join(SPEAKERS)}'
            raise DataError(f"{where}: turn {number} is {str(turn)[:60]}; {right}")
    return [{"role": SPEAKERS[turn["from"]], "content": turn.get("value")} for turn in turns]


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def _from_transcripts(chosen: Content, rejected: Content, where: str) -> Parts | str:
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise DataError(f"{where}: chosen and rejected are messages, not transcripts; set data.format=pairs")
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


def _completion(tokenizer: Any, prompt: Content, content: Content | None, limit: int) -> Completion:
    if content is None:
        return ABSENT
    ids = completion_token_ids(tokenizer, prompt, content)
    if len(ids) > limit:
        return Completion(tokenizer.decode(ids[:limit], skip_special_tokens=True), ids[:limit], [], "length")
    text = content if isinstance(content, str) else "\n\n".join(m["content"] for m in content)
    return Completion(text, ids, [], "stop")
