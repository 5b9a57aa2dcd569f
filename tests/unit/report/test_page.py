"""What the page reads of a run."""

from __future__ import annotations

from pathlib import Path

from iterdpo.report.page import EXAMPLES, write_report
from iterdpo.run.artifacts import shard_name, write_completion_shard, write_judgment_shard
from iterdpo.run.rundir import RunDir
from iterdpo.types import Completion, CompletionGroup, Judgment, Prompt


def test_only_the_shards_of_the_shown_prompts_are_read(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.write_config({})
    step = run.round_dir(0) / "evaluation"
    (step / "judgments" / "train_judge").mkdir(parents=True)
    (step / "completions").mkdir()
    for number in (0, 1):
        groups = [
            CompletionGroup(
                Prompt(f"p-{number}-{i:02d}", f"question {number} {i}"),
                [1],
                [Completion(f"answer {number} {i}", [1, 2], [-1.0, -1.0], "length")],
            )
            for i in range(EXAMPLES + 2)
        ]
        name = shard_name(number)
        write_completion_shard(step / "completions" / f"{name}.parquet", groups)
        judgments = [Judgment(g.prompt.id, [0.5], [None]) for g in groups[1:]]
        judgments.insert(0, Judgment(groups[0].prompt.id, [None], ["timed out"]))
        write_judgment_shard(step / "judgments" / "train_judge" / f"{name}.jsonl", judgments)
    (step / "judgments" / "train_judge" / f"{shard_name(1)}.jsonl").write_text("not read")
    page = write_report(tmp_path).read_text()
    assert [f"answer 0 {i}" in page for i in range(EXAMPLES + 2)] == [True] * EXAMPLES + [False] * 2
    assert "answer 1" not in page
    assert 'abstained: <i dir="auto">timed out</i>' in page
    assert page.count("<b>0.50</b>") == EXAMPLES - 1
    assert "2 tokens, cut" in page
