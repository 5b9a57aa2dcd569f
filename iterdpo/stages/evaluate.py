"""How a candidate does on the held-out prompts: win rate, scores, KL to the initial policy."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from iterdpo.errors import ChildFailed, DataError
from iterdpo.evaluation.metrics import REFERENCES, Thoughts, at_temperature, evaluation_metrics
from iterdpo.evaluation.scores import Scores, logp_gap
from iterdpo.judging.judge import RunJudge
from iterdpo.judging.shards import NamedShard, completion_shards
from iterdpo.run.artifacts import (
    Evaluation,
    PolicyCheckpoint,
    read_answer_ids,
    read_groups,
    read_judgments,
    read_logprobs,
    read_texts,
    shard_name,
    write_completion_shard,
)
from iterdpo.run.progress import Stage
from iterdpo.run.rundir import Step, read_json, write_json
from iterdpo.seeds import derive_seed
from iterdpo.stages.benchmarks import benchmark
from iterdpo.stages.judge import judge_with_progress
from iterdpo.stages.runs import IterativeRun, batches
from iterdpo.stages.sample import parameters_of, prompts_key, sample_shards, sampling_key
from iterdpo.stats import Bootstrap, spending_confidence
from iterdpo.types import Completion, CompletionGroup, Prompt

Duels = list[list[Scores]]
"""For each prompt, one pair of scores (candidate's, baseline's) a completion."""

SCORED_AT_ONCE = 8192
"""Completions whose log-probabilities are computed in one go: sorted by length, so that little is padding."""


def evaluate(
    run: IterativeRun, round: int, candidate: PolicyCheckpoint, against: Mapping[str, Evaluation]
) -> Evaluation:
    """The candidate on the held-out prompts, compared with the evaluations in `against` (`initial`, `previous`) and references.

    Its benchmarks and further temperatures follow, if there are any. Raises ChildFailed if the engine does not sample from
    this policy.
    """
    against = {**against, **references(run)}
    step = run.dir.step(round, "evaluation", inputs(run, candidate, against))
    if (manifest := step.manifest()) is None:
        directory = step.begin()
        if round == 0:
            run.prompts.pin(0)
        manifest = step.finish(counts=_evaluate(run, round, directory, candidate, against))
    benchmark(run, round, candidate)
    evaluation = Evaluation(step.path, manifest.digest, round)
    _over_temperatures(run, round, candidate, {"initial": evaluation, **against})
    return evaluation


def references(run: IterativeRun) -> dict[str, Evaluation]:
    """What every round is compared with besides other rounds, completed and judged once.

    `reference`: the completions in `evaluation.reference_column`; `model`: those of the model in `evaluation.against`.

    Raises:
        DataError: a held-out prompt has no completion in the column, with its place in the data.
    """
    return {name: _compared_with(run, step) for name, step in reference_steps(run).items()}


def reference_steps(run: IterativeRun) -> dict[str, Step]:
    """The steps of `references`, by the same names."""
    column, other = run.config.evaluation.reference_column, run.compared_model
    key = {
        "model": run.initial.digest,  # its tokenizer
        "prompts": prompts_key(run, run.prompts.heldout),
        "judges": {judge.role: judge.key for judge in run.judges},
    }
    steps = {}
    if column is not None:
        steps["reference"] = run.dir.step(0, "references", key | {"column": column})
    if other is not None:
        sampling = {"sampling": sampling_key(run, *_sampling(run)), "seed": run.config.seed}
        steps["model"] = run.dir.step(0, "other_model", key | {"policy": other.digest} | sampling)
    return steps


def _compared_with(run: IterativeRun, step: Step) -> Evaluation:
    """One of `reference_steps`, made if it is not there."""
    if (manifest := step.manifest()) is None:
        directory, name = step.begin(), step.path.name
        completions = directory / "completions"
        run.prompts.pin(0)
        if name == "references":
            counts = _of_column(run, completions)
        else:
            assert run.compared_model is not None
            counts = _sampled(run, completions, name, run.compared_model, *_sampling(run))
        with run.turn_of(*run.judges):
            for judge in run.judges:
                judge.begin_stage()
                if not judge.load().comparative:
                    _score(run, name, judge, completions, directory, counts["completions"])
            run.release_judges()
        manifest = step.finish(counts={key: counts[key] for key in ("prompts", "completions")})
    return Evaluation(step.path, manifest.digest, 0)


def _of_column(run: IterativeRun, directory: Path) -> dict[str, int]:
    """Write the completions in the column; one a prompt."""
    directory.mkdir(exist_ok=True)
    rows = zip(run.prompts.heldout, run.pinned_ids(0), strict=True)
    for number, batch in enumerate(batches(rows, run.config.sampling.shard_size)):
        groups = [CompletionGroup(prompt, ids, [_reference(run, prompt)]) for prompt, ids in batch]
        write_completion_shard(directory / f"{shard_name(number)}.parquet", groups)
    total = len(run.prompts.heldout)
    return {"prompts": total, "completions": total}


def _reference(run: IterativeRun, prompt: Prompt) -> Completion:
    text = prompt.columns.get(column := str(run.config.evaluation.reference_column))
    if not isinstance(text, str):
        raise DataError(
            f"{run.place_of(prompt)}: its column {column!r}, which is evaluation.reference_column, has no text; write the "
            "reference completion there, or leave the prompt out"
        )
    ids = run.tokenizer(text, add_special_tokens=False).input_ids
    return Completion(text, [*ids, run.tokenizer.eos_token_id], [], "stop")


def inputs(run: IterativeRun, candidate: PolicyCheckpoint, against: Mapping[str, Evaluation]) -> dict[str, Any]:
    return {
        "model": run.initial.digest,
        "policy": candidate.digest,
        "prompts": prompts_key(run, run.prompts.heldout),
        "sampling": sampling_key(run, *_sampling(run)),
        "evaluation": run.config.evaluation.model_dump(
            exclude={"judge", "max_logp_gap", "every", "benchmarks", "against", "temperatures"}
        ),
        "judges": {judge.role: judge.key for judge in run.judges},
        "baselines": {name: baseline.digest for name, baseline in against.items()},
        "seed": run.config.seed,
    }


def _sampling(run: IterativeRun) -> tuple[int, float]:
    """Completions a prompt, and their temperature."""
    return run.config.evaluation.completions, run.config.evaluation_temperature


def _evaluate(
    run: IterativeRun, round: int, directory: Path, candidate: PolicyCheckpoint, against: Mapping[str, Evaluation]
) -> dict[str, int]:
    section, completions = run.config.evaluation, directory / "completions"
    counts = _sampled(run, completions, "evaluate", candidate, *_sampling(run))
    judged = _judged_against(run, directory, counts["completions"], against)
    logps = _sequence_logps(run, directory / "logps.json", candidate, completions, counts["completions"])
    gap = None
    if logps is not None:
        reported = (c.logprobs for g in read_groups(completions) for c in g.completions if c.token_ids)
        gap = logp_gap(reported, (value for group in logps["policy"] for value in group))
    if gap is not None and gap > section.max_logp_gap:
        raise ChildFailed(
            f"the engine's log-probabilities differ from the policy's by {gap:.3f} nats per token on average (allowed: "
            f"evaluation.max_logp_gap = {section.max_logp_gap:g}): it does not sample from this policy, or its precision "
            "is too low"
        )
    metrics = _measured(run, round, completions, counts, judged, logps, against)
    write_json(directory / "metrics.json", metrics | {"sampler/logp_gap": gap})
    return {"prompts": counts["prompts"], "completions": counts["completions"]}


def _over_temperatures(
    run: IterativeRun, round: int, policy: PolicyCheckpoint, against: Mapping[str, Evaluation]
) -> None:
    """The policy at further temperatures, in the step `temperatures`; see `temperature_steps`."""
    for step in temperature_steps(run, round, policy, against):
        if step.manifest() is None:
            directory, total = step.begin(), 0
            metrics: dict[str, Any] = {}
            against = _same_at_every_round(against)
            for temperature in run.config.further_temperatures:
                place, n = directory / f"{temperature:g}", run.config.evaluation.completions_at(temperature)
                counts = _sampled(run, place / "completions", f"at {temperature:g}", policy, n, temperature)
                judged = _judged_against(run, place, counts["completions"], against)
                found = _measured(run, round, place / "completions", counts, judged, None, against)
                metrics |= {key: found[name] for key, name in at_temperature(temperature).items() if name in found}
                total += counts["completions"]
            write_json(directory / "metrics.json", metrics)
            step.finish(counts={"prompts": len(run.prompts.heldout), "completions": total})


def temperature_steps(
    run: IterativeRun, round: int, policy: PolicyCheckpoint, against: Mapping[str, Evaluation]
) -> Iterator[Step]:
    """The step of further temperatures, if the round has it.

    Of the evaluations in `against`, the policy is compared with that of the initial policy, whose completions stay at the
    evaluation's own temperature, and with the references.
    """
    if further := run.config.further_temperatures:
        key = inputs(run, policy, _same_at_every_round(against))
        key["evaluation"]["temperatures"] = further
        yield run.dir.step(round, "temperatures", key)


def _same_at_every_round(against: Mapping[str, Evaluation]) -> dict[str, Evaluation]:
    return {name: against[name] for name in ("initial", *REFERENCES) if name in against}


class Judged(NamedTuple):
    """What the judges said of completions, by the judge's role; `duels` also by the name of what they were against."""

    scores: dict[str, list[Scores]]
    duels: dict[str, dict[str, Duels]]


def _judged_against(run: IterativeRun, directory: Path, total: int, against: Mapping[str, Evaluation]) -> Judged:
    """The scores of the completions in `directory`, or their duels with those in `against`."""
    completions = directory / "completions"
    scores: dict[str, list[Scores]] = {}
    duels: dict[str, dict[str, Duels]] = {}
    with run.turn_of(*run.judges):
        for judge in run.judges:
            judge.begin_stage()
            if judge.load().comparative:
                target = directory / "judgments" / judge.role
                duels[judge.role] = {n: _duels(run, judge, completions, b, target, n) for n, b in against.items()}
                continue
            scores[judge.role] = _score(run, "score", judge, completions, directory, total)
        run.release_judges()
    return Judged(scores, duels)


def _measured(
    run: IterativeRun,
    round: int,
    completions: Path,
    counts: Mapping[str, int],
    judged: Judged,
    logps: dict[str, list[list[float]]] | None,
    against: Mapping[str, Evaluation],
) -> dict[str, Any]:
    """The metrics of completions as they were judged."""
    section = run.config.evaluation
    seed, confidence = derive_seed(run.config.seed, "bootstrap"), section.confidence
    if section.looks == "spending" and round:
        confidence = spending_confidence(confidence, round)
    return evaluation_metrics(
        lambda: read_answer_ids(completions),
        judged.scores,
        {name: {r: _scores(path) for r, path in b.judgments().items()} for name, b in against.items()},
        judged.duels,
        logps,
        prompts=counts["prompts"],
        truncated=counts["truncated"],
        texts=read_texts(completions),
        lengths={
            "policy": _lengths(completions, counts["prompts"]),
            **{name: _lengths(b.completions, counts["prompts"]) for name, b in against.items()},
        },
        entropy=_entropy(completions),
        thoughts=None
        if run.tags is None
        else Thoughts(
            counts["reasoning_tokens"],
            _unfinished(completions),
            {name: _unfinished(b.completions) for name, b in against.items()},
        ),
        with_self_bleu=section.self_bleu,
        bootstrap=Bootstrap(confidence=confidence, samples=section.bootstrap_samples, seed=seed),
    )


def _sampled(
    run: IterativeRun, completions: Path, name: str, policy: PolicyCheckpoint, n: int, temperature: float
) -> dict[str, int]:
    """Sample the completions of the held-out prompts, and count them."""
    completions.mkdir(parents=True, exist_ok=True)
    return sample_shards(
        run,
        completions,
        name,
        policy,
        run.prompts.heldout,
        run.pinned_ids(0),
        parameters_of(run, n, temperature),
        # The same seeds every round: what differs between rounds is the policy, not the luck of the draw.
        lambda prompt_id: derive_seed(run.config.seed, "evaluate", prompt_id),
    )


def _score(
    run: IterativeRun, name: str, judge: RunJudge, completions: Path, directory: Path, total: int
) -> list[Scores]:
    """The judge's scores of the completions of each prompt, which are also written down."""
    target = directory / "judgments" / judge.role
    target.mkdir(parents=True, exist_ok=True)
    judge_with_progress(run, name, judge, completion_shards(completions), target, total=total)
    return _scores(target)


def _lengths(completions: Path, prompts: int) -> list[float]:
    """The mean tokens of each prompt's answers. Every prompt has as many."""
    lengths = [len(ids) for ids in read_answer_ids(completions)]
    each = len(lengths) // prompts
    return [sum(of_prompt) / each for of_prompt in batches(lengths, each)]


def _entropy(completions: Path) -> float | None:
    """The mean of -log policy of every sampled token, by the engine, in nats."""
    total, tokens = 0.0, 0
    for logprobs in read_logprobs(completions):
        total, tokens = total + sum(logprobs), tokens + len(logprobs)
    return -total / tokens if tokens else None


def _scores(directory: Path) -> list[Scores]:
    return [judgment.scores for judgment in read_judgments(directory)]


def _unfinished(completions: Path) -> list[list[bool]]:
    """Of each prompt's completions, whether they are thoughts without an end."""
    return [[c.unfinished for c in group.completions] for group in read_groups(completions, arrays=True)]


def _duels(
    run: IterativeRun, judge: RunJudge, candidates: Path, baseline: Evaluation, directory: Path, name: str
) -> Duels:
    """The candidate's completions against their counterparts of the baseline, as the judge sees them.

    Without a call, equal texts tie, and an answer wins against a thought without an end.
    """
    # the same for two baselines that are one
    target = directory / (f"vs-round-{baseline.round:03d}" if baseline.path.name == "evaluation" else f"vs-{name}")
    target.mkdir(parents=True, exist_ok=True)

    def opponents() -> Iterator[list[CompletionGroup]]:
        return map(judge.shown, _opponents(candidates, baseline.completions))

    def differing() -> Iterator[CompletionGroup]:
        return (pair for group in opponents() for pair in group if _settled(pair) is None)

    asked = batches(differing(), run.config.sampling.shard_size)
    shards: Iterable[NamedShard] = ((shard_name(number), some) for number, some in enumerate(asked))
    judge_with_progress(run, "compare", judge, shards, target, total=2 * sum(1 for _ in differing()))
    judged = read_judgments(target)
    return [[_settled(pair) or next(judged).scores for pair in group] for group in opponents()]


def _opponents(candidates: Path, baselines: Path) -> Iterator[list[CompletionGroup]]:
    """For each prompt, a group of two for each completion: the candidate's and its counterpart, or the one reference.

    A greedy completion, of which there is one, has the first as its counterpart.
    """
    for ours, theirs in zip(read_groups(candidates), read_groups(baselines), strict=True):
        count, alone = len(ours.completions), len(theirs.completions) == 1
        others = theirs.completions * count if alone else theirs.completions[: 1 if count == 1 else None]
        pairs = zip(ours.completions, others, strict=True)
        yield [CompletionGroup(ours.prompt, ours.prompt_ids, [a, b]) for a, b in pairs]


def _settled(pair: CompletionGroup) -> Scores | None:
    """The scores of two completions that no judge need compare; None if one must."""
    ours, theirs = pair.completions
    if ours.unfinished != theirs.unfinished:
        return [0.0, 1.0] if ours.unfinished else [1.0, 0.0]
    return [0.5, 0.5] if ours.unfinished or ours.text == theirs.text else None


def _sequence_logps(
    run: IterativeRun, note: Path, policy: PolicyCheckpoint, completions: Path, total: int
) -> dict[str, list[list[float]]] | None:
    """Sums of log policy(y|x) and log initial(y|x) of every completion, by prompt; None if the two are one."""
    if policy.digest == run.initial.digest:
        return None
    if note.exists():
        return dict(read_json(note))
    logps = {}
    with run.devices.turn(), run.progress.stage("kl", 2 * total, "completions") as stage:
        for name, which in (("policy", policy), ("initial", run.initial)):
            flat = _logps(run, which, completions, stage)
            by_prompt = [[next(flat) for c in g.completions if c.token_ids] for g in read_groups(completions)]
            flat.close()
            logps[name] = [group for group in by_prompt if group]
    write_json(note, logps, record=note.parent)
    return logps


def _logps(run: IterativeRun, policy: PolicyCheckpoint, completions: Path, stage: Stage) -> Generator[float]:
    """Log policy(y|x) of each completion that has tokens, in order, in nats."""
    from iterdpo.training.logps import score_completions
    from iterdpo.training.models import free_memory, load_policy

    rows = ((g.prompt_ids, c.token_ids) for g in read_groups(completions) for c in g.completions if c.token_ids)
    run.check(policy)
    model = load_policy(policy.path, trust_remote_code=run.config.model.trust_remote_code)
    try:
        for batch in batches(rows, SCORED_AT_ONCE):

            def on_progress(scored: int, before: int = stage.done) -> None:
                stage.to(before + scored)

            precision = run.config.dpo.precision
            yield from score_completions(model, *zip(*batch, strict=True), precision=precision, on_progress=on_progress)
    finally:  # the sampler and the trainer need the device's memory
        del model
        free_memory()
