"""A thinking model's round, stage by stage: divided when sampled, judged on answers, paired, evaluated, shown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from flows.plan import describe_plan
from flows.show import show_completions
from iterdpo.data.pairs import TokenPairs
from iterdpo.errors import ConfigError, StaleStepError
from iterdpo.evaluation.metrics import Thoughts, evaluation_metrics
from iterdpo.evaluation.wins import outscored
from iterdpo.judging.judge import JudgeBase
from iterdpo.report.metrics import round_metrics
from iterdpo.report.page import write_report
from iterdpo.run.artifacts import Completions, Pairs, PolicyCheckpoint, read_groups
from iterdpo.run.read import read_run
from iterdpo.run.rundir import directory_digest, read_json, read_manifest
from iterdpo.sampling import SamplingParameters
from iterdpo.stages.evaluate import evaluate
from iterdpo.stages.gate import gate
from iterdpo.stages.judge import judge
from iterdpo.stages.pair import inputs as pair_inputs
from iterdpo.stages.pair import pair
from iterdpo.stages.runs import IterativeRun
from iterdpo.stages.sample import sample, sampling_key
from iterdpo.testing import CHATML, THINKING, FakeSampler, build_tiny_checkpoint
from iterdpo.types import Completion, CompletionGroup
from tests.unit.stages.harness import HELDOUT, PER_ROUND, Lengths, Room

REPLIES = ("<think>one</think>\n\nlong answer", "<think>two two</think>brief", "<think>three three three three three")


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tags = ["<think>", "</think>"]
    return build_tiny_checkpoint(tmp_path_factory.mktemp("thinker"), chat_template=THINKING, tokens=tags)


@pytest.fixture
def room(tmp_path: Path, thinker: Path) -> Iterator[Room]:
    with ExitStack() as stack:
        room = Room(tmp_path, thinker, stack)
        room.sections["sampling"] |= {"n": 3, "max_tokens": 30}
        tokenizer = AutoTokenizer.from_pretrained(thinker)
        room.sampler = FakeSampler(lambda ids, k: REPLIES[k], tokenizer=tokenizer)  # type: ignore[assignment]
        yield room


def sampled(run: IterativeRun) -> Completions:
    return sample(run, 1, run.initial, run.prompts.of(1))


def paired(run: IterativeRun) -> Pairs:
    completions = sampled(run)
    return pair(run, 1, completions, judge(run, 1, completions, run.train_judge))


def asked(room: Room) -> set[tuple[str, str, int]]:
    """What the judge was given of every completion."""
    assert isinstance(room.judge, Lengths)
    groups = [group for shard in room.judge.asked for group in shard]
    return {(c.text, c.finish_reason, len(c.answer_ids)) for group in groups for c in group.completions}


def test_sampled_completions_are_divided_and_counted(room: Room) -> None:
    run = room.open()
    completions = sampled(run)
    for group in read_groups(completions.path):
        long, brief, unfinished = group.completions
        assert (long.reasoning, long.text, long.finish_reason) == ("<think>one</think>\n\n", "long answer", "stop")
        assert (brief.reasoning, brief.text, brief.reasoning_tokens) == ("<think>two two</think>", "brief", 9)
        assert (unfinished.text, unfinished.finish_reason, unfinished.answer_ids) == ("", "thought", [])
        assert len(unfinished.token_ids) == unfinished.reasoning_tokens == 30  # the tag and 29 bytes; no EOS
    manifest = read_manifest(completions.path)
    assert manifest is not None
    assert manifest.counts["unfinished_thoughts"] == PER_ROUND
    assert manifest.counts["reasoning_tokens"] == PER_ROUND * (5 + 9 + 30)
    assert manifest.counts["truncated"] == 0


def test_a_template_that_opens_the_thought_makes_a_completion_without_a_tag_unfinished(
    room: Room, tmp_path: Path
) -> None:
    opened = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}{# </think> #}")
    prompts = [{"prompt": [{"role": "user", "content": f"Tale {i}"}]} for i in range(40)]
    Path(room.sections["prompts"]["path"]).write_text("".join(json.dumps(row) + "\n" for row in prompts))
    model = build_tiny_checkpoint(tmp_path / "opened", chat_template=opened)
    replies = ("one</think>answer", "two two", "<think>three</think>again")
    tokenizer = AutoTokenizer.from_pretrained(model)
    room.sampler = FakeSampler(lambda ids, k: replies[k], tokenizer=tokenizer)  # type: ignore[assignment]
    for group in read_groups(sampled(room.open(model={"path": str(model)})).path):
        assert [(c.reasoning, c.text, c.finish_reason) for c in group.completions] == [
            ("one</think>", "answer", "stop"),
            ("two two", "", "thought"),
            ("<think>three</think>", "again", "stop"),
        ]


def test_the_tags_are_part_of_the_key_and_of_other_models_nothing_is(room: Room, tiny_model: Path) -> None:
    assert sampling_key(room.open(), 3, 1.0)["thinking"] == {"start": "<think>", "end": "</think>"}
    assert "thinking" not in sampling_key(room.open(model={"thinking": "none"}), 3, 1.0)
    own = room.open(model={"thinking": {"start": "<a>", "end": "</a>"}})
    assert sampling_key(own, 3, 1.0)["thinking"] == {"start": "<a>", "end": "</a>"}
    assert "thinking" not in sampling_key(room.open(model={"path": str(tiny_model)}), 3, 1.0)


def test_shards_of_other_models_are_without_columns_of_reasoning(room: Room) -> None:
    completions = sampled(room.open(model={"thinking": "none"}))
    schema = pq.read_schema(completions.path / "shard-000000.parquet")
    assert not {"reasoning", "reasoning_tokens"} & set(schema.names)
    groups = list(read_groups(completions.path))
    assert [c.reasoning for c in groups[0].completions] == [None] * 3
    assert groups[0].completions[0].text == REPLIES[0]


@pytest.mark.parametrize("stream", [True, False])
def test_the_judge_sees_answers_unless_it_is_to_see_all(room: Room, stream: bool) -> None:
    judgments = judge(run := room.open(stream=stream), 1, sampled(run), run.train_judge)
    assert asked(room) == {("long answer", "stop", 14), ("brief", "stop", 6), ("", "thought", 0)}
    assert next(iter(judgments)).scores == [11.0, 5.0, 0.0]
    manifest = read_manifest(judgments.path)
    assert manifest is not None
    assert manifest.counts["metrics"]["longer_wins"] == 1.0  # by the lengths of answers


def test_a_judge_that_sees_all_has_another_key(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    run = room.open()
    before = run.train_judge.key
    object.__setattr__(run.train_judge.named, "sees", "completion")
    assert run.train_judge.key == {**before, "sees": "completion"}
    judge(run, 1, sampled(run), run.train_judge)
    assert asked(room) == {
        ("<think>one</think>\n\nlong answer", "stop", 19),
        ("<think>two two</think>brief", "stop", 15),
        ("<think>three three three three three", "thought", 30),
    }


def test_pairs_have_the_whole_completion_and_an_unfinished_thought_is_only_rejected(room: Room) -> None:
    pairs = paired(room.open())
    rows = pq.read_table(pairs.path / "train.parquet").to_pylist()
    assert len(rows) == PER_ROUND
    for row in rows:
        assert row["chosen"] == REPLIES[0]
        assert (row["rejected"], row["rejected_finish_reason"]) == (REPLIES[2], "thought")
        assert len(row["chosen_token_ids"]) == 19
    assert "chosen_reasoning_tokens" not in rows[0]


def test_of_answers_alone_the_pairs_say_where_they_begin(room: Room, tmp_path: Path) -> None:
    pairs = paired(room.open(dpo={"train_on": "answer"}))
    read = TokenPairs(pairs.path / "train.parquet", tmp_path)
    assert {read[i].given for i in range(len(read))} == {(5, 9)}
    rows = pq.read_table(pairs.path / "train.parquet").to_pylist()
    assert {row["rejected"] for row in rows} == {REPLIES[1]}  # the unfinished thought has no answer
    with pytest.raises(StaleStepError, match="train_on"):
        paired(room.open())


def test_pairs_of_other_models_have_the_key_that_they_had(room: Room) -> None:
    run = room.open()
    judgments = judge(run, 1, sampled(run), run.train_judge)
    assert pair_inputs(run, 1, judgments).keys() == {"pairing", "judgments", "completions", "seed"}
    assert pair_inputs(room.open(judge={"sees": "completion"}), 1, judgments)["sees"] == "completion"
    assert pair_inputs(room.open(dpo={"train_on": "answer"}), 1, judgments)["train_on"] == "answer"


def test_answers_alone_of_a_model_without_tags_are_refused(room: Room, tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"dpo\.train_on = 'answer': no tags .* set model\.thinking"):
        _ = room.open(model={"path": str(tiny_model)}, dpo={"train_on": "answer"}).tags


def test_a_plan_says_what_is_divided_and_who_sees_what(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.plan._judge_calls", lambda run: {})  # the configuration's judges are no real ones
    run = room.open(heldout_judge=Lengths())
    object.__setattr__(run.judges[1].named, "sees", "completion")
    line = next(line for line in describe_plan(run).splitlines() if line.startswith("thinking"))
    assert line == "thinking     <think> … </think>; judged on: answer and completion; trained on: completion"
    assert "thinking " not in describe_plan(room.open(model={"thinking": "none"}))


# Evaluation


class Always(JudgeBase):
    """Prefers what comes first, or what is not there. `asked` has what it was given."""

    name = "always"

    def __init__(self, *, comparative: bool) -> None:
        self.comparative = comparative
        self.asked: list[CompletionGroup] = []

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Any]:
        from iterdpo.judging.judge import judgment_from_scores

        self.asked += groups
        return [judgment_from_scores(group, [-len(c.text) for c in group.completions]) for group in groups]


def evaluated(
    room: Room, first: str, then: str, by: JudgeBase, tmp_path: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metrics of an initial policy that always writes `first`, and of a candidate that writes `then`."""
    room.judge = by  # type: ignore[assignment]
    said = [first]
    room.sampler.reply = lambda ids, k: said[0]
    run = room.open()
    initial = evaluate(run, 0, run.initial, {})
    said[0] = then
    path = build_tiny_checkpoint(tmp_path / "candidate", seed=1, chat_template=THINKING, tokens=["<think>", "</think>"])
    candidate = PolicyCheckpoint(path, directory_digest(path), 1)
    found = evaluate(run, 1, candidate, {"initial": initial, "previous": initial})
    return read_json(initial.path / "metrics.json"), read_json(found.path / "metrics.json")


@pytest.mark.parametrize("comparative", [False, True])
@pytest.mark.parametrize(
    ("first", "then", "rate"),
    [(REPLIES[0], REPLIES[2], 0.0), (REPLIES[2], REPLIES[0], 1.0), (REPLIES[2], REPLIES[2], 0.5)],
)
def test_an_unfinished_thought_loses_against_every_answer_whatever_the_judge_thinks(
    room: Room, tmp_path: Path, comparative: bool, first: str, then: str, rate: float
) -> None:
    by = Always(comparative=comparative)
    _, metrics = evaluated(room, first, then, by, tmp_path)
    assert metrics["win_rate/vs_initial"] == metrics["win_rate/vs_previous"] == rate
    assert bool(by.asked) != comparative  # of two policies there is nothing to compare


def test_lengths_and_truncation_of_an_evaluation_are_of_answers(room: Room, tmp_path: Path) -> None:
    initial, candidate = evaluated(room, REPLIES[0], REPLIES[2], Always(comparative=False), tmp_path)
    assert (initial["length/mean_tokens"], initial["length/mean_reasoning_tokens"]) == (14.0, 5.0)
    assert (initial["length/truncated"], initial["length/unfinished_thoughts"]) == (0.0, 0.0)
    assert (candidate["length/mean_tokens"], candidate["length/truncated"]) == (None, None)
    assert (candidate["length/unfinished_thoughts"], candidate["length/mean_reasoning_tokens"]) == (1.0, 30.0)
    assert candidate["evaluation/completions"] == HELDOUT
    assert candidate["distinct/1"] is None


def test_shares_of_an_evaluation_are_worked_out_by_hand() -> None:
    found = evaluation_metrics(
        lambda: iter([[1, 2], [3, 4, 5, 6], [], []]),  # two answers, of which one is cut, and two unfinished thoughts
        {"train_judge": [[1.0, 5.0], [None, 0.0]]},
        {"initial": {"train_judge": [[2.0, 2.0], [None, 9.0]]}},
        {},
        None,
        prompts=2,
        truncated=1,
        thoughts=Thoughts(40, [[False, True], [True, False]], {"initial": [[False, False], [True, True]]}),
        bootstrap={"samples": 100},
    )
    assert found["length/mean_tokens"] == 6 / 2
    assert found["length/truncated"] == 1 / 2
    assert found["length/unfinished_thoughts"] == 2 / 4
    assert found["length/mean_reasoning_tokens"] == 40 / 4
    # prompt 1: 1 and an unfinished thought against 2 and 2: no win. Prompt 2: a tie and a win, twice.
    assert found["win_rate/vs_initial"] == (0 + 0.75) / 2
    assert found["score/train_judge"] == (3.0 + 0.0) / 2  # the judge's own scores
    assert list(outscored([[1.0, None]], [[True, False]])) == [[float("-inf"), None]]


# Reading


def test_a_run_shows_reasoning_beside_answers_and_counts_unfinished_thoughts(room: Room) -> None:
    run = room.open()
    with run.dir.lock():
        run.dir.write_config(run.config.model_dump())
    initial = evaluate(run, 0, run.initial, {})
    gate(run, 0, initial, run.initial, None)
    paired(run)
    metrics = round_metrics(run.dir, 1)
    assert (metrics["completions/unfinished_thoughts"], metrics["pairs/unfinished_thoughts"]) == (PER_ROUND, 0)
    frame = read_run(run.dir.root).completions(1)
    assert list(frame.loc[:2, "reasoning_tokens"]) == [5, 9, 30]
    assert list(frame.loc[:2, "tokens"]) == [14, 6, 0]
    assert frame.loc[0, "reasoning"] == "<think>one</think>\n\n"
    page = write_report(run.dir.root).read_text()
    assert "Unfinished thoughts" in page
    assert "Reasoning tokens" in page
    assert "&lt;think&gt;one&lt;/think&gt;" in page
    shown = "\n".join(show_completions(run.dir.root, round=1, limit=1))
    assert (
        "[0] 14 tokens, stop, 5 tokens of reasoning, score 11\n      | <think>one</think>\n      long answer" in shown
    )
    assert "[2] 0 tokens, thought, 30 tokens of reasoning" in shown


def test_the_prompt_files_own_column_named_reasoning_stays_itself_without_a_thinking_model(room: Room) -> None:
    prompts = Path(room.sections["prompts"]["path"])
    prompts.write_text(prompts.read_text().replace("}", ', "reasoning": "mine"}'))
    run = room.open(model={"thinking": "none"})
    sampled(run)
    run.dir.write_config(run.config.model_dump())
    assert set(read_run(run.dir.root).completions(1)["reasoning"]) == {"mine"}
    assert "tokens of reasoning" not in "\n".join(show_completions(run.dir.root, round=1, limit=1))


def test_a_completion_that_another_sampler_made_is_divided_too(room: Room) -> None:
    """Whatever a user's sampler is, its token ids decide."""

    class Odd(FakeSampler):
        def sample(
            self, prompt_ids: Sequence[list[int]], seeds: Sequence[int], parameters: SamplingParameters
        ) -> list[list[Completion]]:
            groups = super().sample(prompt_ids, seeds, parameters)
            return [[Completion("other", c.token_ids, c.logprobs, "stop") for c in group] for group in groups]

    room.sampler = Odd(room.sampler.reply, tokenizer=room.sampler.tokenizer)  # type: ignore[assignment]
    (first, *_) = read_groups(sampled(room.open()).path)
    assert [c.text for c in first.completions] == ["long answer", "brief", ""]
