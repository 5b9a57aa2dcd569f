"""Sampling: what decides a round's completions, what is sampled again, what a streaming judge is given."""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from iterdpo.data.prompts import PromptFile
from iterdpo.errors import StaleStepError
from iterdpo.report.metrics import round_metrics
from iterdpo.report.page import write_report
from iterdpo.run.artifacts import Completions, PolicyCheckpoint, shard_name
from iterdpo.run.rundir import read_manifest, write_json
from iterdpo.sampling.base import Batch, SamplingParameters
from iterdpo.seeds import derive_seed
from iterdpo.stages.judge import judge
from iterdpo.stages.runs import IterativeRun
from iterdpo.stages.sample import inputs as sample_inputs
from iterdpo.stages.sample import parameters_of, sample, temperature_of
from iterdpo.testing import CHATML, build_tiny_checkpoint
from iterdpo.types import Completion, CompletionGroup, Judgment
from tests.unit.stages.harness import PER_ROUND, SHARD_SIZE, K, Lengths, NotingSampler, Room

stage = importlib.import_module("iterdpo.stages.sample")  # `iterdpo.stages` may have the function by this name


def sampled(run: IterativeRun) -> Completions:
    return sample(run, 1, run.initial, run.prompts.of(1))


def inputs(run: IterativeRun, policy: PolicyCheckpoint, prompts: PromptFile) -> dict[str, Any]:
    return sample_inputs(run, policy, prompts)


def key(run: IterativeRun) -> dict[str, Any]:
    return inputs(run, run.initial, run.prompts.of(1))


def test_the_key_has_the_policies_the_prompts_the_sampling_and_the_seed(room: Room) -> None:
    run = room.open()
    assert key(run) == {
        "model": run.initial.digest,
        "policy": run.initial.digest,
        "prompts": {"per_round": 6, "heldout": 4, "column": "prompt", "content": run.prompts.of(1).digest()},
        "sampling": {
            "n": 2,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "max_tokens": 16,
            "shard_size": 4,
            "engine": {"dtype": "bfloat16", "extra": {}},
        },
        "seed": 0,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": {"n": 3}},
        {"sampling": {"temperature": 0.5}},
        {"sampling": {"top_p": 0.9}},
        {"sampling": {"top_k": 5}},
        {"sampling": {"max_tokens": 8}},
        {"sampling": {"shard_size": 2}},
        {"sampling": {"reproducible": True}},
        {"sampling": {"engine": {"dtype": "float32"}}},
        {"sampling": {"engine": {"extra": {"quantization": "fp8"}}}},
        {"prompts": {"per_round": 5}},
        {"prompts": {"heldout": 3}},
        {"seed": 1},
    ],
)
def test_the_key_changes_with_what_decides_the_completions(room: Room, changes: dict[str, Any]) -> None:
    assert key(room.open(**changes)) != key(room.open())


def test_the_key_changes_with_the_policy_and_the_prompts(room: Room) -> None:
    run = room.open()
    policy = type(run.initial)(run.initial.path, "another", 1)
    assert inputs(run, policy, run.prompts.of(1)) != inputs(run, run.initial, run.prompts.of(1))
    assert inputs(run, run.initial, run.prompts.of(2)) != inputs(run, run.initial, run.prompts.of(1))


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": {"engine": {"max_num_seqs": 2, "kv_cache_gib": 2, "gpu_memory_utilization": 0.5}}},
        {"version": "2"},
        {"dpo": {"learning_rate": 1e-3}},
        {"gate": {"minimum": 0.9}},
        {"evaluation": {"n": 2}},
        {"rounds": 3},
    ],
)
def test_the_key_is_the_same_if_the_completions_are(room: Room, changes: dict[str, Any]) -> None:
    assert key(room.open(**changes)) == key(room.open())


def test_completions_lie_in_shards_by_prompt_in_the_order_of_the_round(room: Room) -> None:
    run = room.open()
    completions = sampled(run)
    names = sorted(p.name for p in completions.path.glob("shard-*"))
    assert names == ["shard-000000.parquet", "shard-000001.parquet"]
    assert (completions.prompts, completions.completions) == (PER_ROUND, K * PER_ROUND)
    assert [g.prompt for g in completions] == list(run.prompts.of(1))
    assert [[c.text for c in g.completions] for g in completions] == [["ab", "abab"]] * PER_ROUND
    assert [g.prompt_ids for g in completions] == run.prompt_ids(list(run.prompts.of(1)))
    assert room.sampler.asked == [SHARD_SIZE, PER_ROUND - SHARD_SIZE]


def test_counts_are_of_all_that_was_sampled(room: Room) -> None:
    manifest = read_manifest(sampled(room.open(sampling={"max_tokens": 3})).path)
    assert manifest is not None
    counts = {"prompts": 6, "completions": 12, "tokens": 6 * (2 + 3), "truncated": 6}
    assert manifest.counts == {**counts, "left_out": {}}


def test_the_rows_that_gave_no_prompt_are_counted_by_reason(room: Room) -> None:
    with open(room.root / "prompts.jsonl", "a") as handle:
        handle.write('{"prompt": "Tale 0"}\n{"prompt": ""}\n{"prompt": null}\n{"prompt": " "}\n{"prompt"\n')
    run = room.open(prompts={"bad_rows": "skip"})
    sampled(run)
    reasons = {
        "repeated": 1,
        "have an empty prompt": 2,
        "have a prompt or completion that is neither text nor messages": 1,
        "are not valid JSON": 1,
    }
    metrics = round_metrics(run.dir, 1)
    assert metrics["prompts/left_out"] == 5
    assert {name: metrics[f"prompts/left_out/{name}"] for name in reasons} == reasons
    assert metrics["pairs/left_out"] is None
    run.dir.write_config(run.config.model_dump())
    page = write_report(run.dir.root).read_text()
    for reason, count in reasons.items():
        assert f">{count} {reason}</li>" in page


def test_prompts_of_the_round_are_written_down(room: Room) -> None:
    run = room.open()
    sampled(run)
    written = PromptFile.open(run.dir.round_dir(1) / "prompts.jsonl")
    assert [p.id for p in written] == [p.id for p in run.prompts.of(1)]


def test_what_is_sampled_is_not_sampled_again(room: Room) -> None:
    first = sampled(room.open())
    room.sampler.asked.clear()
    assert sampled(room.open()) == first
    assert room.sampler.asked == []


def test_other_settings_are_refused_and_with_redo_the_old_goes_to_the_attic(room: Room) -> None:
    first = sampled(room.open())
    with pytest.raises(StaleStepError, match=r"round-001/completions was made with sampling\.n = 2"):
        sampled(room.open(sampling={"n": 3}))
    run = room.open(sampling={"n": 3}, redo=True)
    again = sampled(run)
    assert again.completions == 3 * PER_ROUND
    kept = read_manifest(run.dir.attic / "round-001" / "completions")
    assert kept is not None
    assert kept.digest == first.digest


def test_a_shard_that_is_there_is_not_sampled_again(room: Room) -> None:
    reply = room.sampler.reply

    def fails(ids: list[int], k: int) -> str:
        if len(room.sampler.asked) == 2:
            raise RuntimeError("the engine died")
        return reply(ids, k)

    room.sampler.reply = fails
    with pytest.raises(RuntimeError, match="the engine died"):
        sampled(room.open())
    room.sampler.reply, room.sampler.asked = reply, []
    completions = sampled(room.open())
    assert room.sampler.asked == [PER_ROUND - SHARD_SIZE]
    assert [g.prompt for g in completions] == list(room.open().prompts.of(1))


class Ahead(NotingSampler):
    """Has three batches in flight. `closed`: it was told that no more are wanted."""

    closed = False

    def sample_batches(
        self, batches: Iterable[Batch], parameters: SamplingParameters
    ) -> Generator[list[list[Completion]]]:
        batches = iter(batches)
        flying = list(itertools.islice(batches, 3))
        try:
            while flying:
                yield self.sample(*flying.pop(0), parameters)
                flying += itertools.islice(batches, 1)
        except GeneratorExit:
            self.closed = True
            raise


def test_a_sampler_with_many_batches_in_flight_makes_the_shards_that_are_missing(room: Room) -> None:
    small = {"sampling": {"shard_size": 1}}
    room.sampler = sampler = Ahead()
    write = stage.write_completion_shard
    written: list[str] = []

    def fails(path: Path, groups: Any) -> None:
        if len(written) == 4:
            raise OSError("no space")
        written.append(path.name)
        write(path, groups)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "write_completion_shard", fails)
        with pytest.raises(OSError, match="no space") as caught:
            sampled(room.open(**small))
    assert sampler.closed
    assert caught.traceback  # which keeps what the stage had: nothing is closed for want of references
    run = room.open(**small)
    (lost,) = run.dir.round_dir(1).glob("completions.partial/shard-000001.parquet")
    lost.unlink()
    sampler.seeds.clear()
    completions = sampled(run)
    ids = [prompt.id for prompt in run.prompts.of(1)]
    missing = [ids[1], ids[4], ids[5]]  # the one that is lost, and two that were not written
    assert sampler.seeds == [derive_seed(run.config.seed, 1, "sample", prompt_id) for prompt_id in missing]
    assert [g.prompt for g in completions] == list(run.prompts.of(1))
    assert [g.prompt_ids for g in completions] == run.prompt_ids(list(run.prompts.of(1)))


def test_a_streaming_judge_is_given_each_shard_while_the_next_is_sampled(room: Room) -> None:
    room.judge = Lengths(needs_device=False)
    run = room.open()
    streaming = run.streaming_judge(1)
    sample(run, 1, run.initial, run.prompts.of(1), streaming)
    assert streaming.join() is not None
    assert [len(groups) for groups in room.judge.asked] == [SHARD_SIZE, PER_ROUND - SHARD_SIZE]
    for number in range(2):
        assert streaming.path_of(run.dir.round_dir(1) / "completions" / f"{shard_name(number)}.parquet").exists()


def test_a_shard_that_an_earlier_start_left_is_given_to_the_streaming_judge_too(room: Room) -> None:
    sampled(room.open())
    run = room.open()
    step = run.dir.round_dir(1) / "completions"
    (step / "MANIFEST.json").unlink()
    step.rename(step.with_name("completions.partial"))
    write_json(step.with_name("completions.partial") / "STEP.json", key(run), record=run.dir.round_dir(1))
    room.judge = Lengths(needs_device=False)
    room.sampler.asked.clear()
    run = room.open()
    streaming = run.streaming_judge(1)
    sample(run, 1, run.initial, run.prompts.of(1), streaming)
    assert streaming.join() is not None
    assert room.sampler.asked == []
    assert len(room.judge.asked) == 2


def test_no_judge_streams_if_everything_is_sampled(room: Room) -> None:
    sampled(room.open())
    room.judge = Lengths(needs_device=False)
    run = room.open()
    streaming = run.streaming_judge(1)
    sample(run, 1, run.initial, run.prompts.of(1), streaming)
    assert streaming.join() is None


def test_evaluation_may_sample_another_number_at_another_temperature(room: Room) -> None:
    run = room.open(sampling={"top_k": 7})
    default, other = parameters_of(run, K, 1.0), parameters_of(run, 1, 0.0)
    assert (default.n, default.temperature, default.top_k, default.max_tokens) == (K, 1.0, 7, 16)
    assert (other.n, other.temperature, other.top_k, other.max_tokens) == (1, 0.0, 7, 16)


def test_completions_of_a_run_open_with_load_dataset(room: Room, tmp_path: Path) -> None:
    import datasets

    path = sampled(room.open(sampling={"shard_size": 100})).path  # one shard, and one manifest in JSON
    rows = datasets.load_dataset(str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["completions"][:] == [["ab", "abab"]] * PER_ROUND


# Chats


def chats(room: Room, template: str, *, kwargs: dict[str, Any] | None = None) -> None:
    """A policy with this template, and prompts of messages."""
    model = build_tiny_checkpoint(room.root / "model")
    (model / "chat_template.jinja").write_text(template)
    room.sections["model"] = {"path": str(model), "chat_template_kwargs": kwargs or {}}
    rows = [{"prompt": [{"role": "user", "content": f"Tale {i}"}]} for i in range(40)]
    (room.root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_template_that_writes_the_time_gives_all_shards_and_starts_the_same_ids(room: Room) -> None:
    chats(room, "{{ strftime_now('%f') }}" + CHATML)
    run = room.open()
    first = [list(run.pinned_ids(round)) for round in (0, 1)]
    assert first[1] != run.prompt_ids(list(run.prompts.of(1)))  # at another time
    assert [list(room.open().pinned_ids(round)) for round in (0, 1)] == first
    assert [g.prompt_ids for g in sampled(room.open())] == first[1]


def test_an_end_of_turn_that_the_engine_does_not_know_is_given_to_it_and_part_of_the_key(room: Room) -> None:
    chats(room, CHATML.replace("<|im_end|>", "<|im_start|>"))
    run = room.open()
    assert parameters_of(run, K, 1.0).stop_token_ids == (1,)
    assert key(run)["sampling"]["stop_token_ids"] == [1]


def test_ends_that_generation_config_lists_are_given_to_the_engine_and_no_part_of_the_key(room: Room) -> None:
    chats(room, CHATML)
    (room.root / "model" / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    run = room.open()
    assert parameters_of(run, K, 1.0).stop_token_ids == (0,)
    assert "stop_token_ids" not in key(run)["sampling"]


def test_values_for_the_template_are_part_of_the_key_if_there_are_any(room: Room) -> None:
    chats(room, CHATML + "{{ mood }}", kwargs={"mood": "calm"})
    assert key(room.open())["prompts"]["chat_template_kwargs"] == {"mood": "calm"}
    with_values = list(room.open().pinned_ids(1))
    room.sections["model"]["chat_template_kwargs"] = {}
    assert "chat_template_kwargs" not in key(room.open())["prompts"]
    assert list(room.open().pinned_ids(1)) != with_values


def test_several_temperatures_are_in_the_key_and_reach_the_sampler(room: Room) -> None:
    run = room.open(sampling={"temperatures": [0.7, 1.0]})
    assert key(run)["sampling"]["temperature"] == [0.7, 1.0]
    assert parameters_of(run, 2, temperature_of(run)).temperature == (0.7, 1.0)


def test_prompts_that_tie_each_time_retire_and_are_counted(room: Room) -> None:
    room.sections["prompts"] |= {"per_round": 12, "reuse": True, "choose": "untied"}  # of 36 to train on

    class Some(Lengths):
        """Ties every second prompt."""

        def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
            found = super().judge(groups)
            even = [int(group.prompt.text.removeprefix("Tale ")) % 2 == 0 for group in groups]
            return [replace(j, scores=[1.0, 1.0]) if tie else j for j, tie in zip(found, even, strict=True)]

    room.judge = Some()
    run = room.open(rounds=5)
    ties = sum(int(p.text.removeprefix("Tale ")) % 2 == 0 for p in run.prompts.train)
    retired = []
    for t in range(1, 6):
        completions = sample(run, t, run.initial, run.prompts.of(t))
        judge(run, t, completions, run.train_judge)
        manifest = read_manifest(completions.path)
        assert manifest is not None
        retired.append(manifest.counts["retired"])
        if t > 3:  # all have had their turn
            assert all(int(p.text.removeprefix("Tale ")) % 2 for p in run.prompts.of(t))
    assert retired[0] == 0
    assert retired[3:] == [ties, ties]
    assert room.open(rounds=5).prompts.of(4).digest() == run.prompts.of(4).digest()
