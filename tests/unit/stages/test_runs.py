"""What a run has for its stages: nothing is loaded before it is needed, and everything is given back."""

from __future__ import annotations

import io
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from flows.loop import run_loop, run_round
from iterdpo.errors import ConfigError, DataError, UserError
from iterdpo.judging.judge import JudgeBase, NamedJudge
from iterdpo.run import devices
from iterdpo.run.artifacts import PolicyCheckpoint
from iterdpo.run.progress import Progress
from iterdpo.run.rundir import directory_digest, read_json, write_json, write_jsonl
from iterdpo.stages import runs as module
from iterdpo.stages.judge import judge as judge_stage
from iterdpo.stages.runs import IterativeRun, batches
from iterdpo.stages.sample import sample
from iterdpo.testing import CHATML, FakeSampler, build_tiny_checkpoint
from iterdpo.training.launch import TRAIN_LOG, TrainSpec
from iterdpo.types import Completion, CompletionGroup, Judgment, Prompt, RoundRecord
from tests.unit.stages.harness import Lengths, NotingSampler, Room


class Closing(Lengths):
    closed = 0

    def close(self) -> None:
        self.closed += 1


def test_opening_a_run_loads_no_judge_starts_no_sampler_and_writes_nothing(room: Room) -> None:
    def load() -> JudgeBase:
        raise AssertionError("loaded")

    config = room.open().config
    run = IterativeRun(config, train_judge=NamedJudge("train_judge", "mine", "1", load))  # the vLLM engine samples
    run.close()
    assert not run.dir.root.exists()


def test_judges_are_named_by_their_roles_and_the_first_trains(room: Room) -> None:
    run = room.open(heldout_judge=Lengths())
    assert [judge.role for judge in run.judges] == ["train_judge", "heldout_judge"]
    assert run.train_judge is run.judges[0]
    assert [judge.role for judge in room.open().judges] == ["train_judge"]


def test_the_policy_after_a_round_is_the_one_that_its_record_names(room: Room) -> None:
    run = room.open()
    path = build_tiny_checkpoint(run.dir.round_dir(1) / "policy", seed=1)
    run.dir.round_dir(0).mkdir()
    run.dir.round_dir(2).mkdir()
    digest = directory_digest(path)
    run.dir.write_record(RoundRecord(0, "promote", "", str(run.model_path), 0, run.initial.digest, {}, {}))
    run.dir.write_record(RoundRecord(1, "promote", "", "round-001/policy", 1, digest, {}, {}))
    run.dir.write_record(RoundRecord(2, "keep", "", "round-001/policy", 1, digest, {}, {}))
    assert run.policy_after(0) == run.initial
    assert run.policy_after(1) == run.policy_after(2) == PolicyCheckpoint(path, digest, 1)

    (path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="not the policy that round 2 kept"):
        run.policy_after(2)


def test_a_checkpoint_is_held_against_its_model_again_only_if_it_has_changed(room: Room, tmp_path: Path) -> None:
    model = build_tiny_checkpoint(tmp_path / "model")
    changes: dict[str, Any] = {"model": {"path": str(model)}}
    room.open(**changes).dir.root.mkdir()
    config = read_json(model / "config.json")

    (model / "config.json").write_text(json.dumps(config | {"hidden_act": "no such function"}))
    for _ in range(2):
        with pytest.raises(ConfigError, match="transformers makes no model of it"):
            room.open(**changes).check_model()
    (model / "config.json").write_text(json.dumps(config))
    room.open(**changes).check_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("iterdpo.stages.runs.check_model", lambda *_: pytest.fail("it was checked"))
        room.open(**changes).check_model()


def test_the_digest_of_the_initial_policy_is_noted_with_what_it_was_taken_of(room: Room, tmp_path: Path) -> None:
    model = build_tiny_checkpoint(tmp_path / "model")
    changes: dict[str, Any] = {"model": {"path": str(model)}}
    run = room.open(**changes)
    run.dir.root.mkdir()
    first, note = run.initial.digest, run.dir.root / ".initial.json"
    assert first == directory_digest(model)

    write_json(note, {**read_json(note), "digest": "noted"}, record=run.dir.root)
    assert room.open(**changes).initial.digest == "noted"
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    assert room.open(**changes).initial.digest not in ("noted", first)


def test_the_engine_holds_the_longest_prompt_and_completion_in_steps_of_64(room: Room) -> None:
    assert room.open().max_model_len == 64
    assert room.open(sampling={"max_tokens": 60}).max_model_len == 128
    assert room.open(sampling={"engine": {"max_model_len": 100}}).max_model_len == 100


def test_a_prompt_that_leaves_no_room_is_named_before_anything_is_loaded(room: Room) -> None:
    with pytest.raises(DataError, match=r"p-[0-9a-f]+"):
        _ = room.open(sampling={"max_tokens": 508}).max_model_len
    with pytest.raises(ConfigError, match=r"sampling\.engine\.max_model_len = 1024: the model's context is 512 tokens"):
        _ = room.open(sampling={"engine": {"max_model_len": 1024}}).max_model_len


def test_closing_a_run_gives_back_its_judges_and_ends_its_sampler(room: Room) -> None:
    closed = []
    judge = room.judge = Closing()
    room.sampler.close = lambda: closed.append("sampler")  # type: ignore[method-assign]
    with room.open() as run:
        run.train_judge.load()
    assert (closed, judge.closed) == (["sampler"], 1)


def test_the_engine_is_made_once_at_its_first_use_and_again_if_that_fails(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[FakeSampler] = []
    fails = True

    def make(**settings: Any) -> FakeSampler:
        if fails:
            raise OSError("no device")
        made.append(FakeSampler(lambda ids, k: ""))
        return made[-1]

    monkeypatch.setattr(module, "VLLMSampler", make)
    room.sampler = None  # type: ignore[assignment]
    with room.open():
        pass
    with room.open() as run:
        with pytest.raises(OSError, match="no device"):
            _ = run.sampler
        assert made == []
        fails = False
        assert run.sampler is run.sampler
        assert run.sampler.engines == made  # type: ignore[attr-defined]
    assert len(made) == 1


@pytest.mark.parametrize(
    ("replicas", "gpus", "width", "expected"),
    [
        (2, [], 1, ["0", "1"]),
        (1, [], 1, [None]),
        ("auto", [], 1, [None]),
        ("auto", ["4", "5", "7"], 1, ["4", "5", "7"]),
        ("auto", ["4", "5", "7"], 2, [None]),
        (2, ["4", "5", "6", "7"], 2, ["4,5", "6,7"]),
    ],
)
def test_each_engine_of_a_pool_has_its_own_gpus_or_cores_and_its_log(
    room: Room, monkeypatch: pytest.MonkeyPatch, replicas: Any, gpus: list[str], width: int, expected: list[str | None]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(room.root))
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(devices, "_installed", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(gpus))
    room.sampler = None  # type: ignore[assignment]
    engine = {"replicas": replicas, "tensor_parallel_size": width}
    with room.open(sampling={"engine": engine}) as run:
        engines: Any = run.sampler.engines  # type: ignore[attr-defined]
        name = "CUDA_VISIBLE_DEVICES" if gpus else "VLLM_CPU_OMP_THREADS_BIND"
        given = [dict(os.environ, **e._env) for e in engines]
        none = os.environ.get(name)
        assert [env.get(name) for env in given] == [none if own is None else own for own in expected]
        assert len({e.log for e in engines}) == len(expected)
        assert len(run.devices.descriptors) == min(len(gpus), len(expected) * width)


def test_a_run_that_shares_the_gpus_takes_no_turns(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(room.root))
    monkeypatch.setattr(devices, "_installed", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with room.open() as run, run.sampling_turn, room.open(share_gpus=True) as beside:
        assert len(run.devices.descriptors) == 1
        assert beside.devices.descriptors == []
        with beside.sampling_turn:  # waits for nobody
            assert run.devices._holders


def test_more_engines_than_devices_are_refused(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    with pytest.raises(ConfigError, match=r"replicas x tensor_parallel_size = 6: more than the 4 cores"):
        room.open(sampling={"engine": {"replicas": 3, "tensor_parallel_size": 2}})


def test_servers_sample_in_place_of_engines_and_no_gpu_is_taken_for_them(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(room.root))
    monkeypatch.setattr(devices, "_installed", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    room.sampler = None  # type: ignore[assignment]
    urls = [f"http://127.0.0.1:{devices.free_port()}" for _ in range(2)]
    with room.open(sampling={"servers": urls}) as run:
        engines: Any = run.sampler.engines  # type: ignore[attr-defined]
        assert [engine.url for engine in engines] == urls
        assert len(run.devices.descriptors) == 1  # of the trainer
        with run.sampling_turn:
            assert run.devices._holders == []
        with pytest.raises(ConfigError, match=rf"sampling\.servers: {urls[0]} does not answer; start the server"):
            run.probe_sampler()
    with room.open() as run, run.sampling_turn:
        assert len(run.devices._holders) == 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"sampling\.ray: the package 'ray' is not installed"):
        room.open(sampling={"ray": "auto"}).probe_sampler()
    with pytest.raises(ValueError, match="servers and ray"):
        room.open(sampling={"servers": ["http://a:1"], "ray": "auto"})


def test_two_runs_on_one_gpu_take_turns_by_stage(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is pretended, its lock is real; who trains, samples or judges holds it alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(devices, "_installed", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    using: list[str] = []
    turns: list[str] = []

    @contextmanager
    def use(who: str) -> Iterator[None]:
        using.append(who)
        time.sleep(0.05)
        assert using == [who]
        turns.append(who)
        yield
        using.remove(who)

    class Sampling(NotingSampler):
        who = ""

        def sample(self, *given: Any) -> list[list[Completion]]:
            with use(self.who):
                return super().sample(*given)

    class Judging(Lengths):
        who = ""

        def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
            with use(self.who):
                return super().judge(groups)

    def launch(spec: TrainSpec, **_: Any) -> None:
        with use(spec.output.parents[2].name):
            build_tiny_checkpoint(spec.output, seed=1)
            write_jsonl(spec.output / TRAIN_LOG, [{"step": 1, "loss": 0.5}])

    monkeypatch.setattr("iterdpo.stages.train.launch_training", launch)
    monkeypatch.setattr(module, "warm_up", lambda *_, **more: None)
    said = {name: io.StringIO() for name in ("ann", "ben")}

    def work(name: str) -> None:
        (tmp_path / name).mkdir()
        with ExitStack() as stack:
            room = Room(tmp_path / name, tiny_model, stack)
            room.sampler, room.judge = Sampling(), Judging()
            room.sampler.who = room.judge.who = name
            run = room.open(rounds=1, progress=Progress(said[name]))
            list(run_loop(run, lambda t: run_round(run, t)))

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(work, name) for name in said]:
            done.result()
    assert "waiting for GPU 0, which another run is using" in said["ann"].getvalue() + said["ben"].getvalue()
    changes = sum(before != after for before, after in pairwise(turns))
    assert changes > 3, turns  # not one run after the other


def test_closing_a_run_ends_a_judge_that_streams(room: Room) -> None:
    room.judge = Lengths(needs_device=False)
    with room.open() as run:
        streaming = run.streaming_judge(1)
        streaming.start()
    assert streaming.join() is not None
    assert room.judge.asked == []


def test_a_round_that_begins_again_judges_no_completion_twice(room: Room) -> None:
    """As after a Prefect server that was lost in the middle of a round."""
    judging, go_on = threading.Event(), threading.Event()

    class Slow(Lengths):
        def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
            judging.set()
            assert go_on.wait(30)
            return super().judge(groups)

    judge = room.judge = Slow(needs_device=False)
    run = room.open(sampling={"shard_size": 2})
    first = run.streaming_judge(1)
    sample(run, 1, run.initial, run.prompts.of(1), first)
    assert judging.wait(30)
    threading.Timer(0.2, go_on.set).start()
    again = run.streaming_judge(1)
    completions = sample(run, 1, run.initial, run.prompts.of(1), again)
    judge_stage(run, 1, completions, run.train_judge, again)
    first.join()
    asked = [group.prompt.id for groups in judge.asked for group in groups]
    assert sorted(asked) == sorted(prompt.id for prompt in run.prompts.of(1))


def test_what_changed_in_the_initial_policy_since_the_run_began_is_named(room: Room, tmp_path: Path) -> None:
    model = build_tiny_checkpoint(tmp_path / "model")
    run = room.open(model={"path": str(model)})
    run.check(run.initial)
    (model / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"model: notes\.txt: not as when this run began"):
        run.check(run.initial)
    (model / "notes.txt").unlink()
    run.check(run.initial)
    (model / "generation_config.json").unlink()
    with pytest.raises(DataError, match=r"model: generation_config\.json: not as when this run began"):
        run.check(run.initial)


def test_a_run_of_another_format_is_refused(room: Room) -> None:
    run = room.open()
    run.dir.root.mkdir()
    write_json(run.dir.root / "run.json", {"config": {}})
    with pytest.raises(UserError, match="whose files this one cannot read"):
        room.open()


def test_waiting_for_a_person_is_said(room: Room) -> None:
    screen = io.StringIO()
    with room.open(progress=Progress(screen)).waiting("2 comparisons wait for you") as poll:
        assert poll is None
    assert screen.getvalue() == "  waiting   2 comparisons wait for you\n"


def test_batches_are_of_one_size_but_the_last() -> None:
    assert list(batches(iter(range(5)), 2)) == [[0, 1], [2, 3], [4]]
    assert list(batches([], 2)) == []


def test_a_prompt_that_the_template_refuses_is_named_by_its_file_and_row(room: Room) -> None:
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    model = build_tiny_checkpoint(room.root / "model")
    (model / "chat_template.jinja").write_text(refuse + CHATML)
    rows = [{"prompt": [{"role": "user", "content": f"Tale {i}"}]} for i in range(10)]
    rows[6]["prompt"].insert(0, {"role": "system", "content": "Be brief."})
    (room.root / "prompts.jsonl").write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    run = room.open(rounds=1, model={"path": str(model)})
    with pytest.raises(DataError, match=r"prompts\.jsonl: row 7 \(line 8\): the chat template of .*System role not"):
        run.estimated_max_model_len()


def test_all_prompts_that_the_template_refuses_are_named_with_their_rows(room: Room) -> None:
    model = build_tiny_checkpoint(room.root / "model")
    refusing = "{% if '7' in messages[0].content %}{{ raise_exception('no sevens') }}{% endif %}" + CHATML
    (model / "chat_template.jinja").write_text(refusing)
    rows = [{"prompt": [{"role": "user", "content": f"Tale {i}"}]} for i in range(40)]
    (room.root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = room.open(model={"path": str(model)})
    with pytest.raises(DataError, match="no sevens") as caught:
        run.prompt_ids([Prompt(f"{i}", [{"role": "user", "content": f"Tale {i}"}]) for i in range(40)])
    first, *others = str(caught.value).splitlines()
    assert "4 of 40 rows cannot be used (4 cannot be rendered or tokenized)" in first
    assert [line.strip().partition(":")[0] for line in others] == [str(room.root / "prompts.jsonl")] * 4
    for number, line in zip((7, 17, 27, 37), others, strict=True):
        assert f"row {number + 1}" in line
