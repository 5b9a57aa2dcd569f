"""Labelled pairs as they are read, and mistakes in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from iterdpo.errors import DataError
from iterdpo.run.rundir import write_jsonl
from judges.audit.check import check_judge_on
from judges.audit.labelled import read_labelled
from judges.load import load_judge


def test_pairs_keep_their_other_columns_for_the_judge_and_never_the_label(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": "2+2?", "chosen": "4", "rejected": "5", "gold": "4", "subset": "math", "tie": False},
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Hey", "gold": None, "subset": "chat", "tie": True},
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Hello", "gold": None, "subset": "chat", "tie": None},
    ]
    write_jsonl(path, rows)
    pairs, account = read_labelled(str(path), subset_column="subset")
    first, second = list(pairs)
    assert first.prompt.columns == {"gold": "4", "subset": "math"}
    assert (first.tie, first.subset, second.tie, second.row) == (False, "math", True, 2)
    assert account.summary() == "kept 2 of 3 pairs (1 have identical completions)"
    judge_file = tmp_path / "exact.py"
    judge_file.write_text("def exact(completion, gold):\n    return float(completion == gold)\n")
    check = check_judge_on(load_judge(f"{judge_file}:exact", {}), [first])
    assert check.pairs[0].judgment.scores == (1.0, 0.0)


def test_mistakes_in_the_data_name_the_row_and_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, [{"prompt": "a", "chosen": "b", "rejected": "c", "tie": "maybe"}])
    with pytest.raises(DataError, match=r"row 1, column 'tie' is 'maybe'; it must be true"):
        list(read_labelled(str(path))[0])
    write_jsonl(path, [{"prompt": "a", "chosen": "b", "rejected": "c", "kind": "x"}])
    with pytest.raises(DataError, match=r"row 1: no column 'kin', only .*did you mean 'kind'\? set --subset-column"):
        list(read_labelled(str(path), subset_column="kin")[0])
    write_jsonl(path, [{"prompt": "a", "completion": "b", "label": True}])
    with pytest.raises(DataError, match="has one completion per row"):
        read_labelled(str(path))
