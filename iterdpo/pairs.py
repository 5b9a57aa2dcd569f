"""Preference pairs on disk: a Parquet file that `datasets.load_dataset` opens and TRL's DPOTrainer trains on.

Columns `prompt`, `chosen` and `rejected` are TRL's (text, or messages where the prompt is conversational). Beside
them are the token ids that the sampler produced and our trainer reads, the scores, and how each completion ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iterdpo.types import Message, PreferencePair

if TYPE_CHECKING:
    from iterdpo.collate import TokenPair

TRAIN, HELDOUT = "train.parquet", "heldout.parquet"

# A loader that guesses would take the JSON files beside the data for data.
CARD = """---
configs:
- config_name: default
  data_files:
{data_files}---
Preference pairs of iterdpo. `prompt`, `chosen`, `rejected` are in TRL's preference format.
{summary}
"""


def write_pairs(
    directory: Path, pairs: Sequence[PreferencePair], *, heldout: Sequence[PreferencePair] = (), summary: str
) -> None:
    """Write `train.parquet`, `heldout.parquet` where there are such pairs, and the card that names them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data_files = ""
    for name, split, part in ((TRAIN, "train", pairs), (HELDOUT, "test", heldout)):
        if part or name == TRAIN:
            pq.write_table(pa.Table.from_pylist([_row(pair) for pair in part]), directory / name)
            data_files += f"  - split: {split}\n    path: {name}\n"
    (directory / "README.md").write_text(CARD.format(data_files=data_files, summary=summary), encoding="utf-8")


def read_token_pairs(path: Path) -> list[TokenPair]:
    """What training needs of a file of pairs."""
    import pyarrow.parquet as pq

    from iterdpo.collate import TokenPair

    columns = ["prompt_token_ids", "chosen_token_ids", "rejected_token_ids"]
    table = pq.read_table(path, columns=columns).to_pydict()
    return [TokenPair(*row) for row in zip(*(table[c] for c in columns), strict=True)]


def _row(pair: PreferencePair) -> dict[str, Any]:
    def completion(text: str) -> str | list[Message]:
        return [{"role": "assistant", "content": text}] if pair.prompt.conversational else text

    return {
        "prompt": pair.prompt.content,
        "chosen": completion(pair.chosen.text),
        "rejected": completion(pair.rejected.text),
        "prompt_id": pair.prompt.id,
        "chosen_score": pair.chosen_score,
        "rejected_score": pair.rejected_score,
        "chosen_finish_reason": pair.chosen.finish_reason,
        "rejected_finish_reason": pair.rejected.finish_reason,
        "prompt_token_ids": pair.prompt_ids,
        "chosen_token_ids": pair.chosen.token_ids,
        "rejected_token_ids": pair.rejected.token_ids,
    }
