"""Configurations: merged, checked, and refused with the key and the remedy; and quick to load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from iterdpo.config import (
    LOSSES,
    Config,
    DPOConfig,
    OfflineConfig,
    OtherSideConfig,
    PromptsConfig,
    load_config,
    load_offline_config,
    merge,
    parse_config,
)
from iterdpo.errors import ConfigError

ROOT = Path(__file__).parents[2]
RUN: dict[str, Any] = {
    "run_dir": "runs/x",
    "model": {"path": "org/model"},
    "prompts": {"path": "org/prompts"},
    "judge": {"use": "package.module:judge"},
}
OFFLINE: dict[str, Any] = {"run_dir": "runs/x", "model": {"path": "org/model"}, "data": {"path": "org/pairs"}}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("run.yaml", RUN)
    write("offline.yaml", OFFLINE)


def write(name: str, values: dict[str, Any] | str) -> str:
    Path(name).write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return name


def refusal(*overrides: str, files: tuple[str, ...] = ("run.yaml",)) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(*files, overrides=list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


# Merging


def test_later_files_win_over_earlier_ones_and_overrides_over_files_in_their_order() -> None:
    write("a.yaml", {"sampling": {"n": 5, "top_p": 0.5, "max_tokens": 10}, "seed": 1})
    write("b.yaml", {"sampling": {"n": 6, "top_p": 0.6}, "seed": 2})
    config = load_config("run.yaml", "a.yaml", "b.yaml", overrides=["sampling.n=7", "sampling.n=8"])
    assert (config.sampling.max_tokens, config.sampling.top_p, config.sampling.n, config.seed) == (10, 0.6, 8, 2)
    assert load_config("run.yaml", "b.yaml", "a.yaml").sampling.n == 5


def test_mappings_merge_key_by_key_and_everything_else_is_replaced() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}, "f": 1}
    assert merge(base, {"a": {"c": [3]}, "d": 5, "f": {"g": 1}}) == {"a": {"b": 1, "c": [3]}, "d": 5, "f": {"g": 1}}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}, "f": 1}


def test_a_judges_arguments_merge_too() -> None:
    write("run.yaml", {**RUN, "judge": {"use": "reward_model", "args": {"model": "m", "batch_size": 2}}})
    config = load_config("run.yaml", overrides=["judge.args.batch_size=4"])
    assert config.judge.args == {"model": "m", "batch_size": 4}


def test_an_override_replaces_a_whole_mapping() -> None:
    write("run.yaml", {**RUN, "judge": {"use": "reward_model", "args": {"model": "m", "batch_size": 2}}})
    assert load_config("run.yaml", overrides=["judge.args={}"]).judge.args == {}
    other = load_config("run.yaml", overrides=["judge={use: a.b:c}", "judge.args.x=1"])
    assert (other.judge.use, other.judge.args) == ("a.b:c", {"x": 1})


def test_an_empty_file_changes_nothing() -> None:
    write("empty.yaml", "# nothing yet\n")
    assert load_config("run.yaml", "empty.yaml") == load_config("run.yaml")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("dpo.learning_rate=1e-5", 1e-5),  # YAML 1.1 reads this as text
        ("dpo.learning_rate=1E-5", 1e-5),
        ("dpo.learning_rate=5.0e-7", 5e-7),
        ("dpo.learning_rate=2", 2.0),
        ("dpo.adam_betas=[0.9, 0.95]", (0.9, 0.95)),
        ("dpo.gradient_checkpointing=true", True),
        ("dpo.accelerate_config=null", None),
        ("dpo.precision=fp32", "fp32"),
        ("judge.args.prompt=a=b", "a=b"),
        ("judge.args.prompt='12'", "12"),
        (" dpo.beta =0.3", 0.3),
    ],
)
def test_overrides_have_the_type_that_their_text_says(override: str, value: Any) -> None:
    config: Any = load_config("run.yaml", overrides=[override])
    for part in override.partition("=")[0].strip().split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    assert config == value
    assert type(config) is type(value)


def test_a_file_may_say_1e_5_too() -> None:
    write("lr.yaml", "dpo:\n  learning_rate: 1e-5\n")
    assert load_config("run.yaml", "lr.yaml").dpo.learning_rate == 1e-5


# The loss


@pytest.mark.parametrize(
    ("overrides", "loss"),
    [
        ([], {"type": "sigmoid", "label_smoothing": 0.0}),
        (["dpo.loss=ipo"], {"type": "ipo"}),
        (["dpo.loss={type: simpo, gamma: 0.75}"], {"type": "simpo", "gamma": 0.75}),
        (["dpo.loss=simpo", "dpo.loss.gamma=0.75"], {"type": "simpo", "gamma": 0.75}),
        (["dpo.loss.gamma=0.75", "dpo.loss.type=simpo"], {"type": "simpo", "gamma": 0.75}),
        (["dpo.loss={type: simpo, gamma: 0.75}", "dpo.loss=ipo"], {"type": "ipo"}),
        (["dpo.loss.label_smoothing=0.25"], {"type": "sigmoid", "label_smoothing": 0.25}),
        (["dpo.loss=exo_pair"], {"type": "exo_pair", "label_smoothing": 0.001}),
    ],
)
def test_a_loss_is_a_name_or_a_mapping_with_its_own_keys(overrides: list[str], loss: dict[str, Any]) -> None:
    config = load_config("run.yaml", overrides=overrides)
    assert config.dpo.loss.model_dump() == loss
    assert parse_config(Config, config.model_dump(mode="json")) == config


def test_a_key_is_added_to_the_loss_that_an_earlier_file_names() -> None:
    write("ipo.yaml", {"dpo": {"loss": "ipo"}})
    write("simpo.yaml", {"dpo": {"loss": "simpo"}})
    write("gamma.yaml", {"dpo": {"loss": {"gamma": 0.75}}})
    assert load_config("run.yaml", "simpo.yaml", "gamma.yaml").dpo.loss.model_dump() == {"type": "simpo", "gamma": 0.75}
    assert load_config("run.yaml", "simpo.yaml", "gamma.yaml", "ipo.yaml").dpo.loss.type == "ipo"
    assert "it belongs to simpo, but dpo.loss.type is 'ipo'" in refusal(files=("run.yaml", "ipo.yaml", "gamma.yaml"))


# Refusals


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dpo.betta=0.2", "unknown key 'dpo.betta'; did you mean 'beta'?"),
        ("sampeling.n=4", "unknown key 'sampeling'; did you mean 'sampling'?"),
        ("sampling.engine.max_num_seq=4", "unknown key 'sampling.engine.max_num_seq'; did you mean 'max_num_seqs'?"),
        (
            "dpo.zzz=1",
            "unknown key 'dpo.zzz'; known keys: accelerate_config, activation_offload, adam_betas, adapter, beta, ",
        ),
        ("dpo.beta=-0.1", "dpo.beta = -0.1: input should be greater than 0"),
        ("dpo.beta=0", "dpo.beta = 0: input should be greater than 0"),
        ("dpo.beta=.nan", "dpo.beta = nan: input should be "),
        ("dpo.beta=much", "dpo.beta = 'much': input should be a valid number"),
        ("dpo.loss.label_smoothing=0.5", "dpo.loss.label_smoothing = 0.5: input should be less than 0.5"),
        ("dpo.loss=sigmod", "dpo.loss = 'sigmod': did you mean 'sigmoid'?"),
        ("dpo.loss=dpo", "dpo.loss = 'dpo': did you mean 'sigmoid'?"),
        (
            "dpo.loss=zzz",
            "dpo.loss = 'zzz': input should be one of sigmoid, sigmoid_norm, robust, exo_pair, ipo, hinge",
        ),
        ("dpo.loss=3", "dpo.loss = 3: input should be a valid dictionary"),
        ("dpo.loss.zzz=3", "unknown key 'dpo.loss.zzz'; known keys: label_smoothing, type"),
        (
            "dpo.loss={type: exo_pair, label_smoothing: 0}",
            "dpo.loss.label_smoothing = 0: input should be greater than 0",
        ),
        ("dpo.label_smoothing=0.1", "unknown key 'dpo.label_smoothing'; did you mean 'loss.label_smoothing'?"),
        ("dpo={loss: aot, wpo: true}", "dpo: wpo: weights pairs, but aot compares none; set wpo to false"),
        ("dpo={loss: bco, ld_alpha: 0.5}", "dpo: ld_alpha: weights tokens by the length of a pair's other completion"),
        (
            "dpo={loss: simpo, ld_alpha: 0.5}",
            "dpo: ld_alpha: weights tokens by the length of a pair's other completion, which simpo does not ",
        ),
        ("dpo.ld_alpha=1.5", "dpo.ld_alpha = 1.5: input should be less than or equal to 1"),
        ("dpo={ld_alpha: 0.5, sampler_logps_tolerance: 0.1}", "dpo: sampler_logps_tolerance: the sampler's log-prob"),
        ("dpo={max_steps: 5, epochs: 2}", "dpo: max_steps: takes the place of epochs, which is 2; set one of the two"),
        (
            "dpo={warmup_steps: 5, warmup_ratio: 0.2}",
            "dpo: warmup_steps: takes the place of warmup_ratio, which is 0.2",
        ),
        ("dpo.max_steps=-1", "dpo.max_steps = -1: input should be greater than or equal to 1"),
        ("dpo.adapter.lora_dropout=1", "dpo.adapter.lora_dropout = 1: input should be less than 1"),
        ("dpo.adapter.modules_to_save=[]", "dpo.adapter.modules_to_save = []: list should have at least 1 item"),
        (
            "dpo={optimizer: adamw_8bit, adapter: {}}",
            "dpo: optimizer: adamw_8bit keeps weights in bfloat16, but an adapter",
        ),
        ("dpo={optimizer: adamw_8bit, precision: fp32}", "dpo: optimizer: adamw_8bit keeps weights in bfloat16, but"),
        ("dpo={loss: kto, wpo: true}", "dpo: wpo: weights pairs, but kto compares none; set wpo to false"),
        (
            "dpo.reference=first",
            "dpo.reference = 'first': input should be 'previous', 'initial', 'ema', 'periodic' or 'none'",
        ),
        ("sampling.n=1", "sampling.n = 1: input should be greater than or equal to 2"),
        ("sampling.n=2.5", "sampling.n = 2.5: input should be a valid integer"),
        ("sampling.temperature=0", "sampling.temperature = 0: input should be greater than 0"),
        ("sampling.temperatures=[1.0]", "sampling.temperatures = [1.0]: list should have at least 2 items"),
        (
            "prompts.choose=untied",
            "prompts: choose = 'untied': no prompt is sampled twice without reuse; set reuse=true",
        ),
        (
            "dpo.xpo_alpha=1e-5",
            "dpo.xpo_alpha: needs pairs with a completion of another policy; set pairing.against to",
        ),
        (
            "dpo={loss: simpo, xpo_alpha: 1}",
            "dpo: xpo_alpha: adds to a loss that compares two completions under a reference",
        ),
        (
            "pairing={against: {round: 0}, rejected_from: {round: 0}}",
            "pairing: rejected_from and against: a pair has one side of another source; set all but one to null",
        ),
        ("pairing.rejected_from={}", "pairing.rejected_from: name one of round, model and column"),
        ("pairing.chosen_from={round: 0, column: x}", "pairing.chosen_from: name one of round, model and column"),
        ("pairing.strategy=best_wurst", "pairing.strategy = 'best_wurst': input should be 'best_worst', 'best_random'"),
        ("rounds=0", "rounds = 0: input should be greater than or equal to 1"),
        ("model.path=null", "model.path = None: input should be a valid string"),
        ("dpo=0.1", "dpo = 0.1: input should be a valid dictionary"),
        (
            "evaluation.judge.uze=x",
            "missing key 'evaluation.judge.use'; unknown key 'evaluation.judge.uze'; did you mean",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_its_file_its_key_and_what_would_do(override: str, message: str) -> None:
    assert f"run.yaml: {message}" in refusal(override)


@pytest.mark.parametrize("name", [name for name, keys in LOSSES.items() if "label_smoothing" not in keys.model_fields])
def test_a_key_of_another_loss_is_refused_with_the_losses_that_have_it(name: str) -> None:
    message = (
        "unknown key 'dpo.loss.label_smoothing': it belongs to sigmoid, sigmoid_norm, robust, exo_pair, aot, "
        f"aot_unpaired, but dpo.loss.type is {name!r}; remove it, or set dpo.loss={name} to start from its defaults"
    )
    assert message in refusal(f"dpo.loss={name}", "dpo.loss.label_smoothing=0.1")


def test_several_mistakes_are_told_at_once() -> None:
    message = refusal("dpo.beta=-1", "sampling.n=1")
    assert "dpo.beta = -1" in message
    assert "sampling.n = 1" in message


def test_what_is_missing_is_named() -> None:
    write("run.yaml", {"run_dir": "x", "model": {}, "prompts": {"path": "p"}})
    message = refusal()
    assert "missing key 'model.path'" in message
    assert "missing key 'judge'" in message


@pytest.mark.parametrize("override", ["dpo.beta", "=3", "dpo.beta:0.1"])
def test_an_override_without_a_key_or_a_value_is_refused_with_an_example(override: str) -> None:
    assert (
        refusal(override) == f"{override!r}: write an override as key=value, with dots between the levels: dpo.beta=0.2"
    )


def test_an_override_that_is_not_yaml_is_refused() -> None:
    assert "the value is not valid YAML; quote it" in refusal("judge.args.prompt=[a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "bad.yaml: a configuration must be a mapping of keys, not a list"),
        ("a: [1\nb: 2\n", "bad.yaml: not valid YAML: "),
        ("just text", "bad.yaml: a configuration must be a mapping of keys, not a str"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(text: str, message: str) -> None:
    write("bad.yaml", text)
    assert refusal(files=("bad.yaml",)).startswith(message)


def test_a_file_that_is_not_there_or_not_text_is_refused() -> None:
    assert refusal(files=("nowhere.yaml",)) == "nowhere.yaml: no such configuration file"
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    assert refusal(files=("binary.yaml",)).startswith("binary.yaml: cannot be read: ")
    assert refusal(files=(".",)).startswith(".: cannot be read: ")


def test_a_configuration_of_the_other_kind_is_told_where_it_belongs() -> None:
    assert refusal(files=("offline.yaml",)) == "offline.yaml: has 'data': this is a configuration of `iterdpo train`"
    with pytest.raises(ConfigError, match=r"run\.yaml: has 'judge': this is a configuration of `iterdpo run`"):
        load_offline_config("run.yaml")


def test_the_training_judge_is_no_heldout_judge() -> None:
    message = refusal("evaluation.judge.use=package.module:judge")
    assert message == "run.yaml: evaluation.judge is the training judge; a held-out judge must not be used for training"
    assert load_config("run.yaml", overrides=["evaluation.judge.use=package.module:other"]).evaluation.judge


@pytest.mark.parametrize("override", ["gate.minimum=.nan", "gate.minimum=.inf", "dpo.learning_rate=.inf"])
def test_numbers_that_json_does_not_have_are_refused(override: str) -> None:
    assert override.partition("=")[0] in refusal(override)


def test_a_configuration_cannot_be_changed() -> None:
    config = load_config("run.yaml")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 5  # type: ignore[misc]


def test_one_offline_round_has_one_reference_the_policy_it_starts_from() -> None:
    assert load_offline_config("offline.yaml", overrides=["dpo.reference=initial"]).dpo.reference == "previous"


# Paths


def test_paths_that_exist_become_absolute_and_hub_ids_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for directory in ("model", "rm/large"):
        Path(directory).mkdir(parents=True)
    for file in ("prompts.jsonl", "heldout.jsonl", "accelerate.yaml", "judge.py", "pairs.jsonl"):
        Path(file).write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    values = {
        "run_dir": "runs/x",
        "model": {"path": "~/model"},
        "prompts": {"path": "prompts.jsonl", "heldout_path": "./heldout.jsonl"},
        "judge": {"use": "judge.py:score", "args": {"model": "rm/large", "other": "org/rm", "n": 3, "text": "model"}},
        "evaluation": {"judge": {"use": "./judge.py:other"}},
        "dpo": {"accelerate_config": "accelerate.yaml"},
    }
    config = parse_config(Config, values)
    assert config.run_dir == f"{tmp_path}/runs/x"
    assert config.model.path == f"{tmp_path}/model"
    assert config.prompts.path == f"{tmp_path}/prompts.jsonl"
    assert config.prompts.heldout_path == f"{tmp_path}/heldout.jsonl"
    assert config.judge.use == f"{tmp_path}/judge.py:score"
    # an argument is a path where it has a slash and exists; a bare word may mean anything
    assert config.judge.args == {"model": f"{tmp_path}/rm/large", "other": "org/rm", "n": 3, "text": "model"}
    assert config.evaluation.judge is not None
    assert config.evaluation.judge.use == f"{tmp_path}/judge.py:other"
    assert config.dpo.accelerate_config == f"{tmp_path}/accelerate.yaml"

    hub = load_config("run.yaml")
    assert (hub.model.path, hub.prompts.path, hub.judge.use) == ("org/model", "org/prompts", "package.module:judge")
    offline = load_offline_config("offline.yaml", overrides=["data.path=pairs.jsonl", "run_dir=~/runs/y"])
    assert (offline.data.path, offline.run_dir) == (f"{tmp_path}/pairs.jsonl", f"{tmp_path}/runs/y")


def test_a_long_text_with_a_slash_in_a_judges_arguments_is_a_text() -> None:
    rubric = "Be strict, and read the completion to its end. " * 10 + "Give 1/0 points."
    write("run.yaml", {**RUN, "judge": {"use": "package.module:judge", "args": {"rubric": rubric}}})
    assert load_config("run.yaml").judge.args["rubric"] == rubric


def test_what_was_loaded_loads_again_to_the_same() -> None:
    config = load_config("run.yaml", overrides=["dpo.beta=0.2", "evaluation.judge.use=a.b:c"])
    assert parse_config(Config, config.model_dump(mode="json")) == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_file_in_configs_loads(path: Path) -> None:
    offline = "data" in yaml.safe_load(path.read_text())
    config = load_offline_config(path) if offline else load_config(path)
    assert isinstance(config, OfflineConfig if offline else Config)


# Speed


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import iterdpo.config", {"torch", "vllm", "transformers", "datasets", "prefect", "pandas"}),
        (
            "from iterdpo import load_config; load_config('run.yaml')",
            {"torch", "vllm", "transformers", "datasets", "prefect", "pandas"},
        ),
        (
            "from flows.cli import app; app.help_print([])",
            {"torch", "vllm", "transformers", "datasets", "prefect", "pandas", "pydantic", "numpy"},
        ),
    ],
    ids=["config", "load", "help"],
)
def test_a_typo_or_a_question_does_not_wait_for_heavy_imports(code: str, unwanted: set[str]) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}; print('loaded:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.partition("loaded:")[2].split()) & unwanted == set()


def test_a_new_key_that_is_not_set_is_in_no_dump_and_every_value_comes_back() -> None:
    plain = load_config("run.yaml").model_dump(mode="json")["dpo"]
    assert not {"warmup_steps", "max_steps", "ld_alpha"} & plain.keys()
    dpo = "dpo={warmup_steps: 0, max_steps: 1, ld_alpha: 0, adapter: {lora_dropout: 0.1, modules_to_save: [lm_head]}}"
    config = load_config("run.yaml", overrides=[dpo])
    assert parse_config(Config, config.model_dump(mode="json")) == config
    assert (config.dpo.steps(100), config.dpo.pairs_seen(100), config.dpo.pairs_seen(5)) == (1, 8, 5)


def test_vllm_is_not_asked_for_an_adapter_that_it_does_not_apply() -> None:
    settings = ("dpo.adapter.modules_to_save=[lm_head]", "sampling.engine.lora=vllm")
    assert "sampling.engine.lora = 'vllm': vLLM applies no adapter with dpo.adapter.modules_to_save" in refusal(
        *settings
    )


def test_a_source_is_replaced_by_setting_the_key_before_to_null() -> None:
    write("run.yaml", RUN | {"pairing": {"against": {"round": 0}}})
    config = load_config("run.yaml", overrides=["pairing.against.round=null", "pairing.against.column=gold"])
    assert config.pairing.against == OtherSideConfig(column="gold")


@pytest.mark.parametrize(("steps", "rounds"), [(1, 96), (8, 12), (96, 1)])
def test_the_dial_derives_rounds_prompts_and_steps_and_rounds_are_one_training(steps: int, rounds: int) -> None:
    write("run.yaml", RUN | {"steps_per_round": steps, "total_steps": 96})
    config = load_config("run.yaml", overrides=["dpo.pairs_per_step=4"])
    assert (config.rounds, config.prompts.per_round, config.dpo.max_steps) == (rounds, 4 * steps, steps)
    assert (config.dpo.lr_scheduler, config.dpo.warmup_ratio, config.dpo.optimizer_state) == ("constant", 0.0, "carry")
    assert Config.model_validate(config.model_dump()) == config  # as run.json has it
    sections = {"prompts": PromptsConfig(path="tales.jsonl"), "dpo": DPOConfig(pairs_per_step=4)}
    of_sections = Config.model_validate(RUN | {"steps_per_round": steps, "total_steps": 96} | sections)
    assert (of_sections.prompts.per_round, of_sections.dpo.max_steps) == (4 * steps, steps)
    given = load_config("run.yaml", overrides=["dpo.lr_scheduler=cosine", "dpo.warmup_steps=0"])
    assert (given.dpo.lr_scheduler, given.dpo.warmup_steps, given.dpo.warmup_ratio) == ("cosine", 0, 0.1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["total_steps=97"], "steps_per_round = 8: no divisor of total_steps = 97; such are 1, 97"),
        (["rounds=3"], "rounds = 3: steps_per_round sets it to 12; remove one of the two"),
        (["prompts.per_round=7"], "prompts.per_round = 7: steps_per_round sets it to 64; remove one of the two"),
        (["dpo.max_steps=9"], "dpo.max_steps = 9: steps_per_round sets it to 8; remove one of the two"),
        (["steps_per_round=0"], "steps_per_round = 0: input should be greater than or equal to 1"),
        (["dpo.pairs_per_step=null"], "dpo.pairs_per_step = None: input should be a valid integer"),
        (["total_steps=many"], "total_steps = 'many': input should be a valid integer"),
    ],
)
def test_a_dial_that_contradicts_other_keys_is_refused(overrides: list[str], message: str) -> None:
    write("run.yaml", RUN | {"steps_per_round": 8, "total_steps": 96})
    assert message in refusal(*overrides)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [1, 0.7, 0.4, 0.1, 0.1]),
        ("cosine", [1, 0.1 + 0.9 * 0.75, 0.1 + 0.9 * 0.25, 0.1, 0.1]),
        ("exponential", [1, 10 ** (-1 / 3), 10 ** (-2 / 3), 0.1, 0.1]),
    ],
)
def test_the_learning_rate_falls_over_rounds_to_its_final_share(schedule: str, expected: list[float]) -> None:
    over_rounds = {"schedule": schedule, "rounds": 4, "final": 0.1}
    dpo = DPOConfig.model_validate({"learning_rate": 2e-6, "learning_rate_over_rounds": over_rounds})
    assert [dpo.of_round(t).learning_rate / 2e-6 for t in range(1, 6)] == pytest.approx(expected)
    assert DPOConfig().of_round(3) == DPOConfig()
