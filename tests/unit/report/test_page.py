"""What the page reads of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

from iterdpo.config import RuleConfig
from iterdpo.gate import decide
from iterdpo.report.page import EXAMPLES, write_report
from iterdpo.report.plots import figures
from iterdpo.run.artifacts import shard_name, write_completion_shard, write_judgment_shard
from iterdpo.run.cost import ESTIMATE, Load, Rates, estimate_to_json
from iterdpo.run.read import read_run
from iterdpo.run.rundir import RunDir, write_json, write_jsonl
from iterdpo.types import Completion, CompletionGroup, Judgment, Prompt, RoundRecord


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


def test_the_page_has_the_rules_of_the_gate_and_how_each_turned_out(tmp_path: Path) -> None:
    rules = [
        RuleConfig(metric="kl/to_initial", maximum=20, otherwise="lower_learning_rate").model_dump(),
        RuleConfig(metric="length/mean_tokens", max_increase=10, against="best").model_dump(),
    ]
    gate = {"metric": "win_rate/vs_previous", "minimum": 0.5, "otherwise": "keep", "rules": rules, "patience": 2}
    run = RunDir(tmp_path)
    run.write_config({"gate": gate})
    records = [RoundRecord(0, "promote", "", "model", 0, "", gate, {"round": 0, "length/mean_tokens": 5.0})]
    metrics = {"round": 1, "win_rate/vs_previous": 0.6, "kl/to_initial": 31.25, "length/mean_tokens": 6.0}
    decision = decide(metrics, metric="win_rate/vs_previous", minimum=0.5, rules=rules, earlier=records)
    metrics |= {"gate/decision": decision.action, "gate/reason": decision.reason}
    checks = [check._asdict() for check in decision.checks]
    records.append(RoundRecord(1, decision.action, decision.reason, "model", 0, "", gate, metrics, checks))
    for record in records:
        run.round_dir(record.round).mkdir()
        run.write_record(record)
    page = write_report(tmp_path).read_text()
    assert "not promoted, learning rate lowered" in page
    assert (
        "kl/to_initial 31.2 is above 20; the policy before is kept, and the learning rate is multiplied by 0.5" in page
    )
    assert '<td class="gate">length/mean_tokens rose by 1 from 5 of the best round, at most 10</td>' in page
    assert page.count('<td class="gate">holds</td>') == 2
    assert '<td class="gate">lower_learning_rate</td>' in page
    assert (
        "kl/to_initial at most 20, otherwise: lower_learning_rate; length/mean_tokens may rise by 10 from the best"
        in page
    )
    assert "2 rounds without a promotion" in page


def test_the_comparison_with_the_best_round_is_shown_if_it_is_not_the_previous_one(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.write_config({})
    for best, shown in ((0.6, False), (0.4, True)):
        row = {"round": 1, "gate/decision": "promote", "win_rate/vs_previous": 0.6, "win_rate/vs_best": best}
        write_jsonl(tmp_path / "metrics.jsonl", [row])
        assert ("Wins vs best" in write_report(tmp_path).read_text()) is shown


def test_the_page_has_the_win_rate_over_temperatures_and_against_another_model(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.write_config({"sampling": {"temperature": 1.0}, "evaluation": {}})
    rows = [
        {"round": 0, "gate/decision": "promote", "temperature/0.5/win_rate/vs_initial": 0.61},
        {"round": 1, "gate/decision": "promote", "win_rate/vs_initial": 0.7, "temperature/0/win_rate/vs_initial": None},
        {"round": 2, "gate/decision": "promote", "win_rate/vs_initial": 0.8, "win_rate/vs_model": 0.4},
    ]
    rows[2] |= {"temperature/0.5/win_rate/vs_initial": 0.9, "temperature/0.5/win_rate/vs_initial_low": 0.85}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(tmp_path).read_text()
    assert "Wins vs model" in page
    [axes] = figures(read_run(tmp_path))["temperatures"].axes
    drawn = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines[:2]}
    assert drawn == {"round 0": [(0.5, 0.61), (1.0, 0.5)], "round 2": [(0.5, 0.9), (1.0, 0.8)]}
    assert 'id="plot-temperatures"' in page


def test_the_estimate_stands_beside_what_a_round_took_and_later_rounds_have_the_last_one(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.write_config({})
    ended = {"gate/decision": "promote", "gate/reason": ""}
    rows = [{"round": r, "time/round_s": 60.0 + r, "time/train_s": 30.0 if r else None, **ended} for r in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert 'id="estimate"' not in write_report(tmp_path).read_text()
    rates = Rates({"evaluate": (1.0, 1.0), "train": (5.0, 0.5)}, engine=20.0, source="a calibration")
    load = Load(1, completions=0, evaluated=4, judges=0, pairs=40, prompt_tokens=1, completion_tokens=1)
    write_json(tmp_path / ESTIMATE, estimate_to_json(load, rates))
    page = write_report(tmp_path).read_text()
    section = page[page.index('id="estimate"') :].partition("</section>")[0]
    rounds = [
        re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr><th scope=\"row\">(.*?)</tr>", section, re.S)
    ]
    # training and its estimate, 5 + 40 / 2; the evaluation's, 1 + 4 and the engine's start; the round and its estimate
    assert rounds[0][-3:] == ["25 s", "1 min 00 s", "25 s"]
    assert rounds[1] == [*rounds[2][:-2], "1 min 01 s", "30 s"]
    assert rounds[2][-2:] == ["1 min 02 s", "30 s"]
