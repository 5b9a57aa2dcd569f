"""What stages hand to each other: frozen handles on finished steps, which stream their rows from disk.

Completions lie in Parquet shards, a row a prompt, in columns of lists: token ids as int32, log-probabilities as
float32. Judgments lie in JSON lines, a row a prompt, in shards of the same names. Both open with
`datasets.load_dataset`. No handle holds rows: what iterates over one has a shard in memory.
"""

from __future__ import annotations

import io
import itertools
import json
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from iterdpo.errors import DamagedError
from iterdpo.run.rundir import Manifest, read_jsonl, write_jsonl, write_with
from iterdpo.run.sums import read_checked
from iterdpo.types import Completion, CompletionGroup, Judgment, Prompt, content_from_json, content_to_json

if TYPE_CHECKING:
    import pyarrow as pa


REASONING, REASONING_TOKENS = "reasoning", "reasoning_tokens"
"""Columns of the completions of a thinking model."""


@dataclass(frozen=True, slots=True)
class PolicyCheckpoint:
    """A checkpoint of the lineage: `PolicyCheckpoint(path, digest="81f0…", round=2)`; round 0 is the initial policy."""

    path: Path
    digest: str
    round: int


@dataclass(frozen=True, slots=True)
class Completions:
    """K completions of each of a round's prompts: `Completions(path, digest="5c1e…", prompts=128, completions=512)`."""

    path: Path
    digest: str
    prompts: int
    completions: int

    @staticmethod
    def of(path: Path, manifest: Manifest) -> Completions:
        return Completions(path, manifest.digest, manifest.counts["prompts"], manifest.counts["completions"])

    def __iter__(self) -> Iterator[CompletionGroup]:
        return read_groups(self.path)


@dataclass(frozen=True, slots=True)
class Judgments:
    """A judge's scores or abstentions for `completions`: `Judgments(path, digest="b07a…", completions="5c1e…", flip_rate=0.1)`."""

    path: Path
    digest: str
    completions: str
    """The digest of what was judged."""
    flip_rate: float | None = None
    """Of the comparisons shown in both orders, the share whose winner changed with the order."""

    @staticmethod
    def of(path: Path, manifest: Manifest) -> Judgments:
        flip_rate = manifest.counts["metrics"].get("flip_rate")
        return Judgments(path, manifest.digest, manifest.inputs["completions"], flip_rate)

    def __iter__(self) -> Iterator[Judgment]:
        return read_judgments(self.path)


@dataclass(frozen=True, slots=True)
class Pairs:
    """A round's preference pairs on disk: `Pairs(path, digest="9d20…", kept=121)`; `kept` are those to train on."""

    path: Path
    digest: str
    kept: int

    @staticmethod
    def of(path: Path, manifest: Manifest) -> Pairs:
        return Pairs(path, manifest.digest, manifest.counts["kept"])


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How a policy does on the held-out prompts: `Evaluation(path, digest="e4c3…", round=2)`."""

    path: Path
    digest: str
    round: int

    @property
    def completions(self) -> Path:
        return self.path / "completions"

    def judgments(self) -> dict[str, Path]:
        """The directory of judgments, by role of the judge."""
        return {role.name: role for role in sorted((self.path / "judgments").glob("*"))}


def shard_name(number: int) -> str:
    return f"shard-{number:06d}"


def completion_shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("shard-*.parquet"))


def write_card(directory: Path, shards: str) -> None:
    """The page that lists a step's data files for `datasets`, because the manifest next to them is JSON too."""
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {json.dumps(shards)}\n---\n"
    (directory / "README.md").write_text(card, encoding="utf-8")


def read_groups(directory: Path, *, arrays: bool = False) -> Iterator[CompletionGroup]:
    """Every group in `directory`, a shard in memory at a time; see `read_completion_shard`."""
    return (group for path in completion_shards(directory) for group in read_completion_shard(path, arrays=arrays))


def read_answer_ids(directory: Path) -> Iterator[array[int]]:
    """The token ids of every completion's answer in `directory`: all of its ids, but for a thinking model.

    Nothing else of a shard is read.
    """
    for path in completion_shards(directory):
        table = _read_shard(path, ["token_ids", REASONING_TOKENS])
        ids = _unnested(table["token_ids"].values, "i")
        if REASONING_TOKENS in table:
            starts = table[REASONING_TOKENS].values.to_pylist()
            ids = [row[start:] for row, start in zip(ids, starts, strict=True)]
        yield from ids


def read_logprobs(directory: Path) -> Iterator[array[float]]:
    """The engine's log-probabilities of every completion's tokens. Nothing else of a shard is read."""
    for path in completion_shards(directory):
        yield from _unnested(_read_shard(path, ["logprobs"])["logprobs"].values, "f")


def read_texts(directory: Path) -> Iterator[str]:
    """The text of every completion, of a thinking model of its answer. Nothing else of a shard is read."""
    for path in completion_shards(directory):
        yield from _read_shard(path, ["completions"])["completions"].values.to_pylist()


def read_judgments(directory: Path) -> Iterator[Judgment]:
    """Every judgment in `directory`, a shard in memory at a time."""
    return itertools.chain.from_iterable(map(read_judgment_shard, sorted(directory.glob("shard-*.jsonl"))))


def read_judgment_shard(path: Path) -> list[Judgment]:
    """The judgments of one shard.

    Raises:
        DamagedError: the file is not as it was written.
    """
    try:
        return [Judgment.from_json(row) for row in read_jsonl(path)]
    except (TypeError, KeyError, AttributeError) as error:
        raise DamagedError(path, f"a line is no judgment ({error})") from None


def write_judgment_shard(path: Path, judgments: Iterable[Judgment]) -> None:
    write_jsonl(path, (j.to_json() for j in judgments), record=path.parent)


def sampled_prompts(directory: Path) -> int:
    """Prompts in the finished shards of a directory of completions, from their headers."""
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(path).num_rows for path in directory.glob("shard-*.parquet"))


def write_completion_shard(path: Path, groups: Sequence[CompletionGroup]) -> None:
    """Write the groups as one Parquet file, durably, under a temporary name first."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    each = [c for g in groups for c in g.completions]
    counts = [len(g.completions) for g in groups]
    contents = [content_to_json(g.prompt.content) for g in groups]
    columns = {
        "prompt_id": pa.array([g.prompt.id for g in groups], pa.string()),
        "prompt": pa.array([c if isinstance(c, str) else _json(c) for c in contents], pa.string()),
        "conversational": pa.array([g.prompt.conversational for g in groups], pa.bool_()),
        "columns": pa.array([_json(g.prompt.columns) for g in groups], pa.string()),
        "prompt_token_ids": number_lists([g.prompt_ids for g in groups], "i"),
        "completions": _lists_of(pa.array([c.text for c in each], pa.string()), counts),
        "token_ids": _lists_of(number_lists([c.token_ids for c in each], "i"), counts),
        "logprobs": _lists_of(number_lists([c.logprobs for c in each], "f"), counts),
        "finish_reasons": _lists_of(pa.array([c.finish_reason for c in each], pa.string()), counts),
    }
    if any(c.reasoning is not None for c in each):  # then all have it; other models' shards are without these columns
        columns[REASONING] = _lists_of(pa.array([c.reasoning for c in each], pa.string()), counts)
        columns[REASONING_TOKENS] = _lists_of(pa.array([c.reasoning_tokens for c in each], pa.int32()), counts)
    table = pa.table(columns)
    # Token ids neither repeat nor have an order that a dictionary or statistics would profit from.
    settings = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
    write_with(path, lambda handle: pq.write_table(table, handle, **settings), record=path.parent)


def read_completion_shard(path: Path, *, arrays: bool = False) -> list[CompletionGroup]:
    """The groups of one shard, as they were sampled. A damaged file is a DataError.

    With `arrays`, token ids and log-probabilities are arrays in place of lists: quicker, for what only passes them on.

    Raises:
        DamagedError: the file is not as it was written.
    """
    table = _read_shard(path)
    offsets = table["token_ids"].offsets.to_pylist()
    texts, reasons = table["completions"].values.to_pylist(), table["finish_reasons"].values.to_pylist()
    ids = _unnested(table["token_ids"].values, "i", lists=not arrays)
    logprobs = _unnested(table["logprobs"].values, "f", lists=not arrays)
    parts = [table[name].values.to_pylist() for name in (REASONING, REASONING_TOKENS) if name in table]
    completions = list(map(Completion, texts, ids, logprobs, reasons, *parts))
    texts = table["prompt"].to_pylist()
    conversational = table["conversational"].to_pylist()
    contents = [
        content_from_json(json.loads(text)) if chat else text for text, chat in zip(texts, conversational, strict=True)
    ]
    columns = json.loads(f"[{','.join(table['columns'].to_pylist())}]")
    prompts = map(Prompt, table["prompt_id"].to_pylist(), contents, columns)
    prompt_ids = _unnested(table["prompt_token_ids"], "i", lists=True)
    groups = zip(prompts, prompt_ids, offsets[:-1], offsets[1:], strict=True)
    return [CompletionGroup(prompt, ids, completions[start:end]) for prompt, ids, start, end in groups]


def _read_shard(path: Path, columns: list[str] | None = None) -> dict[str, Any]:
    """The columns of a shard by name: all, or those of the given ones that it has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = io.BytesIO(read_checked(path))
    try:
        if columns is not None:
            columns = [name for name in columns if name in pq.read_schema(data).names]
        table = pq.read_table(data, columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(path, f"it cannot be read ({error})") from None
    return {name: table[name].combine_chunks() for name in table.column_names}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def number_lists(rows: Sequence[Sequence[Any]], kind: Literal["i", "f"]) -> pa.ListArray:
    """Rows of numbers, as int32 (i) or float32 (f): packed several times as quickly as Arrow does."""
    import pyarrow as pa

    lengths = [len(row) for row in rows]

    def packed(row: Sequence[Any]) -> bytes | array[Any]:
        return row if isinstance(row, array) and row.typecode == kind else struct.pack(f"{len(row)}{kind}", *row)

    buffer = pa.py_buffer(b"".join(map(packed, rows)))
    typed = {"i": pa.int32(), "f": pa.float32()}[kind]
    return _lists_of(pa.Array.from_buffers(typed, sum(lengths), [None, buffer]), lengths)


def _lists_of(values: pa.Array, lengths: Sequence[int]) -> pa.ListArray:
    import pyarrow as pa

    return pa.ListArray.from_arrays(pa.array([0, *itertools.accumulate(lengths)], pa.int32()), values)


def _unnested(rows: pa.ListArray, kind: Literal["i", "f"], *, lists: bool = False) -> list[Any]:
    """The rows as arrays, cut out of one, or as lists of it: many times as quick as `to_pylist`."""
    flat = array(kind, rows.values.to_numpy().tobytes())
    cut = [flat[start:end] for start, end in itertools.pairwise(rows.offsets.to_pylist())]
    return [row.tolist() for row in cut] if lists else cut
