"""Which prompts a round sees, and which are held out; and the reader of every data file.

Every choice orders prompts by a hash of (seed, purpose, prompt id): nothing depends on the order of the file.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from iterdpo.config import PromptsConfig
from iterdpo.errors import DataError
from iterdpo.run.rundir import canonical, digest, sha256_file
from iterdpo.seeds import derive_seed
from iterdpo.types import Message, Prompt

FORMATS = ("json", "jsonl", "csv", "parquet")
SPLIT_NAMES = {"train", "test", "validation", "valid", "val", "dev", "eval"}
NOT_DATA = {"MANIFEST.json", "STEP.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


@dataclass
class PromptSet:
    """A run's prompts. No held-out prompt, by id or by content, is in `train`.

    `PromptSet(train=[…], heldout=[…], dropped={"repeated": 12, "in_heldout": 3})`; `dropped` counts rows of the file.
    """

    train: list[Prompt]
    heldout: list[Prompt]
    dropped: dict[str, int]


def split_prompts(config: PromptsConfig, seed: int, *, pinned: list[Prompt] | None = None) -> PromptSet:
    """Read the prompts and hold some out: `heldout` of them by hash, or as many of `heldout_path`'s.

    `pinned` are the held-out prompts of a run that has begun: they stay, whatever was added to the file since.

    Raises:
        DataError: a file that cannot be read, or too few prompts for the held-out set and one round.
    """
    prompts, repeated = _read_prompts(config.path, config.split, config.column, config.id_column)
    pool = prompts
    if config.heldout_path is not None:
        pool, _ = _read_prompts(config.heldout_path, config.split, config.column, config.id_column)
    heldout = pinned or _ordered(pool, seed, "heldout")[: config.heldout]
    if pinned and not {digest(p.content) for p in pinned} & {digest(p.content) for p in pool}:
        raise DataError(
            f"{config.heldout_path or config.path}: none of the {len(pinned):,} prompts that this run holds out is in it. "
            "Other prompts are another run: choose another run_dir, or name the file that has them in "
            "prompts.heldout_path"
        )

    apart = heldout if pool is prompts else [*heldout, *pool]  # all of heldout_path, also what `heldout` leaves unused
    ids, contents = {p.id for p in apart}, {digest(p.content) for p in apart}
    train = [p for p in prompts if p.id not in ids and digest(p.content) not in contents]
    if len(train) < config.per_round:
        raise DataError(
            f"{config.path}: {len(prompts):,} different prompts leave {len(train):,} to train on beside the "
            f"{len(heldout):,} held out, and a round needs {config.per_round:,}; add prompts, or lower "
            "prompts.per_round or prompts.heldout"
        )
    own = {p.id for p in heldout} if pool is prompts else set()
    in_heldout = sum(p.id not in own for p in prompts) - len(train)
    return PromptSet(train, heldout, {"repeated": repeated, "in_heldout": in_heldout})


def next_prompts(
    prompts: PromptSet, used: Mapping[str, int], *, round: int, per_round: int, seed: int, reuse: bool
) -> list[Prompt]:
    """The prompts of `round`: `per_round` of those used least so far, in a seeded order.

    `used` counts, by id, the rounds before that saw a prompt; a prompt that is not in it is new, also where it was
    added to the file since. With `reuse`, every prompt has its turn before one comes again, in another order.

    Raises:
        DataError: fewer unused prompts are left than the round needs.
    """
    fresh = sum(not used.get(p.id) for p in prompts.train)
    count = len(prompts.train)
    if count < per_round or (fresh < per_round and not reuse):
        raise DataError(
            f"round {round} needs {per_round:,} prompts, and {fresh:,} of {count:,} are left after "
            f"{round - 1} rounds; add prompts, lower prompts.per_round, or set prompts.reuse=true"
        )

    def turn(prompt: Prompt) -> tuple[int, int]:
        times = used.get(prompt.id, 0)
        return times, derive_seed(seed, "order", times, prompt.id)

    return sorted(prompts.train, key=turn)[:per_round]


def load_prompts(path: str, split: str = "train", column: str = "prompt", id_column: str | None = None) -> list[Prompt]:
    """The different prompts of a data set, in its order.

    An id is the value of `id_column`, or else a hash of the prompt, and then repeated prompts are dropped. The other
    columns travel in `Prompt.columns`; what JSON cannot hold becomes text.

    Raises:
        DataError: a file that cannot be read, a column that is missing, a prompt that is neither text nor messages,
            is empty or ends with an assistant turn, or an id that occurs twice.
    """
    return _read_prompts(path, split, column, id_column)[0]


def check_lengths(lengths: Iterable[tuple[int, str]], limit: int) -> int:
    """The length of the longest prompt, in tokens; `lengths` are (tokens, prompt id).

    Raises:
        DataError: prompts have more than `limit` tokens; it names the longest.
    """
    count = over = longest = 0
    longest_id = ""
    for length, prompt_id in lengths:
        count += 1
        over += length > limit
        if length > longest:
            longest, longest_id = length, prompt_id
    if over:
        raise DataError(
            f"prompt {longest_id!r} has {longest:,} tokens, and {limit:,} fit ({over:,} of {count:,} "
            "prompts are too long); raise sampling.engine.max_model_len, lower sampling.max_tokens, or remove them"
        )
    return longest


def load_rows(path: str, split: str, *, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a data set, one at a time, so that its size does not matter: the first `limit` of them, or all.

    `path` is a .json, .jsonl or .csv file (also .gz), a .parquet file, a directory of such files, or a hub id. Of a
    directory, the files named for `split` are read (`train.jsonl`, `train-00000-of-00002.parquet`), or all where no
    name tells of a split. CSV values are text.

    Raises:
        DataError: a file that is missing, empty or broken (with the line, also while iterating), or a data set that
            the hub does not give.
    """
    rows = islice(_rows(path, split), limit)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{path}: no rows in it")
    return chain([first], rows)


def source_digest(path: str, split: str) -> str:
    """A hash of what `load_rows` reads: the bytes of its files, wherever they lie, or a hub data set's fingerprint.

    Raises:
        DataError: a file that is missing or cannot be read, or a data set that the hub does not give.
    """
    files = _local_files(path, split)
    if files is None:
        return _hub_dataset(path, split)._fingerprint
    try:
        return digest([sha256_file(file) for file in files])
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def column_value(row: dict[str, Any], column: str, where: str, remedy: str) -> Any:
    """`row[column]`.

    Raises:
        DataError: the row has no such column; it names those there are and the nearest.
    """
    if column in row:
        return row[column]
    near = difflib.get_close_matches(column, row, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise DataError(f"{where}: no column {column!r}, only {', '.join(map(repr, row))}; {hint}{remedy}")


def content_of(value: Any, where: str) -> str | list[Message]:
    """`value` as text or chat messages, without keys that are null, as Parquet fills in.

    Raises:
        DataError: it is neither, or its text cannot be written as UTF-8.
    """
    content: str | list[Message]
    if isinstance(value, str):
        content, texts = value, [value]
    elif isinstance(value, list) and all(isinstance(m, dict) for m in value):
        content = [_message(m, f"{where}: message {number}") for number, m in enumerate(value, 1)]
        texts = [text for message in content for text in message.values()]
    else:
        raise DataError(
            f"{where} is {_shown(value)}; it must be text, or a list of messages such as "
            '{"role": "user", "content": "2+2?"}'
        )
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} has half of a surrogate pair, {error.object[error.start]!r}; write the whole"
        ) from None
    return content


def _message(value: dict[str, Any], where: str) -> Message:
    message = {key: item for key, item in value.items() if item is not None}
    for key in ("role", "content", *message):
        if not isinstance(message.get(key), str):
            raise DataError(f"{where}: {key!r} is {_shown(message.get(key))}; it must be text")
    return message


def _read_prompts(path: str, split: str, column: str, id_column: str | None) -> tuple[list[Prompt], int]:
    """The different prompts, and how many rows repeated one."""
    found: dict[str, Prompt] = {}
    seen_in: dict[str, int] = {}
    repeated = 0
    for number, row in enumerate(load_rows(path, split), 1):
        where = f"{path}: row {number}"
        content = content_of(column_value(row, column, where, "set prompts.column"), f"{where}, column {column!r}")
        if not content or (isinstance(content, str) and not content.strip()):
            raise DataError(f"{where}, column {column!r} is empty; remove the row")
        if not isinstance(content, str) and content[-1]["role"] == "assistant":
            raise DataError(
                f"{where}, column {column!r} ends with an assistant turn; a prompt ends before the completion: take "
                "that message out"
            )
        if id_column is None:
            prompt_id = f"p-{digest(content)}"
            if prompt_id in found:
                repeated += 1
                continue
        else:
            prompt_id = str(column_value(row, id_column, where, "set prompts.id_column"))
            if prompt_id in found:
                raise DataError(
                    f"{where}: id {prompt_id!r} in column {id_column!r} is row {seen_in[prompt_id]}'s already; ids must "
                    "be unique, or leave prompts.id_column out"
                )
            seen_in[prompt_id] = number
        columns = {k: json_value(v) for k, v in row.items() if k not in (column, id_column)}
        found[prompt_id] = Prompt(prompt_id, content, columns)
    return list(found.values()), repeated


def _ordered(prompts: list[Prompt], seed: int, *purpose: int | str) -> list[Prompt]:
    return sorted(prompts, key=lambda p: (derive_seed(seed, *purpose, p.id), p.id))


def json_value(value: Any) -> Any:
    """`value` where JSON can have it, else its text."""
    try:
        canonical(value).encode()
    except (TypeError, ValueError):
        return str(value).encode(errors="replace").decode()
    return value


def _shown(value: Any) -> str:
    return "missing or null" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"


# Files


def _rows(path: str, split: str) -> Iterator[dict[str, Any]]:
    files = _local_files(path, split)
    if files is None:
        return iter(_hub_dataset(path, split))
    return chain.from_iterable(map(_file_rows, files))


def _local_files(path: str, split: str) -> list[Path] | None:
    """The files that are read; None where the path is a hub id."""
    local = Path(path).expanduser()
    if local.is_dir():
        return _data_files(local, split)
    if local.exists():
        return [local]
    # a hub id is one or two plain names; "v1.5" is no file's suffix
    if path.startswith(("/", ".", "~")) or path.count("/") > 1 or re.search(r"\.[a-zA-Z]\w*$", path):
        raise DataError(f"{path}: no such file or directory; relative paths start at the current directory")
    return None


def _hub_dataset(path: str, split: str) -> Any:
    """A memory-mapped `datasets.Dataset`."""
    import datasets
    import huggingface_hub

    try:
        if not (huggingface_hub.constants.HF_HUB_OFFLINE or datasets.config.HF_DATASETS_OFFLINE):
            huggingface_hub.dataset_info(path, timeout=8)  # load_dataset retries a wrong name for half a minute
        return datasets.load_dataset(path, split=split)
    except Exception as error:  # every layer of the hub's client has errors of its own
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{path}: no such file, and as a hub data set, split {split!r}, it cannot be loaded "
            f"({type(error).__name__}: {reason}); check the name, the split and the network, or download it and give "
            "the file"
        ) from error


def _data_files(directory: Path, split: str) -> list[Path]:
    hidden = (".", "_")
    files = sorted(f for f in directory.iterdir() if _format(f) in FORMATS and f.is_file())
    files = [f for f in files if not f.name.startswith(hidden) and f.name not in NOT_DATA]
    if not files:
        raise DataError(f"{directory}: no .json, .jsonl, .csv or .parquet file in it; name the directory that has them")
    words = {f: re.split(r"[-._]", f.name) for f in files}
    named = [f for f in files if re.split(r"[-.]", f.name)[0] == split] or [f for f in files if split in words[f]]
    if not named and any(SPLIT_NAMES & set(w) for w in words.values()):
        raise DataError(
            f"{directory}: no file is named for split {split!r}, only {', '.join(f.name for f in files)}; set the split"
        )
    return named or files


def _format(file: Path) -> str:
    return file.name.lower().removesuffix(".gz").rpartition(".")[2]


def _file_rows(file: Path) -> Iterator[dict[str, Any]]:
    kind = _format(file)
    if kind not in FORMATS:
        raise DataError(f"{file}: unknown kind of file; give .json, .jsonl, .csv (also .gz) or .parquet")
    if kind == "parquet":
        yield from _parquet_rows(file)
        return
    opener: Any = gzip.open if file.name.lower().endswith(".gz") else open
    try:
        with opener(file, "rt", encoding="utf-8-sig", newline="") as handle:
            yield from _csv_rows(handle, file) if kind == "csv" else _json_rows(handle, file)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from error


def _json_rows(handle: TextIO, file: Path) -> Iterator[dict[str, Any]]:
    """One object a line, or one list of objects, whatever the file's suffix: both are found as .json."""
    while (head := handle.read(1)).isspace():
        pass
    handle.seek(0)
    line = 0
    try:
        if head == "[":
            for number, row in enumerate(_json_items(handle), 1):
                yield _object(row, f"{file}: item {number}")
            return
        for line, text in enumerate(handle, 1):
            if text.strip():
                yield _object(json.loads(text), f"{file}:{line}")
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}:{line or error.lineno}: not valid JSON: {error.msg} at column {error.colno}; write one object a "
            "line, or one list of objects"
        ) from None


def _json_items(handle: TextIO) -> Iterator[Any]:
    """The items of a JSON list, decoded one by one, so that a large file is never in memory.

    Raises:
        json.JSONDecodeError: with the line and column in the file.
    """
    decoder = json.JSONDecoder()
    text, at = "", 0  # what is in memory, and up to where it is decoded
    line, column = 1, 0  # where in the file `text` begins

    def fill() -> bool:
        """Forget what is decoded and read on; False at the end of the file."""
        nonlocal text, at, line, column
        last = text.rfind("\n", 0, at)
        line, column = line + text.count("\n", 0, at), at - last - 1 if last >= 0 else column + at
        more = handle.read(max(1 << 20, len(text)))
        text, at = text[at:] + more, 0
        return bool(more)

    def mark() -> str:
        """The next character that is no white space; "" at the end of the file."""
        nonlocal at
        while True:
            while text[at : at + 1].isspace():
                at += 1
            if at < len(text) or not fill():
                return text[at : at + 1]

    def failure(message: str, position: int) -> json.JSONDecodeError:
        return json.JSONDecodeError(message, "\n" * (line - 1) + " " * column + text, line - 1 + column + position)

    mark()
    at += 1  # the opening bracket
    closed = mark() == "]"
    at += closed
    while not closed:
        mark()
        while True:
            try:
                item, at = decoder.raw_decode(text, at)
                break
            except json.JSONDecodeError as error:
                behind = error.pos - at
                if not fill():  # or else the item was cut
                    raise failure(error.msg, behind) from None
        yield item
        if mark() not in (",", "]"):
            raise failure("Expecting ',' delimiter", at)
        closed = text[at] == "]"
        at += 1
    if mark():
        raise failure("Extra data", at)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{where}: {_shown(value)}; a row is an object, such as {{"prompt": "2+2?"}}')
    return value


def _csv_rows(handle: TextIO, file: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # a long prompt is no error
    reader = csv.DictReader(handle, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{file}:{reader.line_num}: another number of fields than the header's "
                    f"{len(reader.fieldnames or ())}; quote texts that hold commas or line breaks"
                )
            yield row
    except csv.Error as error:
        begins = reader.line_num + 1  # the line behind the last good row
        raise DataError(f"{file}:{begins}: not valid CSV: {error}") from None


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file, buffer_size=1 << 20) as table:  # or else a row group is read whole
            for batch in table.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: cannot be read as Parquet ({error})") from error
