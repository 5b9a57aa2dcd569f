"""One offline DPO round: preference pairs that exist already, the same `train` stage, no sampling."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

from iterdpo.config import OfflineConfig
from iterdpo.data.pairs import hold_out, write_card, write_tables
from iterdpo.data.preferences import Account, preferences_of
from iterdpo.data.rows import source_digest
from iterdpo.errors import ConfigError, DataError
from iterdpo.gate import Decision
from iterdpo.report.metrics import round_metrics
from iterdpo.run.artifacts import Pairs
from iterdpo.run.progress import Progress
from iterdpo.run.rundir import Manifest, read_manifest
from iterdpo.seeds import derive_seed
from iterdpo.stages.gate import round_record
from iterdpo.stages.pair import train_on_key
from iterdpo.stages.runs import OfflineRun
from iterdpo.stages.sample import template_key, thinking_key
from iterdpo.stages.train import train

PART_OF_KEY = {"format", "limit", "heldout", "max_prompt_tokens", "max_completion_tokens"}


def train_round(config: OfflineConfig, *, progress: Progress, redo: bool = False) -> bool:
    """Read the pairs, train the policy on them, and record the round. Returns whether there was anything to do.

    Raises:
        UserError: bad input, found before the model is loaded; or another process works in the run directory.
        ChildFailed: training ended with an error. Its last checkpoint stays.
    """
    run = OfflineRun(config, progress=progress, redo=redo)
    with run.dir.lock(), run.dir.noting_failures(), run:
        run.dir.refresh()
        run.warm_up_trainer(1)
        run.check_model()
        run.check_space()
        prepared = prepare_pairs(config, run)
        progress.say(f"  {'pairs':<9} {describe_counts(prepared.counts)}")
        check_kind(config, prepared.counts["kind"])
        run.dir.write_config(config.model_dump())
        before = read_manifest(run.dir.round_dir(1) / "policy")
        pairs = Pairs.of(run.dir.round_dir(1) / "pairs", prepared)
        trained = train(run, 1, pairs, run.initial, run.initial)
        decision = Decision("promote", "an offline round has no gate")
        record = round_record(run, 1, decision, trained, {}, round_metrics(run.dir, 1))
        if run.dir.record(1) != record:
            run.dir.write_record(record)
        run.trackers.round(record)
        return before is None or before.digest != trained.digest


def prepare_pairs(config: OfflineConfig, run: OfflineRun, *, processes: int | None = None) -> Manifest:
    """The pairs of the data as token ids, on disk; what was left out, and why, is in the manifest's counts.

    If they are there, the data's bytes are hashed, and no row is read. `processes`: those that tokenize.
    """
    data = config.data
    settings = data.model_dump(include=PART_OF_KEY)
    if data.min_margin is not None:  # left out at its default, so that runs from before it go on
        settings["min_margin"] = data.min_margin
    if data.bad_rows != "error":
        settings["bad_rows"] = data.bad_rows
    content = source_digest(data.path, data.split)
    inputs = {
        "model": run.initial.digest,
        "data": {**settings, "content": content},
        "seed": config.seed,
        **template_key(run),
        **thinking_key(run),
        **train_on_key(run),
    }
    step = run.dir.step(1, "pairs", inputs)
    # What an earlier attempt left, such as one on data that have been mended since, is of no use to this one.
    shutil.rmtree(step.partial, ignore_errors=True)
    if (done := step.manifest()) is not None:
        return done
    preferences = preferences_of(data)
    account = preferences.account
    directory = step.begin()
    unit = "pairs" if account.kind == "pairs" else "examples"
    with run.progress.stage("tokenize", data.limit or 0, unit) as stage:

        def tables() -> Iterator[Any]:
            limits = data.model_dump(include={"max_prompt_tokens", "max_completion_tokens"})
            alone = config.dpo.train_on == "answer"
            parts = preferences.tokenized(
                run.tokenizer, **limits, thinking=run.thinking, answers_alone=alone, processes=processes
            )
            for table in parts:
                stage.to(account.rows)
                yield table

        write_tables(directory / ".all.parquet", tables())
    check_account(config, account)
    kept = hold_out(directory / ".all.parquet", directory, data.heldout, seed=derive_seed(config.seed, "heldout"))
    write_card(directory, account.summary())
    return step.finish(
        counts={
            "kind": account.kind,
            "pairs": account.kept,
            "kept": kept,
            "heldout": data.heldout,
            "prompts_truncated": account.prompts_truncated,
            "completions_truncated": account.completions_truncated,
            **({"unfinished_thoughts": account.unfinished_thoughts} if run.tags is not None else {}),
            "summary": account.summary(),
            "left_out": account.left_out,
        }
    )


def check_kind(config: OfflineConfig, kind: str) -> None:
    """Refuse unpaired data for a loss that compares pairs."""
    if kind == "unpaired" and not config.dpo.loss.takes_unpaired:
        problem = f"unpaired data, but dpo.loss = {config.dpo.loss.type!r} compares pairs"
        raise ConfigError(f"{config.data.path}: {problem}; set dpo.loss=kto or dpo.loss=bco")


def check_account(config: OfflineConfig, account: Account) -> None:
    """Refuse data of which nothing is left to train on, and examples that all have the same label."""
    unit = "pairs" if account.kind == "pairs" else "examples"
    if account.kept <= config.data.heldout:
        raise DataError(
            f"{config.data.path}: {account.kept:,} {unit}, but data.heldout keeps {config.data.heldout:,} of them out of "
            "training; lower data.heldout"
        )
    if account.kind == "unpaired" and account.desirable in (0, account.kept):
        label = "true" if account.desirable else "false"
        raise DataError(
            f"{config.data.path}: all {account.kept:,} examples have the label {label}; dpo.loss={config.dpo.loss.type} learns from both "
            "kinds, so add examples with the other label"
        )


def describe_counts(counts: dict[str, Any]) -> str:
    """`kept 2,303 of 2,312 pairs (…); 2,175 to train on, 128 held out; 31 prompts and 12 completions truncated`."""
    line = f"{counts['summary']}; {counts['kept']:,} to train on, {counts['heldout']:,} held out"
    prompts, completions = counts["prompts_truncated"], counts["completions_truncated"]
    line += f"; {prompts:,} prompts and {completions:,} completions truncated" if prompts or completions else ""
    thoughts = counts.get("unfinished_thoughts")
    return line + (f"; {thoughts:,} thoughts cut before their answer" if thoughts else "")
