"""The stages of a round as plain functions: each finds its step done on disk, or does it.

    sample     y_1..y_K ~ pi_t(.|x)           judge      a score for each y, or an abstention
    pair       (x, y_w, y_l)                  train      pi_{t+1} <- DPO(pi_t)
    evaluate   the candidate, on held-out x   gate       promote, keep or stop

They need no Prefect. They take an `Experiment` and small records, and return the manifest of the step.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from iterdpo.config import DPOConfig
from iterdpo.data.pairing import build_pairs
from iterdpo.data.pairs import HELDOUT, TRAIN, write_pairs
from iterdpo.errors import ChildFailed, DataError, StaleStepError
from iterdpo.evaluate import Scores, evaluation_metrics, logp_gap
from iterdpo.experiment import Experiment, Pending, Policy, named_prompts
from iterdpo.gate import decide
from iterdpo.judging.judge import JudgeBase, NamedJudge
from iterdpo.judging.shards import RETRY, EarlyJudge, group_shards, judge_key, judge_shards, read_groups, read_judgments
from iterdpo.judging.stats import AbstentionCounts, JudgeMetrics, printable
from iterdpo.report.metrics import round_metrics
from iterdpo.run.progress import Progress
from iterdpo.run.rundir import (
    Manifest,
    RunDir,
    Step,
    differing_keys,
    digest,
    read_json,
    read_jsonl,
    read_manifest,
    write_json,
    write_jsonl,
    write_text,
)
from iterdpo.sampling import SamplingParameters
from iterdpo.seeds import derive_seed
from iterdpo.training.launch import OPTIMIZER_STATE, TRAIN_LOG, ReferenceInputs, TrainSpec, launch_training
from iterdpo.types import CompletionGroup, Judgment, Prompt, RoundRecord

# Settings that change how fast or in how much memory a step runs, never what it computes.
DPO_WITHOUT_EFFECT = {
    "tokens_per_micro_batch",
    "shared_prompts",
    "gradient_checkpointing",
    "activation_offload",
    "checkpoint_every",
    "processes",
    "accelerate_config",
    "trackers",
    "tracker_project",
    "sentinels",
}


def sample(exp: Experiment, round: int, policy: Policy) -> Manifest:
    """K completions of each of the round's prompts, by `policy`."""
    prompts = exp.round_prompts(round)
    inputs = {
        "model": exp.initial.digest,
        "policy": policy.digest,
        "prompts": _prompts_key(exp, prompts),
        "sampling": _sampling_key(exp, exp.config.sampling.n, exp.config.sampling.temperature),
        "seed": exp.config.seed,
    }
    step = exp.run.step(round, "completions", inputs)
    if (done := _done(exp, step)) is not None:
        return done
    directory = step.begin()
    exp.pin_prompts(round)
    seeds = [derive_seed(exp.config.seed, round, "sample", p.id) for p in prompts]
    parameters = _parameters(exp, exp.config.sampling.n, exp.config.sampling.temperature)
    early = _early_judge(exp, round)
    groups = _sample_shards(
        exp, directory, "sample", policy, prompts, seeds, parameters, on_shard=early.put if early else None
    )
    return step.finish(
        counts={
            "prompts": len(groups),
            "completions": sum(len(g.completions) for g in groups),
            "tokens": sum(len(c.token_ids) for g in groups for c in g.completions),
            "truncated": sum(c.truncated for g in groups for c in g.completions),
        }
    )


def judge(exp: Experiment, round: int) -> Manifest:
    """The training judge's scores of the round's completions."""
    named = exp.judges[0]
    completions = _finished(exp.run, round, "completions")
    inputs = {"judge": judge_key(named), "completions": completions.digest}
    step = exp.run.step(round, "judgments", inputs)
    if (done := _done(exp, step)) is not None:
        return done
    directory = step.begin()
    streamed = 0.0
    if round in exp.early:
        streamed = exp.early.pop(round).join()
    else:
        exp.begin_stage(named)
    early = _early_directory(exp, round)
    source = exp.run.round_dir(round) / "completions"
    judgments = _judge(
        exp, "judge", named, group_shards(source), directory, total=completions.counts["completions"], early=early
    )
    usage = exp.used(named)
    exp.release_judges()
    shutil.rmtree(early, ignore_errors=True)
    metrics = JudgeMetrics().add(read_groups(source), judgments).result()
    return step.finish(
        counts={**AbstentionCounts().add(judgments).result(), "metrics": metrics, "usage": usage},
        seconds={"streamed": streamed},
    )


def retry_judgments(exp: Experiment, round: int) -> tuple[Manifest, Manifest]:
    """Judge again what abstained in the finished judgments of `round`. Returns the manifests before and after.

    The old judgments are kept in the attic. What was made from them is now outdated, and refused until `--redo`.

    Raises:
        StaleStepError: they were made by another judge.
    """
    before = _finished(exp.run, round, "judgments")
    inputs = {"judge": judge_key(exp.judges[0]), "completions": before.inputs["completions"]}
    directory = exp.run.step(round, "judgments", inputs).reopen(keep=exp.run.attic)
    write_text(directory / RETRY, "")
    return before, judge(exp, round)


def pair(exp: Experiment, round: int) -> Manifest:
    """Preference pairs from the round's completions and judgments."""
    judgments = _finished(exp.run, round, "judgments")
    settings = exp.config.pairing.model_dump()
    inputs = {"pairing": settings, "judgments": judgments.digest, "completions": judgments.inputs["completions"]}
    step = exp.run.step(round, "pairs", {**inputs, "seed": exp.config.seed})
    if (done := _done(exp, step)) is not None:
        return done
    directory = step.begin()
    with exp.progress.stage("pair", 0, "pairs") as stage:
        groups = read_groups(exp.run.round_dir(round) / "completions")
        seed = derive_seed(exp.config.seed, round, "pair")
        pairs, counts = build_pairs(
            groups, read_judgments(exp.run.round_dir(round) / "judgments"), **settings, seed=seed
        )
        stage.to(len(pairs))
        stage.remark = counts.summary()
        if not pairs:
            flips = judgments.counts["metrics"].get("flip_rate")
            order = f", whose verdict changed with the order in {flips:.0%} of the comparisons," if flips else ""
            raise DataError(
                f"round {round}: {counts.summary()}: nothing to train on. Where completions tie, check the judge"
                f"{order} or pairing.min_margin, or sample more "
                "completions a prompt (sampling.n, with --redo); where none was judged, see the abstentions in "
                f"{exp.run.round_dir(round) / 'judgments'}"
            )
        write_pairs(directory, pairs, summary=counts.summary())
    return step.finish(counts=counts.to_json())


def train(exp: Experiment, round: int, policy: Policy) -> Manifest:
    """The candidate: `policy` after one DPO round on the round's pairs."""
    dpo = exp.config.dpo
    reference = reference_policy(exp, round, policy)
    return train_on_pairs(
        exp.run,
        round,
        policy=policy,
        reference=reference,
        initial=exp.initial,
        dpo=dpo,
        seed=derive_seed(exp.config.seed, round, "train"),
        trust_remote_code=exp.config.model.trust_remote_code,
        progress=exp.progress,
        exp=exp,
        reserved=lambda: exp.reserved,
    )


def reference_policy(exp: Experiment, round: int, policy: Policy) -> Policy:
    """What the round's DPO loss is regularised towards, as `dpo.reference` says; for `ema` it is made here."""
    dpo = exp.config.dpo
    match dpo.reference:
        case "initial":
            return exp.initial
        case "periodic":
            renewed = round - (round - 1) % dpo.reference_every
            return exp.policy_after(renewed - 1)
        case "ema":
            return _average(exp, round, policy)
    return policy


def _average(exp: Experiment, round: int, policy: Policy) -> Policy:
    """EMA_1 = pi_1, EMA_t = decay EMA_{t-1} + (1 - decay) pi_t, over the weights of the policies rounds started from."""
    if round == 1:
        return policy
    before = _average(exp, round - 1, exp.policy_after(round - 2))
    if before.digest == policy.digest:
        return policy
    decay = exp.config.dpo.reference_decay
    step = exp.run.step(round, "ema", {"before": before.digest, "policy": policy.digest, "decay": decay})
    if (manifest := _done(exp, step)) is None:
        from iterdpo.training.models import average_checkpoints

        with exp.progress.stage("average", 1, "checkpoint") as stage:
            average_checkpoints(before.path, policy.path, decay=decay, output=step.begin())
            stage.to(1)
        manifest = step.finish()
    return Policy(step.path, manifest.digest, round)


def train_on_pairs(
    run: RunDir,
    round: int,
    *,
    policy: Policy,
    reference: Policy,
    initial: Policy,
    dpo: DPOConfig,
    seed: int,
    trust_remote_code: bool,
    progress: Progress,
    reserved: Callable[[], Sequence[int]],
    exp: Experiment | None = None,
) -> Manifest:
    """The policy step of a round whose pairs are on disk, however they were made."""
    pairs = _finished(run, round, "pairs")
    inputs = {
        "model": initial.digest,
        "policy": policy.digest,
        "dpo": dpo.model_dump(exclude=DPO_WITHOUT_EFFECT),
        "reference": reference.digest,
        "pairs": pairs.digest,
        "seed": seed,
    }
    step = run.step(round, "policy", inputs)
    if (done := _done(exp, step)) is not None:
        return done
    directory = step.begin()
    source = run.round_dir(round) / "pairs"
    carried = Path(policy.path) / OPTIMIZER_STATE
    spec = TrainSpec(
        name=run.round_dir(round).name,
        policy=policy.path,
        reference=None if reference.digest == policy.digest else reference.path,
        pairs=source / TRAIN,
        eval_pairs=source / HELDOUT if (source / HELDOUT).exists() else None,
        output=directory,
        reference_output=run.round_dir(round) / "reference",
        attic=run.attic if run.redo else None,
        reference_inputs=ReferenceInputs(
            reference=reference.digest,
            pairs=pairs.digest,
            precision=dpo.precision,
            adapter=dpo.adapter is not None and dpo.adapter.quantize,
            sampler_logps_tolerance=dpo.sampler_logps_tolerance,
            mismatched=seed if dpo.loss.type == "kto" else None,
        ),
        dpo=dpo,
        seed=seed,
        trust_remote_code=trust_remote_code,
        pairs_cache=run.round_dir(round) / "pairs.cache",
        tracker_dir=run.root / "trackers" / run.round_dir(round).name,
        optimizer=carried if dpo.optimizer_state == "carry" and carried.exists() else None,
    )
    total = pairs.counts["kept"] * dpo.epochs
    log = directory / TRAIN_LOG
    rows, earlier = itertools.count(), log.read_text().count("\n") if log.exists() else 0
    with progress.stage("train", total, "pairs") as stage:

        def on_step(row: dict[str, Any]) -> None:
            stage.to(min(total, row["step"] * dpo.pairs_per_step))
            if next(rows) == earlier:
                stage.begin()
            margin = f", margin {row['rewards/margins']:.3f}" if "rewards/margins" in row else ""
            stage.remark = f"loss {row['loss']:.3f}{margin}" if "loss" in row else "a step that was not finite: skipped"
            for alarm in row.get("alarms", []):
                progress.say(f"  {'alarm':<9} step {row['step']}: {alarm}")

        launch_training(
            spec, spec_path=directory / "train.json", log=run.log_path("train"), on_step=on_step, reserved=reserved()
        )
    return step.finish(counts={"pairs": pairs.counts["kept"]}, logs=[TRAIN_LOG, "train.json"])


def evaluate(exp: Experiment, round: int, policy: Policy, previous: int | None) -> Manifest:
    """How the candidate does on the held-out prompts. `previous` is the round of the policy that it started from."""
    config, prompts = exp.config.evaluation, exp.prompts.heldout
    temperature = exp.config.sampling.temperature if config.temperature is None else config.temperature
    n = 1 if temperature == 0 else config.n
    baselines = {} if previous is None else {"initial": 0, "previous": previous}
    inputs = {
        "model": exp.initial.digest,
        "policy": policy.digest,
        "prompts": _prompts_key(exp, prompts),
        "sampling": _sampling_key(exp, n, temperature),
        "evaluation": config.model_dump(exclude={"judge", "max_logp_gap"}),
        "judges": {named.role: judge_key(named) for named in exp.judges},
        "baselines": {name: _finished(exp.run, r, "evaluation").digest for name, r in baselines.items()},
        "seed": exp.config.seed,
    }
    step = exp.run.step(round, "evaluation", inputs)
    if (done := _done(exp, step)) is not None:
        return done
    directory = step.begin()
    if round == 0:
        exp.pin_prompts(0)
    # The same seeds every round: what differs between rounds is the policy, not the luck of the draw.
    seeds = [derive_seed(exp.config.seed, "evaluate", p.id) for p in prompts]
    groups = _sample_shards(
        exp,
        _subdirectory(directory, "completions"),
        "evaluate",
        policy,
        prompts,
        seeds,
        _parameters(exp, n, temperature),
    )
    scores: dict[str, list[Scores]] = {}
    duels: dict[str, dict[str, list[list[Scores]]]] = {}
    for named in exp.judges:
        target = _subdirectory(directory, "judgments", named.role)
        exp.begin_stage(named)
        if exp.judge(named).comparative:
            duels[named.role] = {name: _duels(exp, named, groups, r, target) for name, r in baselines.items()}
            continue
        judged = group_shards(directory / "completions")
        total = sum(len(g.completions) for g in groups)
        scores[named.role] = [j.scores for j in _judge(exp, "score", named, judged, target, total=total)]
    exp.release_judges()
    logps = _sequence_logps(exp, directory / "logps.json", policy, groups)
    gap = _checked_gap(groups, logps, limit=config.max_logp_gap)
    metrics = evaluation_metrics(
        groups,
        scores,
        {name: _evaluation_scores(exp.run, r) for name, r in baselines.items()},
        duels,
        logps,
        bootstrap={
            "confidence": config.confidence,
            "samples": config.bootstrap_samples,
            "seed": derive_seed(exp.config.seed, "bootstrap"),
        },
    )
    write_json(directory / "metrics.json", metrics | {"sampler/logp_gap": gap})
    return step.finish(counts={"prompts": len(groups), "completions": sum(len(g.completions) for g in groups)})


def gate(exp: Experiment, round: int, candidate: Policy, previous: Policy | None) -> RoundRecord:
    """Seal the round: its metrics, and whether its candidate or the policy before is the next round's start."""
    settings = exp.config.gate.model_dump()
    known = exp.run.record(round)
    if (
        known is not None
        and not exp.run.redo
        and (differing := differing_keys({"gate": known.gate}, {"gate": settings}))
    ):
        raise StaleStepError(f"round {round}", differing)
    metrics = round_metrics(exp.run, round)
    if previous is None:
        action, reason = "promote", "the initial policy"
        kept = candidate
    else:
        action, reason = decide(metrics, **settings)
        kept = candidate if action == "promote" else previous
    metrics |= {"gate/decision": action, "gate/reason": reason}
    path = kept.path
    if path.is_relative_to(exp.run.root):
        path = path.relative_to(exp.run.root)
    record = RoundRecord(round, action, reason, str(path), kept.round, kept.digest, settings, metrics)  # type: ignore[arg-type]
    if known != record:
        if exp.looking:
            raise Pending(f"{exp.run.round_dir(round).name}/round.json")
        exp.run.write_record(record)
    return record


def _done(exp: Experiment | None, step: Step) -> Manifest | None:
    if exp is None or not exp.looking:
        return step.manifest()
    differing = step.differences()
    if differing and not exp.run.redo:
        raise StaleStepError(step.name, differing)
    manifest = None if differing else read_manifest(step.path)
    if manifest is None:
        raise Pending(step.name)
    return manifest


def _finished(run: RunDir, round: int, name: str) -> Manifest:
    manifest = read_manifest(run.round_dir(round) / name)
    assert manifest is not None, f"round {round}: {name} comes first"
    return manifest


def _sample_shards(
    exp: Experiment,
    directory: Path,
    name: str,
    policy: Policy,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    parameters: SamplingParameters,
    *,
    on_shard: Callable[[list[CompletionGroup]], None] | None = None,
) -> list[CompletionGroup]:
    """Sample what is missing, shard by shard, each durable before the next begins. Returns all groups."""
    size = exp.config.sampling.shard_size
    groups: list[CompletionGroup] = []
    begun = False
    with exp.progress.stage(name, len(prompts) * parameters.n, "completions") as stage:
        for number, start in enumerate(range(0, len(prompts), size)):
            shard = directory / f"shard-{number:04d}.jsonl"
            if shard.exists():
                fresh = [CompletionGroup.from_json(row) for row in read_jsonl(shard)]
            else:
                asked = prompts[start : start + size]
                ids = [exp.prompt_ids(p) for p in asked]
                exp.sampler.load(policy.path, policy.digest)
                if not begun:
                    begun = True
                    stage.begin()
                sampled = exp.sampler.sample(ids, seeds[start : start + size], parameters)
                fresh = [CompletionGroup(*group) for group in zip(asked, ids, sampled, strict=True)]
                write_jsonl(shard, (g.to_json() for g in fresh))
            groups += fresh
            if on_shard is not None:
                on_shard(fresh)
            stage.to(sum(len(g.completions) for g in groups))
            if not begun:
                stage.begin()
        tokens = sum(len(c.token_ids) for g in groups for c in g.completions)
        stage.remark = f"{tokens / max(1, stage.done):.1f} tokens each"
    if "sampler" in exp.__dict__:
        exp.sampler.release()
    return groups


def _judge(
    exp: Experiment,
    name: str,
    named: NamedJudge,
    shards: Iterable[tuple[str, list[CompletionGroup]]],
    directory: Path,
    *,
    total: int,
    early: Path | None = None,
) -> list[Judgment]:
    """`judge_shards`, with its progress shown."""
    with exp.progress.stage(name, total, "completions") as stage:

        def load() -> JudgeBase:
            judge = exp.judge(named)
            stage.begin()
            return judge

        judgments = judge_shards(
            named,
            load,
            shards,
            directory,
            total=total,
            early=early,
            on_shard=lambda fresh: stage.advance(sum(len(j.scores) for j in fresh)),
        )
        scores = [s for j in judgments for s in j.scores if s is not None]
        unjudged = stage.done - len(scores)
        stage.remark = f"{named.use.rpartition('/')[2]}: "
        stage.remark += f"mean score {sum(scores) / len(scores):.3f}" if scores else "nothing judged"
        if unjudged:
            reason = next(iter(AbstentionCounts().add(judgments).result()["abstentions"]))
            stage.remark += f", {unjudged} abstentions ({printable(reason)[:80]})"
    return judgments


def _duels(
    exp: Experiment, named: NamedJudge, candidates: Sequence[CompletionGroup], baseline: int, directory: Path
) -> list[list[Scores]]:
    """The candidate's completions against those of round `baseline`, each with its opposite number, prompt by prompt.

    Returns for each prompt the scores of (candidate, baseline). Two that are alike tie, and nobody is asked.
    """
    opponents = read_groups(exp.run.round_dir(baseline) / "evaluation" / "completions")
    pairs = [
        CompletionGroup(ours.prompt, ours.prompt_ids, [a, b])
        for ours, theirs in zip(candidates, opponents, strict=True)
        for a, b in zip(ours.completions, theirs.completions, strict=True)
    ]
    asked = [p for p in pairs if p.completions[0].text != p.completions[1].text]
    size = exp.config.sampling.shard_size
    shards = ((f"shard-{n // size:04d}.jsonl", asked[n : n + size]) for n in range(0, len(asked), size))
    target = _subdirectory(directory, f"vs-round-{baseline:03d}")  # the same for two baselines that are one
    judged = iter(_judge(exp, "compare", named, shards, target, total=2 * len(asked)))
    scores = iter(
        [[0.5, 0.5] if p.completions[0].text == p.completions[1].text else next(judged).scores for p in pairs]
    )
    return [[next(scores) for _ in g.completions] for g in candidates]


def _early_directory(exp: Experiment, round: int) -> Path:
    return exp.run.round_dir(round) / "judgments.early"


def _early_judge(exp: Experiment, round: int) -> EarlyJudge | None:
    """Who judges a shard while the next is sampled; None where the judge may need the sampler's device."""
    named = exp.judges[0]
    if named.stream is False:
        return None
    judge = exp.judge(named)
    if named.stream is None and judge.needs_device:
        return None
    exp.begin_stage(named)
    exp.early[round] = EarlyJudge(named, judge, _early_directory(exp, round))
    return exp.early[round]


def _sequence_logps(
    exp: Experiment, note: Path, policy: Policy, groups: Sequence[CompletionGroup]
) -> dict[str, list[list[float]]] | None:
    """Sums of log policy(y|x) and log initial(y|x) of every completion, by prompt; None where the two are one."""
    if policy.digest == exp.initial.digest:
        return None
    if note.exists():
        return read_json(note)
    from iterdpo.training.logps import score_completions

    rows = [(g.prompt_ids, c.token_ids) for g in groups for c in g.completions if c.token_ids]
    logps = {}
    with exp.progress.stage("kl", 2 * len(rows), "completions") as stage:
        for number, (name, which) in enumerate((("policy", policy), ("initial", exp.initial))):
            flat = iter(
                score_completions(
                    which.path,
                    [prompt for prompt, _ in rows],
                    [completion for _, completion in rows],
                    precision=exp.config.dpo.precision,
                    trust_remote_code=exp.config.model.trust_remote_code,
                    on_progress=lambda done, number=number: stage.to(number * len(rows) + done),  # type: ignore[misc]
                )
            )
            logps[name] = [[next(flat) for c in g.completions if c.token_ids] for g in groups]
    logps = {name: [group for group in by_prompt if group] for name, by_prompt in logps.items()}
    write_json(note, logps)
    return logps


def _checked_gap(
    groups: Sequence[CompletionGroup], logps: dict[str, list[list[float]]] | None, *, limit: float
) -> float | None:
    """The engine's log-probabilities against the policy's (see `logp_gap`); None where they were not computed.

    Raises:
        ChildFailed: they differ so much that the engine does not sample from this policy.
    """
    if logps is None:
        return None
    reported = [c.logprobs for g in groups for c in g.completions if c.token_ids]
    gap = logp_gap(reported, [value for group in logps["policy"] for value in group])
    if gap is not None and gap > limit:
        raise ChildFailed(
            f"the engine's log-probabilities differ from the policy's by {gap:.3f} nats a token on average (allowed: "
            f"evaluation.max_logp_gap = {limit:g}): it does not sample from this policy, or its precision is too low"
        )
    return gap


def _evaluation_scores(run: RunDir, round: int) -> dict[str, list[Scores]]:
    directory = run.round_dir(round) / "evaluation" / "judgments"
    return {role.name: [j.scores for j in read_judgments(role)] for role in sorted(directory.glob("*"))}


def _prompts_key(exp: Experiment, prompts: Sequence[Prompt]) -> dict[str, Any]:
    section = exp.config.prompts
    return {
        "per_round": section.per_round,
        "heldout": section.heldout,
        "column": section.column,
        "content": digest(named_prompts(prompts)),
    }


def _sampling_key(exp: Experiment, n: int, temperature: float) -> dict[str, Any]:
    section = exp.config.sampling
    shared = section.model_dump(include={"top_p", "top_k", "max_tokens", "shard_size"})
    return {
        "n": n,
        "temperature": temperature,
        **shared,
        "engine": section.engine.model_dump(include={"dtype", "extra"}),
    }


def _parameters(exp: Experiment, n: int, temperature: float) -> SamplingParameters:
    section = exp.config.sampling
    return SamplingParameters(
        n=n, temperature=temperature, top_p=section.top_p, top_k=section.top_k, max_tokens=section.max_tokens
    )


def _subdirectory(directory: Path, *parts: str) -> Path:
    path = directory.joinpath(*parts)
    path.mkdir(parents=True, exist_ok=True)
    return path
