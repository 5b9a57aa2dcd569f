"""Which prompts a round of a run samples: what it began with, else what no round before it has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from iterdpo.config import PromptsConfig
from iterdpo.data.round_prompts import RoundPrompts
from iterdpo.errors import DataError
from iterdpo.run.rundir import RunDir, read_jsonl


class Run:
    """A prompt file and a run directory, which a run is opened over again and again."""

    def __init__(self, root: Path) -> None:
        self.root, self.file = root, root / "prompts.jsonl"
        self.write(range(30))

    def write(self, numbers: Any) -> None:
        rows = [{"prompt": f"Tale {i}", "topic": ["sea", "sky"][i % 2], "nested": {"number": i}} for i in numbers]
        self.file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def open(self, *, rounds: int = 2, seed: int = 0, **section: Any) -> RoundPrompts:
        config = PromptsConfig(**{"path": str(self.file), "per_round": 5, "heldout": 4, **section})
        return RoundPrompts(config, RunDir(self.root / "run"), rounds=rounds, seed=seed)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def ids(prompts: Any) -> list[str]:
    return [p.id for p in prompts]


def test_no_prompt_is_in_two_rounds_or_held_out_and_in_a_round(run: Run) -> None:
    prompts = run.open(rounds=3)
    parts = [prompts.heldout, *(prompts.of(t) for t in (1, 2, 3))]
    assert [len(part) for part in parts] == [4, 5, 5, 5]
    assert len({i for part in parts for i in ids(part)}) == 19
    assert set(ids(prompts.train)).isdisjoint(ids(prompts.heldout))
    assert len(prompts.train) == 26


def test_prompts_are_the_same_whatever_the_order_of_the_file_and_others_with_another_seed(run: Run) -> None:
    first = run.open()
    before = ids(first.heldout), ids(first.of(1)), ids(first.of(2))
    run.write(reversed(range(30)))
    again = run.open()
    assert (ids(again.heldout), ids(again.of(1)), ids(again.of(2))) == before
    other = run.open(seed=1)
    assert (ids(other.heldout), ids(other.of(1))) != before[:2]


def test_prompts_may_be_read_over_and_over_with_their_columns(run: Run) -> None:
    prompts = run.open().of(1)
    assert list(prompts) == list(prompts)
    assert prompts.columns() == {"topic", "nested"}
    assert all(str(p.columns["nested"]["number"]) in str(p.content) for p in prompts)


def test_a_digest_is_of_ids_contents_and_columns(run: Run) -> None:
    digest = run.open().of(1).digest()
    assert run.open().of(1).digest() == digest
    assert run.open().of(2).digest() != digest
    run.file.write_text(run.file.read_text().replace('"sky"', '"star"'))
    assert run.open().of(1).digest() != digest


def test_constructing_writes_nothing(run: Run) -> None:
    run.open()
    assert not (run.root / "run").exists()


def test_a_round_that_has_begun_keeps_its_prompts_if_the_file_grows(run: Run) -> None:
    first = run.open()
    first.pin(0)
    first.pin(1)
    heldout, begun, digest = list(first.heldout), list(first.of(1)), first.of(1).digest()
    run.write(range(60))
    again = run.open()
    assert (list(again.heldout), list(again.of(1)), again.of(1).digest()) == (heldout, begun, digest)
    assert set(ids(again.of(2))).isdisjoint(ids(begun) + ids(heldout))


def test_what_is_written_down_has_a_line_a_prompt(run: Run) -> None:
    prompts = run.open()
    prompts.pin(0)
    prompts.pin(1)
    for part, name in ((prompts.heldout, "heldout.jsonl"), (prompts.of(1), "round-001/prompts.jsonl")):
        rows = read_jsonl(run.root / "run" / name)
        assert all(str(p.content) in json.dumps(row) for p, row in zip(part, rows, strict=True))


def test_pinning_changes_neither_prompts_nor_digest(run: Run) -> None:
    prompts = run.open()
    before = list(prompts.of(1)), prompts.of(1).digest(), list(prompts.of(2))
    prompts.pin(1)
    assert (list(prompts.of(1)), prompts.of(1).digest(), list(prompts.of(2))) == before


def test_another_number_is_chosen_anew(run: Run) -> None:
    run.open().pin(1)
    assert len(run.open(per_round=6).of(1)) == 6


def test_too_few_prompts_for_all_rounds_are_refused_at_once_unless_they_are_used_again(run: Run) -> None:
    with pytest.raises(DataError, match=r"round 6 needs 5 prompts, but 1 of 26 are left after 5 rounds"):
        run.open(rounds=6)
    reused = run.open(rounds=6, reuse=True)
    assert len(reused.of(6)) == 5
    assert len({i for t in range(1, 7) for i in ids(reused.of(t))}) == 26


def test_a_file_without_any_of_the_heldout_prompts_is_refused(run: Run) -> None:
    run.open().pin(0)
    run.write(range(100, 130))
    with pytest.raises(DataError, match="none of the 4 prompts that this run holds out is in it"):
        run.open()
