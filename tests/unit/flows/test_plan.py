"""Sizes that `--dry-run` announces, against what is saved."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from flows.api import open_run
from flows.plan import describe_offline_plan, describe_plan, describe_status
from iterdpo.config import Config, OfflineConfig, parse_config
from iterdpo.run.rundir import RunDir
from iterdpo.testing import build_tiny_checkpoint
from iterdpo.types import RoundRecord

MIB = 2**20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of some 20 MiB, so that a tenth of a MiB is a small error."""
    return build_tiny_checkpoint(tmp_path_factory.mktemp("model"), hidden_size=512, intermediate_size=1024)


def announced(model: Path, directory: Path, **dpo: Any) -> float:
    """MiB of the policy, as the plan of an offline round has them."""
    (directory / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    values = {"run_dir": str(directory / "run"), "model": {"path": str(model)}, "dpo": dpo}
    values["data"] = {"path": str(directory / "pairs.jsonl")}
    plan = describe_offline_plan(parse_config(OfflineConfig, values))
    size = re.search(r"about ([\d.]+) MiB for the policy", plan)
    assert size, plan
    return float(size[1])


def test_a_checkpoint_is_announced_as_large_as_its_weights(model: Path, tmp_path: Path) -> None:
    saved = (model / "model.safetensors").stat().st_size / MIB
    assert saved > 10
    assert announced(model, tmp_path) == pytest.approx(saved, rel=0.01)
    assert announced(model, tmp_path, save_dtype="bfloat16") == pytest.approx(saved / 2, rel=0.01)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], r".*\.self_attn\.(q|v)_proj"])
def test_an_adapter_is_announced_as_large_as_peft_makes_it(
    model: Path, tmp_path: Path, targets: str | list[str]
) -> None:
    from iterdpo.training.models import load_policy, with_new_adapter

    adapted = with_new_adapter(load_policy(model), r=256, alpha=8, target_modules=targets, quantize="none")
    trained = 4 * sum(p.numel() for p in adapted.parameters() if p.requires_grad) / MIB
    assert announced(model, tmp_path, adapter={"r": 256, "target_modules": targets}) == pytest.approx(trained, abs=0.06)


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["o_proj", "norm"]])
def test_modules_that_are_trained_whole_are_announced_with_the_adapter(
    model: Path, tmp_path: Path, names: list[str]
) -> None:
    from iterdpo.training.models import load_policy, with_new_adapter

    base = load_policy(model)
    adapted = with_new_adapter(base, r=64, alpha=8, target_modules="all-linear", quantize="none", modules_to_save=names)
    adapted.save_pretrained(tmp_path / "adapter")
    saved = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size / MIB
    assert announced(model, tmp_path, adapter={"r": 64, "modules_to_save": names}) == pytest.approx(saved, abs=0.06)


def test_the_policies_of_all_rounds_are_announced_in_the_unit_that_shows_them(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Tale {i}"}) + "\n" for i in range(101)))
    (tmp_path / "judge.py").write_text("def score(completion):\n    return len(completion)\n")
    values = {
        "run_dir": str(tmp_path / "run"),
        "rounds": 100,
        "model": {"path": str(model)},
        "prompts": {"path": str(tmp_path / "prompts.jsonl"), "per_round": 1, "heldout": 1},
        "judge": {"use": f"{tmp_path / 'judge.py'}:score"},
    }
    plan = describe_plan(open_run(parse_config(Config, values)))
    gib = 100 * (model / "model.safetensors").stat().st_size / 2**30
    assert f"about {gib:.1f} GiB of policies" in plan
    assert re.search(r"and \d\d\.\d MiB more for a checkpoint", plan)


def test_the_status_has_the_last_failure_and_whether_its_round_was_finished_since(tmp_path: Path) -> None:
    run = RunDir(tmp_path)  # without run.json: it failed before the run began
    run.note_failure("training failed:\nno memory \x1b[31m")
    assert re.search(r"\n  last failure: 2\S+, round 0: training failed: no memory", describe_status(tmp_path))
    run.write_config({})
    run.round_dir(0).mkdir()
    run.write_record(RoundRecord(0, "promote", "", "model", 0, "", {}, {"round": 0, "gate/decision": "promote"}))
    assert describe_status(tmp_path).endswith(r"no memory \x1b[31m (round 0 has been finished since)")


def planned(model: Path, directory: Path, **more: Any) -> dict[str, str]:
    """The rows of a plan of 3 rounds of 10 prompts with 4 completions, and 5 held-out prompts with 2."""
    (directory / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Tale {i}"}) + "\n" for i in range(100)))
    (directory / "judge.py").write_text("def score(completion):\n    return 1\n\n\ndef both(a, b):\n    return 'a'\n")
    values = {
        "run_dir": str(directory / "run"),
        "rounds": 3,
        "model": {"path": str(model)},
        "prompts": {"path": str(directory / "prompts.jsonl"), "per_round": 10, "heldout": 5},
        "sampling": {"n": 4, "max_tokens": 64},
        **more,
    }
    plan = describe_plan(open_run(parse_config(Config, values)))
    return {line[:12].strip(): line[13:] for line in plan.splitlines()}


def test_the_calls_of_a_judge_that_scores_are_those_of_all_rounds_and_evaluations(model: Path, tmp_path: Path) -> None:
    rows = planned(model, tmp_path, judge={"use": f"{tmp_path}/judge.py:score"}, evaluation={"n": 2})
    # 3 rounds of 10 · 4 completions, 4 evaluations of 5 · 2.
    assert rows["judge calls"] == "training judge: 40 a round and 10 an evaluation; 160 in all"
    assert "judge tokens" not in rows


def test_pairs_of_two_policies_and_evaluations_every_few_rounds_are_counted(model: Path, tmp_path: Path) -> None:
    rows = planned(
        model,
        tmp_path,
        judge={"use": f"{tmp_path}/judge.py:score"},
        pairing={"against": {"round": 0}, "replay": 0.5},
        evaluation={"n": 2, "every": 2},
    )
    # A round has 10 · 4 completions and 10 of the other policy, and 10 pairs of which both are judged again; rounds 0, 2
    # and 3 are evaluated on 5 · 2. As many pairs as are fresh are replayed.
    assert rows["completions"] == "50 a round and 10 an evaluation; 180 in all"
    assert rows["judge calls"] == "training judge: 60 a round and 10 an evaluation; 210 in all"
    assert rows["pairs"] == "at most 20 a round"


def test_a_greedy_evaluation_samples_one_completion_of_each_prompt(model: Path, tmp_path: Path) -> None:
    judge = {"use": f"{tmp_path}/judge.py:score"}
    rows = planned(model, tmp_path, judge=judge, evaluation={"n": 4, "temperature": 0})
    assert rows["completions"] == "40 a round and 5 an evaluation; 140 in all"


def test_another_model_to_compare_with_is_counted(model: Path, tmp_path: Path) -> None:
    judges = [{"use": f"{tmp_path}/judge.py:{name}"} for name in ("score", "both")]
    evaluation = {"n": 2, "against": {"model": str(model)}, "judge": judges[1]}
    rows = planned(model, tmp_path, judge=judges[0], evaluation=evaluation)
    # 40 a round, of four evaluations 5 · 2, and once as many of the other model. The held-out judge compares 5 · 2 in both
    # orders: with one other round in round 1 and two in rounds 2 and 3, and with the model in each of four.
    assert rows["completions"] == "40 a round and 10 an evaluation; 170 in all"
    assert rows["judge calls"].endswith(f"; {170 + (1 + 2 + 2 + 4) * 20} in all")


def test_an_evaluation_at_further_temperatures_is_counted(model: Path, tmp_path: Path) -> None:
    judges = [{"use": f"{tmp_path}/judge.py:{name}"} for name in ("score", "both")]
    evaluation = {"n": 2, "temperatures": [0, 0.5, 1.0], "judge": judges[1]}
    rows = planned(model, tmp_path, judge=judges[0], evaluation=evaluation)
    # Two completions at 1 and at 0.5, and a greedy one. Both orders are compared at 1 with one other round in round 1 and with
    # two in rounds 2 and 3, and elsewhere with the initial policy in each of four evaluations.
    assert rows["completions"] == "40 a round and 25 an evaluation; 220 in all"
    assert "40 a round and 25 an evaluation" in rows["judge calls"]
    assert rows["judge calls"].endswith(f"; {220 + 5 * 20 + 4 * 3 * 5 * 2} in all")


def test_the_calls_of_judges_that_compare_count_both_orders_and_both_baselines(model: Path, tmp_path: Path) -> None:
    endpoint = {"base_url": "http://127.0.0.1:9/v1", "price_in": 1.0, "price_out": 10.0}
    llm = {"use": "pairwise", "args": {"model": "m", "endpoint": endpoint, "constrain": "none"}}
    evaluation = {"n": 2, "judge": {"use": f"{tmp_path}/judge.py:both"}}
    rows = planned(model, tmp_path, judge=llm, evaluation=evaluation)
    # 10 · 4 · 3 a round; an evaluation compares 5 · 2 with a baseline in both orders: none in round 0, one in round 1,
    # two in rounds 2 and 3.
    assert rows["judge calls"] == (
        "training judge: 120 a round and 20 an evaluation; held-out judge: 20 an evaluation; "
        f"{3 * 120 + 5 * 20 + 5 * 20} in all"
    )
    found = re.fullmatch(
        r"at most about ([\d,]+) tokens read and ([\d,]+) written; ([\d.]+) US dollars", rows["judge tokens"]
    )
    assert found, rows["judge tokens"]
    read, written, dollars = (float(number.replace(",", "")) for number in found.groups())
    assert written == (3 * 120 + 5 * 20) * 512  # a judge that may reason
    assert read > (3 * 120 + 5 * 20) * 2 * 64  # two completions of 64 tokens, and the prompt around them
    assert dollars == pytest.approx((read + 10 * written) / 1e6, abs=0.01)
    del endpoint["price_in"], endpoint["price_out"]
    assert (
        "for the cost, set endpoint.price_in and price_out"
        in planned(model, tmp_path, judge=llm, evaluation=evaluation)["judge tokens"]
    )


def test_the_plan_warns_of_a_judge_of_the_policys_lineage(model: Path, tmp_path: Path) -> None:
    args = {"model": str(model), "serve": {}}
    rows = planned(model, tmp_path, judge={"use": "rubric", "args": args})
    assert "are of one lineage (they are the same)" in rows["warning"]
    assert "warning" not in planned(model, tmp_path, judge={"use": f"{tmp_path}/judge.py:score"})
