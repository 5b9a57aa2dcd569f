"""An experiment's runs: what they share, what is not done again, and what is tuned. The sampler is no engine."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import compare as module
from flows.compare import adopt, best_trial, compare, describe_experiment
from flows.experiment import Experiment, load_experiment
from flows.loop import PLAIN
from flows.verify import verify
from iterdpo.errors import ChildFailed, DamagedError, StaleStepError, UserError
from iterdpo.report import compare as report
from iterdpo.report.compare import Trial
from iterdpo.run.artifacts import PolicyCheckpoint, read_groups
from iterdpo.run.progress import Progress, Stage
from iterdpo.run.rundir import RunDir, Step, digest, read_json, read_manifest, remove_weights, write_jsonl
from iterdpo.run.sums import MANIFEST
from iterdpo.sampling import SamplingParameters
from iterdpo.stages import evaluate
from iterdpo.stages.runs import IterativeRun
from iterdpo.stages.train import inputs
from iterdpo.testing import FakeSampler, build_tiny_checkpoint
from iterdpo.training.launch import TRAIN_LOG
from iterdpo.types import Completion

JUDGE = """
def length(completion):
    return float(len(completion))


def vowels(completion):
    return sum(letter in "aeiou" for letter in completion) / max(1, len(completion))
"""


class CountingSampler(FakeSampler):
    """`asked` lists how many prompts were in each request; it fails at the request number `fails`."""

    def __init__(self) -> None:
        super().__init__(lambda ids, k: "abcdefgh"[: 3 + (k * 2 + ids[-1]) % 5])
        self.asked: list[int] = []
        self.fails: int | None = None

    def sample(
        self, prompt_ids: Sequence[list[int]], seeds: Sequence[int], parameters: SamplingParameters
    ) -> list[list[Completion]]:
        if len(self.asked) == self.fails:
            raise ChildFailed("the machine stopped")
        self.asked.append(len(prompt_ids))
        return super().sample(prompt_ids, seeds, parameters)


def trained(run: IterativeRun, round: int, *given: Any) -> PolicyCheckpoint:
    """What the stage `train` would seal: a checkpoint that depends on its inputs alone."""
    step = run.dir.step(round, "policy", inputs(run, round, *given))
    if (manifest := step.manifest()) is None:
        directory = shutil.copytree(run.model_path, step.begin(), dirs_exist_ok=True)
        (directory / "made_from.txt").write_text(digest(step.inputs))
        write_jsonl(directory / TRAIN_LOG, [{"step": 1, "loss": 0.5}])
        manifest = step.finish(counts={"pairs": given[0].kept}, logs=[TRAIN_LOG])
    return PolicyCheckpoint(step.path, manifest.digest, round)


def summed(run: IterativeRun, policy: PolicyCheckpoint, completions: Path, stage: Stage) -> Iterator[float]:
    """Log-probabilities without a model: of each token another for each policy."""
    each = -1 - int(policy.digest[:2], 16) / 256
    return (each * len(c.token_ids) for g in read_groups(completions) for c in g.completions if c.token_ids)


STAGES = PLAIN._replace(train=trained)


class Bench:
    """A directory with prompts, judges and an experiment of two arms."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.sampler = root, CountingSampler()
        (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Tale {i}"}) + "\n" for i in range(40)))
        (root / "judge.py").write_text(JUDGE)
        base = {
            "rounds": 2,
            "model": {"path": str(model)},
            "prompts": {"path": str(root / "prompts.jsonl"), "per_round": 6, "heldout": 4},
            "sampling": {"n": 2, "max_tokens": 16, "shard_size": 8},
            "judge": {"use": f"{root / 'judge.py'}:length"},
            "dpo": {"precision": "fp32"},
            "evaluation": {
                "max_logp_gap": 100,
                "bootstrap_samples": 100,
                "judge": {"use": f"{root / 'judge.py'}:vowels"},
            },
            "gate": {"minimum": 0.0},
        }
        self.values: dict[str, Any] = {
            "base": base,
            "arms": {"iterative": {}, "offline": {"kind": "offline"}},
            "seeds": [0],
        }

    def load(self, *overrides: str, **changes: Any) -> Experiment:
        path = self.root / "experiment.yaml"
        path.write_text(yaml.safe_dump({**self.values, **changes}, sort_keys=False))
        return load_experiment(path, overrides=overrides, out=self.root / "out")

    def run(self, *overrides: str, **changes: Any) -> dict[str, Any]:
        page = compare(self.load(*overrides, **changes), sampler=self.sampler, stages=STAGES)
        assert page.read_text().startswith("<!doctype html>")
        return dict(read_json(self.root / "out" / "compare.json"))


@pytest.fixture
def bench(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Without plots, which would take most of the time: `test_compare.py` of the report has them. Nor is a model loaded."""
    monkeypatch.setattr(evaluate, "_logps", summed)
    monkeypatch.setattr(module, "write_report", lambda run_dir: None)
    monkeypatch.setattr(report, "as_svg", lambda figure: "<svg/>")
    return Bench(tmp_path, tiny_model)


def test_round_0_is_evaluated_once_for_all_arms_of_a_seed(bench: Bench) -> None:
    found = bench.run()
    #                      round 0, iterative: two rounds of 6 and their evaluations, offline: one round of 12
    assert bench.sampler.asked == [4, 6, 4, 6, 4, 8, 4, 4]
    one, two = (bench.root / "out" / arm / "seed-0" for arm in ("iterative", "offline"))
    for run in (one, two):
        assert verify(run).problems == []
    assert (one / "heldout.ids.parquet").read_bytes() == (two / "heldout.ids.parquet").read_bytes()
    budgets = [found["arms"][arm]["budget"] for arm in ("iterative", "offline")]
    assert [b["completions"] for b in budgets] == [24, 24]
    assert found["missing"] == []
    bench.run()
    assert len(bench.sampler.asked) == 8  # nothing is done again


def test_the_first_rounds_completions_and_judgments_are_shared_if_their_inputs_are_equal(bench: Bench) -> None:
    arms = {"one": {"dpo.beta": 0.1}, "two": {"dpo": {"beta": 0.2}}, "three": {"sampling.temperature": 0.5}}
    bench.run(arms=arms, base={**bench.values["base"], "rounds": 1})
    first, second, third = (bench.root / "out" / arm / "seed-0" for arm in arms)
    assert bench.sampler.asked == [4, 6, 4, 4, 4, 6, 4]  # of the second only the candidate is evaluated
    for name in ("completions", "judgments"):
        manifests = [read_manifest(run / "round-001" / name) for run in (first, second)]
        assert manifests[0] == manifests[1]
    shards = [run / "round-001/completions/shard-000000.parquet" for run in (first, second, third)]
    one, two, other = (shard.stat().st_ino for shard in shards)
    assert one == two != other


def test_a_log_is_copied_and_not_shared_since_what_goes_on_appends_to_it(bench: Bench) -> None:
    same = {"gate.minimum": 0.1}  # decides nothing that the policy is made from
    bench.run("rounds=1", arms={"one": {}, "two": same})
    one, two = (bench.root / "out" / arm / "seed-0/round-001/policy" for arm in ("one", "two"))
    inodes = [[(policy / name).stat().st_ino for policy in (one, two)] for name in ("model.safetensors", TRAIN_LOG)]
    assert [a == b for a, b in inodes] == [True, False]
    assert (one / TRAIN_LOG).read_bytes() == (two / TRAIN_LOG).read_bytes()


def test_what_an_interrupted_start_left_is_no_part_of_the_step_that_is_taken(tmp_path: Path) -> None:
    one, two = (Step(tmp_path / run / "round-001" / "policy", {"beta": 0.1}) for run in ("one", "two"))
    (one.begin() / "weights").write_text("whole")
    one.finish()
    for name in ("weights", "checkpoint"):
        (two.begin() / name).write_text("half")
    assert adopt(two, [tmp_path / "one"])
    assert [(p.name, p.read_text()) for p in two.path.iterdir() if p.name != MANIFEST] == [("weights", "whole")]


def test_a_policy_whose_weights_were_removed_is_not_shared(tmp_path: Path) -> None:
    one, two = (Step(tmp_path / run / "round-001" / "policy", {"beta": 0.1}) for run in ("one", "two"))
    (one.begin() / "model.safetensors").write_text("whole")
    one.finish()
    remove_weights(one.path)  # as `keep` asks
    assert not adopt(two, [tmp_path / "one"])
    assert two.manifest() is None


def test_a_step_to_be_shared_that_is_damaged_is_refused(bench: Bench) -> None:
    bench.run(arms={"one": {}})
    shard = next((bench.root / "out/one/seed-0/round-001/completions").glob("*.parquet"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DamagedError, match=r"shard-000000\.parquet"):
        bench.run(arms={"one": {}, "two": {"dpo.beta": 0.2}})


@pytest.mark.parametrize("request_number", [2, 6])
def test_an_experiment_that_ended_anywhere_goes_on_to_the_same_result(bench: Bench, request_number: int) -> None:
    bench.sampler.fails = request_number
    with pytest.raises(ChildFailed):
        bench.run()
    bench.sampler.fails = None
    found = bench.run()
    assert bench.sampler.asked == [4, 6, 4, 6, 4, 8, 4, 4]
    assert found["missing"] == []


def test_runs_that_another_process_has_are_left_to_it_and_waited_for(bench: Bench) -> None:
    experiment, said = bench.load(), io.StringIO()
    first, second = (RunDir(experiment.out / arm / "seed-0") for arm in ("iterative", "offline"))

    def run() -> Path:
        return compare(experiment, progress=Progress(said), sampler=bench.sampler, stages=STAGES)

    with ThreadPoolExecutor(1) as pool:
        with first.lock():  # as a process that makes it
            page = pool.submit(run)
            until = time.monotonic() + 60
            while "waiting for" not in said.getvalue():
                assert time.monotonic() < until
                time.sleep(0.05)
            assert second.records()[-1].round == 1
            assert first.records() == []
        assert page.result(timeout=60).exists()
    assert f"waiting for {first.root}, which another process is making" in said.getvalue()
    assert first.records()[-1].round == 2
    assert read_json(experiment.out / "compare.json")["missing"] == []


def test_two_processes_make_each_trial_and_each_run_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = module.open_run

    def late(*args: Any, **settings: Any) -> IterativeRun:  # so that the other process has ended the trial meanwhile
        time.sleep(0.3)
        return opened(*args, **settings)

    monkeypatch.setattr(module, "open_run", late)
    tune = {"grid": {"dpo.beta": [0.1, 0.5]}, "seeds": [7]}
    experiments = [bench.load(tune=tune) for _ in range(2)]
    trainings: list[str] = []

    def noted(run: IterativeRun, round: int, *given: Any) -> PolicyCheckpoint:
        trainings.append(f"{run.dir.root} {round}")
        return trained(run, round, *given)

    with ThreadPoolExecutor(2) as pool:
        samplers = [CountingSampler() for _ in experiments]
        pages = [
            pool.submit(
                compare,
                experiment,
                progress=Progress(io.StringIO()),
                sampler=sampler,
                stages=STAGES._replace(train=noted),
            )
            for experiment, sampler in zip(experiments, samplers, strict=True)
        ]
        for page in pages:
            assert page.result(timeout=120).exists()
    assert all(sampler.asked for sampler in samplers)
    assert len(set(trainings)) == len(trainings)
    together = read_json(bench.root / "out" / "compare.json")
    shutil.rmtree(bench.root / "out")
    alone = bench.run(tune=tune)
    assert alone["differences"] == together["differences"]
    for arm in ("iterative", "offline"):
        assert alone["arms"][arm]["seeds"]["0"]["points"] == together["arms"][arm]["seeds"]["0"]["points"]


def test_what_every_round_is_compared_with_is_made_once_for_all_arms_of_a_seed(bench: Bench, tmp_path: Path) -> None:
    other = build_tiny_checkpoint(tmp_path / "other", seed=5)
    prompts = [{"prompt": f"Tale {i}", "gold": "once"} for i in range(40)]
    (bench.root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    against = {"against": {"model": str(other)}, "reference_column": "gold", "temperatures": [0]}
    evaluation = bench.values["base"]["evaluation"]
    bench.values["base"] |= {"evaluation": {**evaluation, **against}}
    bench.sampler.fails = 6
    with pytest.raises(ChildFailed):
        bench.run()
    bench.sampler.fails = None
    bench.run()
    assert bench.sampler.asked == [4, 4, 4, 6, 4, 4, 6, 4, 4, 8, 4, 4, 4]  # the model first; each evaluation twice
    for run in (bench.root / "out" / arm / "seed-0" for arm in ("iterative", "offline")):
        assert verify(run).problems == []
        assert {"win_rate/vs_reference", "temperature/0/win_rate/vs_model"} <= read_json(run / "round-001/round.json")[
            "metrics"
        ].keys()


def test_a_link_that_was_left_by_an_end_in_the_middle_is_no_hindrance(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = {"one": {"dpo.beta": 0.1}, "two": {"dpo.beta": 0.2}}
    links: list[str] = []

    def stops(source: Path, target: Path, *, copy: bool) -> None:
        links.append(target.name)
        if len(links) == 3:
            raise KeyboardInterrupt
        linked(source, target, copy=copy)

    linked = module._link
    with monkeypatch.context() as patch:
        patch.setattr(module, "_link", stops)
        with pytest.raises(KeyboardInterrupt):
            bench.run("rounds=1", arms=arms)
    asked = len(bench.sampler.asked)
    bench.run("rounds=1", arms=arms)
    assert bench.sampler.asked[asked:] == [4]  # the second arm's candidate
    assert verify(bench.root / "out/two/seed-0").problems == []


def test_settings_that_change_are_refused_or_done_again(bench: Bench) -> None:
    bench.run()
    with pytest.raises(StaleStepError, match="temperature"):
        bench.run("sampling.temperature=0.5")


def test_each_arm_tries_the_same_values_and_runs_with_its_best(bench: Bench) -> None:
    tune = {"grid": {"dpo.learning_rate": [1e-4, 1e-3], "dpo.beta": [0.1]}, "seeds": [7]}
    arms = {
        "iterative": {"rounds": 1},
        "offline": {"kind": "offline", "rounds": 1, "dpo.beta": 0.5},
        "initial": {"kind": "initial"},
    }
    found = bench.run(arms=arms, tune=tune)
    tried = [(row["arm"], row["settings"]) for row in found["tuning"]]
    assert tried == [
        ("iterative", {"dpo.learning_rate": 1e-4, "dpo.beta": 0.1}),
        ("iterative", {"dpo.learning_rate": 1e-3, "dpo.beta": 0.1}),
        ("offline", {"dpo.learning_rate": 1e-4}),
        ("offline", {"dpo.learning_rate": 1e-3}),
    ]
    assert found["arms"]["iterative"]["settings"]["dpo.learning_rate"] == 1e-4  # of equal ones the first
    assert found["arms"]["offline"]["settings"] == {
        "rounds": 1,
        "dpo.beta": 0.5,
        "dpo.learning_rate": 1e-4,
    }
    assert not list((bench.root / "out/tuning").rglob("*.safetensors"))  # of no further use
    asked = len(bench.sampler.asked)
    bench.run(arms=arms, tune=tune)
    assert len(bench.sampler.asked) == asked


def test_a_trial_is_not_made_again_since_the_gpus_are_shared(bench: Bench) -> None:
    tune = {"grid": {"dpo.beta": [0.1]}, "seeds": [7]}
    bench.run(tune=tune)
    results = [path.stat().st_mtime_ns for path in bench.root.glob("out/tuning/*/*/seed-7.json")]
    assert len(results) == 2
    bench.run("share_gpus=true", tune=tune)
    assert [path.stat().st_mtime_ns for path in bench.root.glob("out/tuning/*/*/seed-7.json")] == results


def test_the_best_trial_is_the_training_judges_within_the_bound_on_kl() -> None:
    trials = [Trial("a", {"x": x}, score, kl) for x, score, kl in ((1, 0.5, 2.0), (2, 0.9, 30.0), (3, 0.7, 9.0))]
    assert [best_trial(trials, bound).settings["x"] for bound in (None, 10.0, 5.0, 1.0)] == [2, 3, 1, 1]


def test_arms_without_training_have_curves_too(bench: Bench) -> None:
    arms = {"initial": {"kind": "initial"}, "best": {"kind": "best_of_n", "n": 4, "evaluation.n": 2}}
    found = bench.run(arms=arms)["arms"]
    assert [p["completions"] for p in found["best"]["seeds"]["0"]["points"]] == [1, 2, 4]
    kl = [p["kl"] for p in found["best"]["seeds"]["0"]["points"]]
    assert kl == pytest.approx([0.0, 0.1931, 0.6363], abs=1e-4)  # log N - (N - 1) / N
    judged = [p["train_score"] for p in found["best"]["seeds"]["0"]["points"]]
    assert judged == sorted(judged)
    assert found["initial"]["end"]["kl"]["value"] == 0
    assert found["best"]["budget"] == {"completions": 16, "judge_calls": 16}


COMMAND = """
import json, shutil, sys
from pathlib import Path

spec = json.loads(Path(sys.argv[1]).read_text())
assert len(json.loads(Path(spec["prompts"]).read_text())) == 12 and spec["completions"] == 24
for file in Path(spec["model"]).iterdir():
    shutil.copy(file, spec["output"])
if not Path(sys.argv[2]).exists():
    sys.exit("no licence")
(Path(spec["output"]) / "budget.json").write_text(json.dumps({"steps": 5}))
"""


def test_a_command_makes_a_policy_that_is_evaluated_as_all_others_are(bench: Bench) -> None:
    (bench.root / "trainer.py").write_text(COMMAND)
    licence = bench.root / "licence"
    command = ["{python}", str(bench.root / "trainer.py"), "{spec}", str(licence)]
    arms = {"grpo": {"command": command, "requires": ["json", "shutil"]}}
    with pytest.raises(ChildFailed, match=r"arms\.grpo: the command failed: no licence"):
        bench.run(arms=arms)
    licence.touch()
    found = bench.run(arms=arms)["arms"]["grpo"]
    assert found["kind"] == "command"
    assert [p["round"] for p in found["seeds"]["0"]["points"]] == [0, 1]
    assert found["budget"] | {"seconds": 0} == {
        "completions": 24,
        "judge_calls": 24,
        "steps": 5,
        "tokens": 0,
        "seconds": 0,
    }
    asked = len(bench.sampler.asked)
    bench.run(arms=arms)
    assert len(bench.sampler.asked) == asked
    root = bench.root / "out" / "grpo" / "seed-0"
    assert verify(root).problems == []
    shutil.rmtree(root / "round-001" / "evaluation")
    assert any("evaluation: damaged: is missing" in problem for problem in verify(root).problems)


@pytest.mark.parametrize(
    ("command", "requires", "message"),
    [
        (["nowhere", "{spec}"], [], r"command: 'nowhere': no such program"),
        (["{python}", "nowhere.py", "{spec}"], [], r"command: 'nowhere\.py': no such file in "),
        (
            ["{python}", "{spec}"],
            ["json", "nowhere", "neither"],
            r"requires: .* lacks nowhere, neither; .*arms\.grpo=null",
        ),
        (["false", "{spec}"], ["json"], r"requires: modules of a Python, which .*false is not"),
    ],
)
def test_a_command_that_could_not_run_is_refused_before_anything_runs(
    bench: Bench, command: list[str], requires: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=rf"arms\.grpo: {message}"):
        bench.run(arms={"iterative": {}, "grpo": {"command": command, "requires": requires}})
    assert bench.sampler.asked == []


def test_the_plan_names_budgets_and_trials_and_changes_nothing(bench: Bench) -> None:
    tune = {"grid": {"dpo.learning_rate": [1e-4, 1e-3]}, "seeds": [7, 8]}
    said = describe_experiment(bench.load(tune=tune, seeds=[0, 1, 2]))
    assert "iterative: 2 rounds, 24 completions and as many judge calls, at most 2 optimizer steps" in said
    assert "offline: 1 round, 24 completions and as many judge calls, at most 2 optimizer steps" in said
    assert said.endswith("6 runs after 8 to tune; 0 have ended")
    mixed = describe_experiment(bench.load(arms={"mixed": {"pairing.replay": 0.5, "dpo.pairs_per_step": 2}}))
    assert "iterative: 2 rounds, 24 completions and as many judge calls, at most 12 optimizer steps" in mixed
    assert not (bench.root / "out").exists()


def test_a_problem_of_the_data_is_named_with_its_arm_before_anything_runs(bench: Bench) -> None:
    arms = {"one": {}, "two": {"prompts.per_round": 30}}
    with pytest.raises(UserError, match=r"arms\.two: .*add prompts"):
        bench.run(arms=arms)
    assert bench.sampler.asked == []
