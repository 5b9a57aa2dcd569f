"""What a run's files and settings show of its pairs, its evaluation and its gate, before anything heavy is loaded."""

from __future__ import annotations

import importlib.util
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from iterdpo.data.preferences import preferences_of
from iterdpo.errors import ConfigError
from iterdpo.evaluation.metrics import OF_THOUGHTS, unmeasured
from iterdpo.run.checkpoints import check_alike, check_checkpoint, resolve_checkpoint

if TYPE_CHECKING:
    from iterdpo.config import MixedDataConfig, OtherSideConfig
    from iterdpo.stages.runs import IterativeRun


def check_gate(run: IterativeRun, *, heldout_judge: bool) -> None:
    """A ConfigError if the gate names a metric that is never measured, with the remedy."""
    config = run.config
    for key, metric in config.gate.metrics():
        if metric.startswith("benchmark/") and config.evaluation.benchmarks is not None:
            continue
        if why := unmeasured(
            metric,
            heldout_judge=heldout_judge,
            thinking=metric in OF_THOUGHTS and run.tags is not None,
            completions=config.evaluation.completions,
            references=config.evaluation.reference_column is not None,
            other_model=config.evaluation.against is not None,
            temperatures=config.further_temperatures,
            with_self_bleu=config.evaluation.self_bleu,
        ):
            raise ConfigError(f"{key} = {metric!r}: {why}")


def check_evaluation(run: IterativeRun) -> None:
    """A ConfigError if the benchmarks, the column of reference completions or the model to compare with cannot be used."""
    section = run.config.evaluation
    benchmarks, column, against = section.benchmarks, section.reference_column, section.against
    if benchmarks is not None:
        if benchmarks.include_path is not None and not Path(benchmarks.include_path).is_dir():
            raise ConfigError(f"evaluation.benchmarks.include_path = {benchmarks.include_path!r}: no such directory")
        if importlib.util.find_spec("lm_eval") is None:
            raise ConfigError(
                "evaluation.benchmarks: the package 'lm_eval' is not installed; run: pip install 'iterdpo[benchmarks]'"
            )
    if column is not None and column not in run.prompts.heldout.columns():
        raise ConfigError(f"evaluation.reference_column = {column!r}: the held-out prompts have no such column")
    if against is not None:
        _check_model(run, "evaluation.against.model", against.model, column="evaluation.reference_column")


def check_pairing(run: IterativeRun) -> None:
    """What the section `pairing` names besides the round's completions: a column, another checkpoint, data.

    Raises:
        ConfigError: it is not there, or is of another kind than the run's.
        DataError: a completion in the column cannot be used, with its place in the data.
    """
    section = run.config.pairing
    if section.other_side is not None:
        _check_other_side(run, f"pairing.{section.other_key}", section.other_side)
    if section.offline is not None:
        _check_offline(run, section.offline)


def _check_other_side(run: IterativeRun, key: str, source: OtherSideConfig) -> None:
    if source.column is not None:
        if source.column not in (known := run.prompts.train.columns()):
            raise ConfigError(
                f"{key}.column = {source.column!r}: the prompts have no such column; they have "
                f"{', '.join(sorted(known)) or 'none'}"
            )
        to_come = (t for t in range(1, run.config.rounds + 1) if not (run.dir.round_dir(t) / "pairs").exists())
        for prompt in chain.from_iterable(map(run.prompts.of, to_come)):
            run.other_content(prompt)
    if source.model is not None:
        _check_model(run, f"{key}.model", source.model, column="{column: NAME}")


def _check_model(run: IterativeRun, key: str, path: str, *, column: str) -> None:
    """A ConfigError if the run's engine cannot sample from the checkpoint in `path`."""
    other = resolve_checkpoint(path, key=key)
    check_checkpoint(other, trust_remote_code=run.config.model.trust_remote_code)
    check_alike(other, run.model_path, key, column=column)


def _check_offline(run: IterativeRun, data: MixedDataConfig) -> None:
    offline = preferences_of(data)
    if offline.account.kind == "unpaired":
        raise ConfigError(f"pairing.offline {data.path}: unpaired data; only pairs can be mixed with a round's")
    used = (run.dir.round_dir(1) / "pairs").exists()
    chat: bool | None = None
    for batch in offline.parsed():  # all, unless a round has used them
        chat = batch[0].prompt.conversational if batch and chat is None else chat
        if used and chat is not None:
            break
    if chat != next(iter(run.prompts.train)).conversational:
        kinds = ("messages", "text") if chat else ("text", "messages")
        raise ConfigError(
            f"pairing.offline {data.path}: its prompts are {kinds[0]}, and those of the run are {kinds[1]}; give both "
            "as the same kind"
        )
