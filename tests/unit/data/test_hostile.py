"""Random hostile records through everything that reads a data file: our errors and no others, and counts that add up.

1,500 files of up to four records are read. `ITERDPO_HOSTILE_FILES=0:50000` reads those with these numbers instead, each
made from its number alone.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iterdpo.data.preferences import PreferenceData
from iterdpo.data.prompts import PromptFile, read_prompts
from iterdpo.data.rendering import load_tokenizer, prompt_token_ids
from iterdpo.errors import UserError
from judges.audit.agreement import read_samples
from judges.audit.labelled import read_labelled

FIRST, END = map(int, os.environ.get("ITERDPO_HOSTILE_FILES", "0:1500").split(":"))
LONGEST_MESSAGE = 20_000
MOST_MEMORY = 200 << 10  # KiB that a process may grow by
CUT = 10  # of as many files, one has damaged bytes


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


CALL = {"type": "function", "function": {"name": "f", "arguments": "{"}}
TEXTS = [
    *(
        "",
        " ",
        "\n",
        "a",
        "b",
        "2+2?",
        "\0",
        "é" * 99,
        "1e999",
        "-0",
        "nan",
        "true",
        "null",
        "[]",
        "[1]",
        "{}",
        '{"a":',
    ),
    *(
        "\ud800",
        "a\udfff",
        "\x1b[31m",
        "\u202eabc",
        "\ufeff",
        "\u2028",
        "🙂",
        "<|im_end|>",
        "<|endoftext|> ",
        "a" * 70_000,
    ),
    *(
        "\n\nHuman: a\n\nAssistant: b",
        "\n\nHuman: a\n\nAssistant: c",
        "\n\nHuman:",
        "\n\nAssistant:\n\nHuman: ",
        "Human: a",
    ),
    *(json.dumps([user("a")]), repr([user("a")]), '[{"role": "user", "content": ', "{'role': None, 'content': 'a'}"),
    *("[" * 5000, "{'from': 'human', 'value': " + "(" * 300, '[{"role":"user","content":"' + "\\ud800" + '"}]'),
]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 1.5, float("nan"), float("inf"), -float("inf"), 10**30, 10**400, 1e308),
    *([], [None], [[]], [1], ["a"], {}, {"role": "user"}, {"from": ["x"], "value": "4"}, {"role": 7, "content": "a"}),
    *(
        [user("a")],
        [user("b")],
        [user("")],
        [user(None)],
        [user("a"), {"role": "assistant", "content": "b"}],
        user("a"),
    ),
    [{"role": "assistant", "content": "b"}],
    [{"role": "assistant", "content": "c", "reasoning_content": ["x"], "thinking": "t"}],
    [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
    [{"role": "assistant", "tool_calls": json.dumps([CALL])}],
    [{"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": {"a": float("nan")}}}],
    [{"role": "tool", "content": "4", "tool_call_id": 7}, {"role": "tool", "name": "f", "content": {"a": 1}}],
    [user([{"type": "text", "text": "a"}, {"type": "image"}]), user([]), user([{"type": "text"}])],
    [user([{"type": "text", "text": "a"}])],
    [user([{"type": ["x"], "text": None}])],
    [{"role": "system", "content": "s"}, user("a")],
    [{"role": "\u202esystem", "content": "a", "name": {"b": 1}}],
    [{"role": "user", "content": "a", "\ud800": 1, "images": [1]}],
    [{"from": "human", "value": "a"}, {"from": "gpt", "value": 3}],
    [{"from": "human", "value": "a"}],
    {"from": "gpt", "value": "b"},
    [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    {"enable_thinking": False, "tokenize": True, "x": [1, {"y": None}]},
    {"a": {"b": {"c": [1, {"d": None}]}}},
    {"\ud800": {"\x1b": "\0"}},
]
COLUMNS = (
    *("prompt", "prompt", "chosen", "chosen", "rejected", "rejected", "completion", "completions", "label", "messages"),
    *(
        "conversations",
        "tools",
        "functions",
        "system",
        "system_prompt",
        "chat_template_kwargs",
        "image",
        "videos",
        "tie",
    ),
    *("score_chosen", "score_rejected", "id", "x", "", "\x1b[2J", "\ud800", "question", "y" * 3000, "chosen_rating"),
    *("num_correct", "subset", "instruction", "input", "output_1", "output_2", "response_A", "A", "question_id"),
)


def anything(source: random.Random) -> Any:
    drawn = source.random()
    if drawn < 0.45:
        return source.choice(TEXTS)
    if drawn < 0.9:
        return source.choice(VALUES)
    if drawn < 0.95:
        return [message(source) for _ in range(source.randint(1, 5))]
    if drawn < 0.96:
        return nested(source.choice([3, 50, 120, 900]), source.choice(["[]", "{}"]))
    inner = [anything(source) for _ in range(source.randint(0, 3))]
    return inner if drawn < 0.98 else {source.choice((*COLUMNS, "role", "content", "from", "value")): x for x in inner}


def message(source: random.Random) -> dict[str, Any]:
    """A message that is mostly right."""
    found = {"role": source.choice(ROLES[:4] if source.random() < 0.8 else ROLES), "content": source.choice(TEXTS)}
    if source.random() < 0.3:
        found[source.choice(KEYS)] = anything(source)
    if source.random() < 0.1:
        del found[source.choice(["role", "content"])]
    return found


def nested(depth: int, kind: str) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found] if kind == "[]" else {"a": found}
    return found


PLAIN: list[dict[str, Any]] = [
    {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    {"prompt": [user("2+2?")], "chosen": [{"role": "assistant", "content": "4"}], "rejected": "5"},
    {"prompt": "2+2?", "completion": "4", "label": True},
    {"chosen": TEXTS[23], "rejected": TEXTS[24]},
    {"conversations": [{"from": "human", "value": "2+2?"}], "chosen": {"from": "gpt", "value": "4"}, "rejected": "5"},
    {"prompt": "2+2?", "completions": ["4", "5"]},
    {"prompt": "2+2?", "chosen": ["4"], "rejected": ["5", "6"], "num_correct": 1},
    {"input": "2+2?", "output_1": "4", "output_2": "5", "label": 1},
    {"question": "2+2?", "response_A": "4", "response_B": "5", "label": "A>B"},
    {"prompt": [user("2+2?")], "chosen": "4", "rejected": "5", "tools": VALUES[-4], "chat_template_kwargs": {"x": 1}},
]
ROLES = ("user", "assistant", "system", "tool", "developer", "function", "human", "gpt", "", "\x1b", None, 7)
KEYS = (
    "role",
    "content",
    "tool_calls",
    "reasoning_content",
    "thinking",
    "name",
    "tool_call_id",
    "from",
    "value",
    "weight",
)


def record(source: random.Random) -> dict[str, Any]:
    """Random columns, some of them over a row that is fine."""
    row = dict(source.choice(PLAIN)) if source.random() < 0.6 else {}
    names = source.sample(COLUMNS, source.randint(0, 2 if row else 6))
    if source.random() < 0.01:
        row |= {f"column {number}": number for number in range(3000)}
    return row | {name: anything(source) for name in names}


def drawn(source: random.Random) -> tuple[str, list[dict[str, Any]]]:
    """The name of a file, and its rows."""
    name = source.choice(["a.json", "a.jsonl", "a.jsonl", "a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz", "a.csv.gz"])
    return name, [record(source) for _ in range(source.choice([1, 1, 2, 4]))]


def content(source: random.Random, name: str, rows: list[dict[str, Any]]) -> bytes:
    """A file of these rows; damaged at times."""
    if name.endswith("parquet"):
        buffer = io.BytesIO()
        with suppress(pa.ArrowException, UnicodeEncodeError, OverflowError):  # the types of a column differ
            flat = [{k: v for k, v in row.items() if str(v).count("[") + str(v).count("{") < 200} for row in rows]
            pq.write_table(pa.Table.from_pylist(flat), buffer)  # what is nested deeper takes Arrow gigabytes to write
        raw = buffer.getvalue()
    elif ".csv" in name:
        written = io.StringIO()
        columns = list(dict.fromkeys(column for row in rows for column in row)) or ["x"]
        writer = csv.writer(written, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([str(row.get(column, "")) for column in columns[: source.choice([99, 99, 1])]] for row in rows)
        raw = written.getvalue().encode(errors="surrogatepass")
    else:
        lines = [json.dumps(row) for row in rows]
        if source.random() < 0.1:
            lines.insert(
                source.randint(0, len(lines)), source.choice(["7", "null", "[]", "{", '"a"', "{}{}", "\ufeff", " "])
            )
        text = f"[{','.join(lines)}]" if name == "a.json" else "\n".join(lines)
        raw = text.encode()
    damaged = bytearray(raw)
    if source.randrange(CUT) == 0 and damaged:
        for _ in range(source.randint(1, 3)):
            damaged[source.randrange(len(damaged))] = source.randrange(256)
        damaged = damaged[: source.choice([len(damaged), source.randrange(len(damaged))])]
    return gzip.compress(bytes(damaged), mtime=0) if name.endswith(".gz") else bytes(damaged)


@contextmanager
def our_errors(path: str) -> Iterator[list[str]]:
    """Only a `UserError` may come out: with the file's name, and short lines that steer no terminal."""
    said: list[str] = []
    try:
        yield said
    except UserError as error:
        said.append(str(error))
    for message in said:
        assert message.startswith(path)
        assert len(message) < LONGEST_MESSAGE
        assert all(line.isprintable() for line in message.split("\n")), ascii(message)


def check_pairs(path: str, source: random.Random, tokenizer: Any) -> None:
    formats = ["auto", "auto", "auto", "pairs", "hh", "unpaired", "sharegpt"]
    settings: dict[str, Any] = {"format": source.choice(formats), "min_margin": source.choice([None, None, 0.0])}
    limits = {"max_prompt_tokens": 64, "max_completion_tokens": 32, "processes": 1}
    found: dict[str, tuple[int, dict[str, Any]]] = {}
    refused: dict[str, list[str]] = {}
    for bad_rows in ("error", "skip"):
        for tokenized in (False, True):
            with our_errors(path) as said:
                data = PreferenceData(path, bad_rows=bad_rows, **settings)  # type: ignore[arg-type]
                kept = sum(map(len, data.tokenized(tokenizer, **limits) if tokenized else data.parsed()))
                account = data.account
                assert account.kept == kept > 0
                assert account.rows == kept + sum(entry["count"] for entry in account.left_out.values())
                assert 0 <= account.desirable <= kept
                assert all(entry["count"] == len(entry["rows"]) > 0 for entry in account.left_out.values())
                places = [row for entry in account.left_out.values() for row in entry["rows"]]
                assert len(set(places)) == len(places) == account.rows - kept
                assert account.bad.counts.total() <= (account.rows - kept if bad_rows == "skip" else 0)
                found[f"{bad_rows} {tokenized}"] = account.rows, account.left_out
            refused[f"{bad_rows} {tokenized}"] = said
    for tokenized in (False, True):
        if f"error {tokenized}" in found:  # nothing is bad, so there is nothing to skip
            assert found[f"error {tokenized}"] == found[f"skip {tokenized}"]
        elif f"skip {tokenized}" in found:
            assert "bad_rows=skip" in refused[f"error {tokenized}"][0]
            assert refused[f"skip {tokenized}"] == []


def check_prompts(path: str, source: random.Random, tokenizer: Any) -> None:
    column, id_column = source.choice(["prompt", "prompt", "messages", "x"]), source.choice([None, "id", "x", "prompt"])
    counts: list[int] = []
    for bad_rows in ("error", "skip"):
        with our_errors(path):
            prompts, rows = read_prompts(path, column=column, id_column=id_column, bad_rows=bad_rows)  # type: ignore[arg-type]
            counts.append(rows)
            assert 0 < len(prompts) <= rows - sum(prompts.skipped.values())
            assert id_column is None or len(prompts) == rows - sum(prompts.skipped.values())
            assert bad_rows == "skip" or not prompts.skipped
            assert PromptFile.of(list(prompts)).digest() == prompts.digest()
            for prompt in prompts:
                assert prompt.content
                with suppress(UserError):
                    prompt_token_ids(tokenizer, prompt.content)
    assert len(set(counts)) <= 1


def check_labelled(path: str, source: random.Random, tokenizer: Any) -> None:
    given = source.choice([None, tokenizer])
    with our_errors(path):
        found, account = read_labelled(path, tokenizer=given)
        assert sum(1 for _ in found) == account.kept
    with our_errors(path):
        for _ in read_samples(path, tokenizer=given):
            pass


STRICT = """{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('\x1b[31mroles must alternate') }}{% endif %}{{ '[' + m.role + ']' + m.content | trim + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""
TOOLS = """{% for tool in tools or [] %}{{ tool.function.name + (tool | tojson) }}{% endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}{{ m.reasoning_content }}
{%- for c in m.tool_calls or [] %}{{ c.function.name }}{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}{% endfor %}
{{- '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% if x %}{{ x + 1 }}{% endif %}{% endif %}"""
TEMPLATES = (None, STRICT, TOOLS, "{{ messages[0].nothing.at_all }}")
CHECKS: list[Callable[[str, random.Random, Any], None]] = [check_pairs, check_prompts, check_labelled]


@pytest.mark.timeout(0)
def test_hostile_records_are_read_or_named_and_the_counts_add_up(tmp_path: Path, tiny_model: Path) -> None:
    tokenizers = [load_tokenizer(tiny_model) for _ in TEMPLATES]
    for tokenizer, template in zip(tokenizers, TEMPLATES, strict=True):
        tokenizer.chat_template = template or tokenizer.chat_template
    before = 0
    for number in range(FIRST, END):
        source = random.Random(number)
        tokenizer = source.choice(tokenizers)
        name, rows = drawn(source)
        path = tmp_path / name
        path.write_bytes(content(source, name, rows))
        for check in CHECKS:
            try:
                check(str(path), source, tokenizer)
            except BaseException as error:
                error.add_note(f"file {number}, {check.__name__}")
                raise
        path.unlink()
        if number == FIRST + (END - FIRST) // 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY


def test_damaged_bytes_of_parquet_and_gzip_are_read_or_named(tmp_path: Path, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    source = random.Random(1)
    row = {"prompt": "2+2?", "chosen": "4", "rejected": "5", "messages": [user("a")]}
    rows = [{**row, "x": source.random()} for _ in range(50)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "whole.parquet")
    whole = {
        "a.parquet": (tmp_path / "whole.parquet").read_bytes(),
        "a.jsonl.gz": gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()),
    }
    (tmp_path / "whole.parquet").unlink()
    for name, whole_file in whole.items():
        for _ in range(150):
            raw = bytearray(whole_file)
            for _ in range(source.randint(1, 4)):
                raw[source.randrange(len(raw))] = source.randrange(256)
            (tmp_path / name).write_bytes(raw[: source.choice([len(raw), source.randrange(len(raw))])])
            check_pairs(str(tmp_path / name), source, tokenizer)
            check_prompts(str(tmp_path / name), source, tokenizer)
        (tmp_path / name).unlink()
