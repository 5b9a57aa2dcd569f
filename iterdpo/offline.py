"""One offline DPO round: preference pairs that exist already, the same trainer, no sampling."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from iterdpo.checkpoints import check_checkpoint, resolve_checkpoint
from iterdpo.config import OfflineConfig
from iterdpo.errors import DataError
from iterdpo.experiment import Policy
from iterdpo.launch import visible_gpus
from iterdpo.pairs import write_pairs
from iterdpo.preferences import read_preferences, tokenize_pairs
from iterdpo.progress import Progress
from iterdpo.rendering import load_tokenizer
from iterdpo.rundir import Manifest, RunDir, digest, directory_digest, read_manifest
from iterdpo.seeds import derive_seed
from iterdpo.stages import round_metrics, train_on_pairs
from iterdpo.supervise import reserve
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
        path = resolve_checkpoint(config.model.path, revision=config.model.revision)
        check_checkpoint(path, trust_remote_code=config.model.trust_remote_code)
        policy = Policy(path, directory_digest(path), 0)
        pairs = prepare_pairs(config, run, policy, progress)
        progress.say(f"  {'pairs':<9} {describe_counts(pairs.counts)}")
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
            reserved=lambda: gpus.enter_context(_reserved(config.dpo.processes)),
        )
        metrics = round_metrics(run, 1) | {"gate/decision": "promote", "gate/reason": "an offline round has no gate"}
        record = RoundRecord(1, "promote", metrics["gate/reason"], "round-001/policy", 1, trained.digest, {}, metrics)
        if run.record(1) != record:
            run.write_record(record)
        return before is None or before.digest != trained.digest


@contextmanager
def _reserved(count: int) -> Iterator[list[int]]:
    descriptors = reserve(visible_gpus()[:count])
    try:
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def prepare_pairs(config: OfflineConfig, run: RunDir, policy: Policy, progress: Progress) -> Manifest:
    """The pairs of the data as token ids, on disk; what was left out, and why, is in the manifest's counts."""
    data = read_preferences(config.data.path, config.data.split, config.data.format, config.data.limit)
    content = digest([[p.row, p.prompt.content, p.chosen, p.rejected] for p in data.pairs])
    settings = config.data.model_dump(include=PART_OF_KEY)
    inputs = {"model": policy.digest, "data": {**settings, "content": content}, "seed": config.seed}
    step = run.step(1, "pairs", inputs)
    if (done := step.manifest()) is not None:
        return done
    directory = step.begin()
    tokenizer = load_tokenizer(policy.path, trust_remote_code=config.model.trust_remote_code)
    with progress.stage("tokenize", len(data.pairs), "pairs") as stage:
        pairs, counts = tokenize_pairs(
            data,
            tokenizer,
            max_prompt_tokens=config.data.max_prompt_tokens,
            max_completion_tokens=config.data.max_completion_tokens,
        )
        stage.to(len(data.pairs))
    if len(pairs) <= config.data.heldout:
        raise DataError(
            f"{config.data.path}: {len(pairs):,} pairs, and data.heldout keeps {config.data.heldout:,} of them from "
            "training; lower data.heldout"
        )
    random.Random(derive_seed(config.seed, "heldout")).shuffle(pairs)
    heldout, training = pairs[: config.data.heldout], pairs[config.data.heldout :]
    summary = data.summary()
    write_pairs(directory, training, heldout=heldout, summary=summary)
    left_out = {reason: {"count": len(rows), "rows": rows[:1000]} for reason, rows in data.left_out.items()}
    return step.finish(
        counts={"kept": len(training), "heldout": len(heldout), "summary": summary, "left_out": left_out, **counts}
    )


def describe_counts(counts: dict[str, Any]) -> str:
    """`kept 2,303 of 2,312 pairs (…); 2,175 to train on, 128 held out; 31 prompts and 12 completions truncated`."""
    line = f"{counts['summary']}; {counts['kept']:,} to train on, {counts['heldout']:,} held out"
    if counts["prompts_truncated"] or counts["completions_truncated"]:
        line += (
            f"; {counts['prompts_truncated']:,} prompts and {counts['completions_truncated']:,} completions truncated"
        )
    if counts["identical_after_truncation"]:
        line += f"; {counts['identical_after_truncation']:,} left out: identical after truncation"
    return line
