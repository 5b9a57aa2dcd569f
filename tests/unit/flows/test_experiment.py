"""What an experiment file may say, and how a mistake in it is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.compare import describe_experiment
from flows.experiment import load_experiment
from iterdpo.errors import ConfigError, UserError

ROOT = Path(__file__).parents[3]
EXPERIMENTS = sorted((ROOT / "configs" / "experiments").glob("*.yaml"))
BASE = {
    "rounds": 3,
    "model": {"path": "some/model"},
    "prompts": {"path": "prompts.jsonl", "per_round": 10},
    "judge": {"use": "exact_match", "args": {"column": "gold"}},
}
GOOD: dict[str, Any] = {"base": BASE, "arms": {"one": {}, "two": {"dpo.beta": 0.2}}, "seeds": [0, 1]}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(**changes: Any) -> str:
    Path("experiment.yaml").write_text(yaml.safe_dump({**GOOD, **changes}, sort_keys=False))
    return "experiment.yaml"


def test_each_arm_at_each_seed_is_a_configuration_of_its_own() -> None:
    loaded = load_experiment(written())
    [one, two] = loaded.arms
    assert loaded.out == Path("runs/experiment").absolute()
    first, second = loaded.config_of(one, 0), loaded.config_of(two, 1)
    assert (first.dpo.beta, second.dpo.beta) == (0.1, 0.2)
    assert (first.seed, second.seed) == (0, 1)
    assert Path(second.run_dir) == loaded.out / "two" / "seed-1"


def test_an_offline_arm_has_one_round_with_the_prompts_of_all() -> None:
    loaded = load_experiment(written(arms={"offline": {"kind": "offline", "rounds": 4}}))
    config = loaded.config_of(loaded.arms[0], 0)
    assert (config.rounds, config.prompts.per_round, config.dpo.max_steps) == (1, 40, None)


def test_an_offline_arm_has_the_optimizer_steps_of_all_rounds() -> None:
    loaded = load_experiment(
        written(arms={"on": {"dpo.max_steps": 16}, "off": {"kind": "offline", "dpo.max_steps": 16}})
    )
    steps = [(c := loaded.config_of(arm, 0)).rounds * c.dpo.steps(40) for arm in loaded.arms]
    assert steps == [48, 48]


def test_sections_and_dotted_keys_say_the_same_and_a_judge_is_replaced_as_a_whole() -> None:
    arms: dict[str, Any] = {
        "nested": {
            "dpo": {"loss": {"type": "simpo", "gamma": 0.3}, "beta": 2.0},
            "judge": {"use": "exact_match", "args": {"column": "b"}},
        },
        "dotted": {"dpo.loss": "simpo", "dpo.loss.gamma": 0.3, "dpo.beta": 2.0, "judge.args.column": "b"},
    }
    loaded = load_experiment(written(arms=arms))
    nested, dotted = (loaded.config_of(arm, 0).model_copy(update={"run_dir": ""}) for arm in loaded.arms)
    assert nested == dotted


def test_bases_are_files_beside_the_experiment_or_keys_and_the_later_wins(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "base.yaml").write_text(yaml.safe_dump({**BASE, "dpo": {"beta": 0.3, "epochs": 2}}))
    (tmp_path / "inner" / "experiment.yaml").write_text(
        yaml.safe_dump({"base": ["base.yaml", {"dpo": {"beta": 0.4}}], "arms": {"one": {}}, "seeds": [0]})
    )
    loaded = load_experiment("inner/experiment.yaml")
    config = loaded.config_of(loaded.arms[0], 0)
    assert (config.dpo.beta, config.dpo.epochs) == (0.4, 2)


def test_an_override_changes_the_experiment_if_the_key_is_its_own_and_else_every_arm() -> None:
    overrides = ["seeds=[5]", "arms.two.dpo.beta=0.7", "dpo.epochs=2", "tune=null"]
    loaded = load_experiment(written(), overrides=overrides, out="here")
    assert loaded.settings.seeds == [5]
    assert loaded.out == Path("here").absolute()
    one, two = (loaded.config_of(arm, 5) for arm in loaded.arms)
    assert (one.dpo.epochs, two.dpo.epochs) == (2, 2)
    with pytest.raises(ConfigError, match=r"arms\.two.*unknown key"):
        load_experiment(written(), overrides=["arms.two.dpo.betta=1"])


def test_a_key_that_an_arm_sets_is_not_tuned_for_it_nor_arms_without_training() -> None:
    tune = {"grid": {"dpo.beta": [0.1, 0.2], "dpo.learning_rate": [1e-5, 1e-4, 1e-3]}, "seeds": [9]}
    arms: dict[str, Any] = {
        "free": {},
        "fixed": {"dpo": {"beta": 0.3}},
        "listed": {"tune": ["dpo.beta"]},
        "not": {"tune": False},
        "initial": {"kind": "initial"},
        "best": {"kind": "best_of_n", "n": 4},
    }
    loaded = load_experiment(written(arms=arms, tune=tune))
    tried = {arm.name: len(list(arm.trials())) if arm.grid else 0 for arm in loaded.arms}
    assert tried == {"free": 6, "fixed": 3, "listed": 2, "not": 0, "initial": 0, "best": 0}
    [first, *_] = loaded.arms[0].trials()
    config = loaded.config_of(loaded.arms[0], 9, first, trial=True)
    assert config.dpo.learning_rate == 1e-5
    assert Path(config.run_dir).relative_to(loaded.out).parts == (
        "tuning",
        "free",
        "beta-0.1_learning_rate-1e-05",
        "seed-9",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": {}}, r"unknown key 'arm'; did you mean 'arms'\?"),
        ({"arms": {}}, r"arms = \{\}"),
        ({"arms": {"one": None}}, r"arms\.one = None: input should be a valid dictionary"),
        ({"arms": {"a/b": {}}}, r"'a/b' is the name of a directory too"),
        ({"arms": {"..": {}}}, r"'\.\.' is the name of a directory too"),
        ({"arms": {"tuning": {}}}, r"'tuning' is the name of a directory too"),
        ({"arms": {"one": {"kind": "online"}}}, r"arms\.one\.kind = 'online': input should be one of iterative, offline"),
        ({"arms": {"one": {"dpo": {"betta": 1}}}}, r"arms\.one: unknown key 'dpo\.betta'; did you mean 'beta'\?"),
        ({"arms": {"one": {"dpo.beta": -1}}}, r"arms\.one: dpo\.beta = -1: input should be greater than 0"),
        ({"arms": {"one": {"kind": "best_of_n"}}}, r"arms\.one\.n: .*needs it"),
        ({"arms": {"one": {"kind": "best_of_n", "n": True}}}, r"arms\.one\.n = True: input should be a whole number"),
        ({"arms": {"one": {"kind": "best_of_n", "n": 4, "evaluation.temperature": 0}}}, r"arms\.one: evaluation\.temperature = 0"),
        ({"arms": {"one": {"n": 4}}}, r"arms\.one\.n: .*no other has it"),
        ({"arms": {"one": {"kind": "command"}}}, r"arms\.one\.command: .*needs it"),
        ({"arms": {"one": {"command": "python x.py"}}}, r"arms\.one\.command = 'python x\.py': input should be a list of words"),
        ({"arms": {"one": {"command": ["python", "x.py"]}}}, r"of which \{spec\} is replaced"),
        ({"arms": {"one": {"requires": ["trl"]}}}, r"arms\.one\.requires = \['trl'\]: input should be a list of modules"),
        ({"arms": {"one": {"command": ["a", "{spec}"], "requires": "trl"}}}, r"arms\.one\.requires = 'trl'"),
        ({"arms": {"one": {"command": ["a", "{spec}"], "requires": ["trl>=1"]}}}, r"arms\.one\.requires = \['trl>=1'\]"),
        ({"arms": {"one": {"tune": ["dpo.beta"]}}}, r"arms\.one\.tune = .*a list of keys of tune\.grid"),
        ({"seeds": []}, r"seeds = \[\]"),
        ({"seeds": [1, 1]}, r"a seed is named twice"),
        ({"seeds": [1], "tune": {"grid": {"dpo.beta": [1]}, "seeds": [1]}}, r"must be others than the experiment's"),
        ({"tune": {"grid": {"dpo.betta": [1]}, "seeds": [9]}}, r"arms\.one: unknown key 'dpo\.betta'"),
        ({"dpo": {"beta": 0.1}}, r"has 'dpo', a key of a run; put it below `base`"),
        ({"base": "nowhere.yaml"}, r"nowhere\.yaml: no such configuration file"),
        ({"base": 7}, r"base"),
        ({"arms": {"one": {"judge": {"use": "exact_mach"}}}}, r"exact_mach"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_the_file_the_arm_and_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_experiment(written(**changes))


def test_an_override_leaves_an_arm_out() -> None:
    path = written(arms={"one": {}, "beta-0.1": {"dpo.beta": 0.1}})
    assert [arm.name for arm in load_experiment(path, overrides=["arms.beta-0.1=null"]).arms] == ["one"]
    with pytest.raises(ConfigError, match=r"arms\.two = None: input should be a valid dictionary"):
        load_experiment(path, overrides=["arms.two=null"])
    with pytest.raises(ConfigError, match=r"arms = \{\}"):
        load_experiment(path, overrides=["arms.one=null", "arms.beta-0.1=null"])


def test_a_judge_that_compares_is_refused_since_arms_are_compared_by_scores(tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text("def better(prompt, a, b):\n    return 1\n")
    with pytest.raises(ConfigError, match=r"arms\.one: .*compares completions.*set evaluation\.judge"):
        load_experiment(written(base={**BASE, "judge": {"use": "judge.py:better"}}))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_that_ships_loads_and_has_a_plan(
    path: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    assets = tmp_path / ".cache" / "iterdpo" / "quickstart"
    shutil.copytree(tiny_model, assets / "model")
    rows = (json.dumps({"prompt": f"Tale {i}"}) + "\n" for i in range(1000))
    (assets / "prompts.jsonl").write_text("".join(rows))
    np.savez(assets / "judge.npz", weights=np.zeros(4), intercept=0.0)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)  # where benchmarks/ is
    said = describe_experiment(load_experiment(path, out=tmp_path / "out"))
    assert len(said.splitlines()) > 5
    assert "runs" in said.splitlines()[-1]


def test_ten_experiments_ship() -> None:
    assert len(EXPERIMENTS) == 10
