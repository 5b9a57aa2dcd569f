"""What an experiment file says: arms that differ in named settings, seeds, and what is tuned. Loads no model.

A file is YAML with the keys of `ExperimentConfig`. Each arm at each seed becomes an ordinary configuration, validated as
such, before anything runs.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from iterdpo.config import Config, Section, assign, explain, merge, parse_config, read_yaml, typed_loss, with_key
from iterdpo.errors import ConfigError
from iterdpo.run.rundir import digest
from judges.load import check_judge, compares

Kind = Literal["iterative", "offline", "initial", "best_of_n", "command"]
TUNING = "tuning"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


class TuneConfig(Section):
    """Settings that each arm tries before the experiment, on other seeds. The best by `metric` are its settings then."""

    grid: dict[str, list[Any]] = Field(min_length=1)
    """Dotted keys with the values to try: all combinations. A key that an arm sets itself is not tried for it."""
    seeds: list[int] = Field(min_length=1)
    """Seeds of the trials; none of the experiment's. Another seed has other held-out prompts too."""
    max_kl: float | None = Field(None, gt=0)
    """Leave out values at which the mean KL to the initial policy (nats per completion) is above this."""


class ExperimentConfig(Section):
    """Arms, seeds, and what they have in common."""

    title: str = ""
    """A sentence for the page: the question that the experiment answers."""
    base: str | dict[str, Any] | list[str | dict[str, Any]]
    """Configuration files, relative to the experiment's, or their keys in place; merged in order."""
    arms: dict[str, dict[str, Any]] = Field(min_length=1)
    """The settings of each arm over `base`, as sections or with dotted keys; and `kind`, `n`, `command` and `tune`."""
    seeds: list[int] = Field(min_length=1)
    """Every arm runs once with each."""
    tune: TuneConfig | None = None
    """See `TuneConfig`."""

    @model_validator(mode="after")
    def _seeds_differ(self) -> ExperimentConfig:
        seeds = [*self.seeds, *(self.tune.seeds if self.tune else [])]
        if len(set(seeds)) < len(seeds):
            raise ValueError("seeds: a seed is named twice; those of tune.seeds must be others than the experiment's")
        return self


@dataclass(frozen=True)
class Arm:
    """An arm of an experiment: `Arm("offline", "offline", {"dpo": {"beta": 0.1}})`."""

    name: str
    kind: Kind
    settings: dict[str, Any]
    """What it sets over the base, by dotted key."""
    n: int = 1
    """With `best_of_n`: of how many completions the best is taken."""
    command: tuple[str, ...] = ()
    """With `command`: the program that makes the policy, with its arguments."""
    requires: tuple[str, ...] = ()
    """With `command`: modules that its Python must have."""
    grid: Mapping[str, list[Any]] = field(default_factory=dict)
    """The settings that are tuned for it."""

    @property
    def trains(self) -> bool:
        return self.kind not in ("initial", "best_of_n")

    def trials(self) -> Iterator[dict[str, Any]]:
        """Every combination of the grid; one without settings if there is no grid."""
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))


@dataclass(frozen=True)
class Experiment:
    """A checked experiment. `config_of` gives the configuration of an arm at a seed."""

    source: str
    out: Path
    settings: ExperimentConfig
    base: dict[str, Any]
    arms: tuple[Arm, ...]

    def config_of(self, arm: Arm, seed: int, tuned: Mapping[str, Any] | None = None, *, trial: bool = False) -> Config:
        """The configuration of `arm` at `seed`, with tuned settings.

        Raises:
            ConfigError: a key or a value is wrong, with the arm.
        """
        values = self.base
        for key, value in {**arm.settings, **(tuned or {})}.items():
            values = with_key(typed_loss(values), key, value)
        directory = self.out / TUNING / arm.name / _slug(tuned or {}) if trial else self.out / arm.name
        values = {**values, "seed": seed, "run_dir": str(directory / f"seed-{seed}")}
        source = f"{self.source}: arms.{arm.name}"
        config = parse_config(Config, values, source=source)
        judge = config.evaluation.judge or config.judge
        check_judge(judge.use, judge.args)
        if compares(judge.use, judge.args):
            raise ConfigError(
                f"{source}: {judge.use} compares completions and gives no score of its own, and arms are compared by "
                "scores; set evaluation.judge to a judge that scores"
            )
        match arm.kind:
            case "offline":
                prompts = config.prompts.model_copy(update={"per_round": config.rounds * config.prompts.per_round})
                steps = config.dpo.max_steps and config.rounds * config.dpo.max_steps
                dpo = config.dpo.model_copy(update={"max_steps": steps})
                return config.model_copy(update={"rounds": 1, "prompts": prompts, "dpo": dpo})
            case "best_of_n":  # after those that the initial policy itself is measured by
                if config.evaluation.temperature == 0:
                    raise ConfigError(
                        f"{source}: evaluation.temperature = 0 gives one completion a prompt, of which there is no best of N; "
                        "set it above 0"
                    )
                n = config.evaluation.n + arm.n
                return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"n": n})})
        return config


def load_experiment(*paths: str | Path, overrides: Sequence[str] = (), out: str | Path | None = None) -> Experiment:
    """The experiment in YAML files, merged left to right, then `dotted.key=value` overrides.

    An override of one of the experiment's own keys (`seeds=[0,1]`, `arms.offline.dpo.beta=0.2`) changes that; any other
    changes the base of every arm. `out` is the directory of its runs; by default `runs/<name of the first file>`.

    Raises:
        ConfigError: with the file, the key and the remedy.
    """
    if not paths:
        raise ConfigError("name the YAML file of an experiment, such as configs/experiments/iterative-vs-offline.yaml")
    source = " + ".join(map(str, paths))
    values: dict[str, Any] = {}
    for path in map(Path, paths):
        values = merge(values, _based(read_yaml(path), path.parent))
    own = [o for o in overrides if o.partition("=")[0].strip().partition(".")[0] in ExperimentConfig.model_fields]
    for override in own:
        values = _overridden(values, override)
    if found := sorted(Config.model_fields.keys() & values.keys()):
        raise ConfigError(
            f"{source}: has {found[0]!r}, a key of a run; put it below `base`, for all arms, or into an arm of `arms`"
        )
    try:
        settings = ExperimentConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(explain(ExperimentConfig, e) for e in error.errors())) from None
    base: dict[str, Any] = {}
    for part in settings.base if isinstance(settings.base, list) else [settings.base]:
        if isinstance(part, str):
            base = merge(typed_loss(base), read_yaml(Path(part)))
            continue
        for key, value in _flat(part):
            base = with_key(typed_loss(base), key, value)
    for override in overrides:
        if override not in own:
            base = assign(typed_loss(base), override)
    arms = tuple(_arm(source, name, values, settings.tune) for name, values in settings.arms.items())
    directory = Path(out) if out is not None else Path("runs") / Path(paths[0]).stem
    experiment = Experiment(source, directory.expanduser().absolute(), settings, base, arms)
    for arm in arms:
        experiment.config_of(arm, settings.seeds[0])
        for trial in arm.trials():
            experiment.config_of(arm, settings.seeds[0], trial, trial=True)
    return experiment


def _overridden(values: dict[str, Any], override: str) -> dict[str, Any]:
    """The values with an override. `arms.NAME=null` leaves out an arm that is there."""
    key, _, value = map(str.strip, override.partition("="))
    arms, name = values.get("arms"), key.removeprefix("arms.")
    if value == "null" and name != key and isinstance(arms, dict) and name in arms:
        return {**values, "arms": {other: arm for other, arm in arms.items() if other != name}}
    return assign(values, override)


def _based(values: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The values of a file with the paths of `base` made relative to the current directory."""
    if "base" not in values:
        return values
    base = values["base"]
    parts = base if isinstance(base, list) else [base]
    return {**values, "base": [str(directory / part) if isinstance(part, str) else part for part in parts]}


def _arm(source: str, name: str, values: dict[str, Any], tune: TuneConfig | None) -> Arm:
    where = f"{source}: arms.{name}"
    if not NAME.fullmatch(name) or name == TUNING:
        raise ConfigError(
            f"{source}: arms: {name!r} is the name of a directory too: use letters, digits, '.', '_', '+' and '-', and not "
            f"{TUNING!r}"
        )
    values = dict(values)
    kind = values.pop("kind", "command" if "command" in values else "iterative")
    if kind not in get_args(Kind):
        raise ConfigError(f"{where}.kind = {kind!r}: input should be one of {', '.join(get_args(Kind))}")
    n, command, tuned = values.pop("n", None), values.pop("command", None), values.pop("tune", None)
    requires = values.pop("requires", None)
    if (n is not None) != (kind == "best_of_n"):
        raise ConfigError(
            f"{where}.n: the completions that kind = 'best_of_n' takes the best of; that kind needs it, and no other has it"
        )
    if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
        raise ConfigError(f"{where}.n = {n!r}: input should be a whole number, at least 1")
    if (command is not None) != (kind == "command"):
        raise ConfigError(
            f"{where}.command: the program that kind = 'command' starts; that kind needs it, and no other has it"
        )
    if command is not None and not (_are_words(command) and "{spec}" in command):
        raise ConfigError(
            f"{where}.command = {command!r}: input should be a list of words, of which {{spec}} is replaced by the path of "
            "the file that says what to do, such as [python, my_trainer.py, '{spec}']"
        )
    if requires is not None and (
        kind != "command" or not (_are_words(requires) and all(map(str.isidentifier, requires)))
    ):
        raise ConfigError(
            f"{where}.requires = {requires!r}: input should be a list of modules, such as [trl], that the Python of "
            "kind = 'command' must have"
        )
    settings = dict(_flat(values))
    arm = Arm(name, kind, settings, n or 1, tuple(command or ()), tuple(requires or ()))
    if (
        tuned is not None
        and tuned is not False
        and not (isinstance(tuned, list) and tune and set(tuned) <= tune.grid.keys())
    ):
        raise ConfigError(f"{where}.tune = {tuned!r}: input should be false, or a list of keys of tune.grid")
    if tune is None or tuned is False or not arm.trains or kind == "command":
        return arm
    grid = {key: tried for key, tried in tune.grid.items() if key not in settings and (tuned is None or key in tuned)}
    return replace(arm, grid=grid)


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Sections by dotted key. A judge and a loss are one value each, as are a judge's arguments."""
    for key, value in values.items():
        whole = key in ("args", "loss") or (isinstance(value, dict) and "use" in value)
        if isinstance(value, dict) and value and not whole:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value


def _slug(tuned: Mapping[str, Any]) -> str:
    """The directory of a trial: `beta-0.1_learning_rate-0.0001`."""
    text = "_".join(f"{key.rpartition('.')[2]}-{value}" for key, value in tuned.items())
    return text if NAME.fullmatch(text) else f"trial-{digest(dict(tuned))}"
