"""One offline DPO round: preference pairs that exist already, the same trainer, no sampling."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from iterdpo.config import OfflineConfig
from iterdpo.data.pairs import hold_out, write_card, write_tables
from iterdpo.data.preferences import PreferenceData
from iterdpo.data.prompts import source_digest
from iterdpo.data.rendering import load_tokenizer
from iterdpo.errors import ConfigError, DataError
from iterdpo.experiment import Policy
from iterdpo.report.metrics import round_metrics
from iterdpo.run.checkpoints import check_checkpoint, resolve_checkpoint
from iterdpo.run.devices import reserved_gpus
from iterdpo.run.progress import Progress
from iterdpo.run.rundir import Manifest, RunDir, directory_digest, read_manifest
from iterdpo.seeds import derive_seed
from iterdpo.stages import train_on_pairs
from iterdpo.training.launch import check_training
from iterdpo.types import RoundRecord

PART_OF_KEY = {"format", "limit", "heldout", "max_prompt_tokens", "max_completion_tokens"}


def train_round(config: OfflineConfig, *, progress: Progress, redo: bool = False) -> bool:
    """Read the pairs, train the policy on them, and record the round. Returns whether there was anything to do.

    Raises:
        UserError: bad input, found before the model is loaded; or another process works in the run directory.
        ChildFailed: training ended with an error. Its last checkpoint stays.
    """
    run = RunDir(config.run_dir, redo=redo)
    with run.lock(), ExitStack() as gpus:
        run.refresh()
        check_training(config.dpo)
        path = resolve_checkpoint(config.model.path, revision=config.model.revision)
        check_checkpoint(path, trust_remote_code=config.model.trust_remote_code)
        policy = Policy(path, directory_digest(path), 0)
        pairs = prepare_pairs(config, run, policy, progress)
        progress.say(f"  {'pairs':<9} {describe_counts(pairs.counts)}")
        if pairs.counts["kind"] == "unpaired" and config.dpo.loss.type != "kto":
            raise ConfigError(
                f"{config.data.path}: unpaired data, and dpo.loss = {config.dpo.loss.type!r} compares pairs; set dpo.loss=kto"
            )
        run.write_config(config.model_dump())
        before = read_manifest(run.round_dir(1) / "policy")
        trained = train_on_pairs(
            run,
            1,
            policy=policy,
            reference=policy,
            initial=policy,
            dpo=config.dpo,
            seed=derive_seed(config.seed, 1, "train"),
            trust_remote_code=config.model.trust_remote_code,
            progress=progress,
            reserved=lambda: gpus.enter_context(reserved_gpus(config.dpo.processes, say=progress.say)),
        )
        metrics = round_metrics(run, 1) | {"gate/decision": "promote", "gate/reason": "an offline round has no gate"}
        record = RoundRecord(1, "promote", metrics["gate/reason"], "round-001/policy", 1, trained.digest, {}, metrics)
        if run.record(1) != record:
            run.write_record(record)
        return before is None or before.digest != trained.digest


def prepare_pairs(
    config: OfflineConfig, run: RunDir, policy: Policy, progress: Progress, *, processes: int | None = None
) -> Manifest:
    """The pairs of the data as token ids, on disk; what was left out, and why, is in the manifest's counts.

    Where they are there, the data's bytes are hashed, and no row is read. `processes`: those that tokenize.
    """
    data = config.data
    settings = data.model_dump(include=PART_OF_KEY)
    content = source_digest(data.path, data.split)
    inputs = {"model": policy.digest, "data": {**settings, "content": content}, "seed": config.seed}
    step = run.step(1, "pairs", inputs)
    if (done := step.manifest()) is not None:
        return done
    preferences = PreferenceData(data.path, data.split, data.format, data.limit)
    account = preferences.account
    tokenizer = load_tokenizer(policy.path, trust_remote_code=config.model.trust_remote_code)
    # What an attempt left behind, such as one on data that have been mended since, is of no use to this one.
    shutil.rmtree(step.partial, ignore_errors=True)
    directory = step.begin()
    unit = "pairs" if account.kind == "pairs" else "examples"
    with progress.stage("tokenize", data.limit or 0, unit) as stage:

        def tables() -> Iterator[Any]:
            for table in preferences.tokenized(
                tokenizer,
                max_prompt_tokens=data.max_prompt_tokens,
                max_completion_tokens=data.max_completion_tokens,
                processes=processes,
            ):
                stage.to(account.rows)
                yield table

        write_tables(directory / ".all.parquet", tables())
    if account.kept <= data.heldout:
        raise DataError(
            f"{data.path}: {account.kept:,} {unit}, and data.heldout keeps {data.heldout:,} of them from training; "
            "lower data.heldout"
        )
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
            "summary": account.summary(),
            "left_out": account.left_out,
        }
    )


def describe_counts(counts: dict[str, Any]) -> str:
    """`kept 2,303 of 2,312 pairs (…); 2,175 to train on, 128 held out; 31 prompts and 12 completions truncated`."""
    line = f"{counts['summary']}; {counts['kept']:,} to train on, {counts['heldout']:,} held out"
    if counts["prompts_truncated"] or counts["completions_truncated"]:
        line += (
            f"; {counts['prompts_truncated']:,} prompts and {counts['completions_truncated']:,} completions truncated"
        )
    return line
