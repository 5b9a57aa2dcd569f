"""What people write becomes a judge, and what goes wrong in it becomes an abstention."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from iterdpo.errors import JudgeError
from iterdpo.judging.judge import JudgeBase, checked_judgments, judgments_in_turn
from iterdpo.testing import make_group
from iterdpo.testing_http import FakeEndpoint
from iterdpo.types import Comparison, Completion, CompletionGroup, Judgment, Prompt
from judges.adapter import adapt

CHAT = CompletionGroup(
    Prompt("p-chat", [{"role": "user", "content": "2+2?"}], {"gold": "4"}),
    [1, 2],
    [Completion("4", [7], [-0.1], "stop"), Completion("5", [8, 9], [-0.2, -0.3], "length")],
)


def judged(made: Any, *groups: CompletionGroup, **args: Any) -> list[Judgment]:
    judge = adapt(made, name="mine", args=args)
    assert isinstance(judge, JudgeBase)
    return checked_judgments(judge, groups)


class TestScoring:
    def test_a_function_scores_each_completion_and_reads_the_columns_it_names(self) -> None:
        def judge(prompt: str, completion: str, gold: str) -> float:
            return float(prompt == "2+2?" and completion == gold)

        [judgment] = judged(judge, make_group("2+2?", ["4", "5"], gold="4", source="arithmetic"))
        assert judgment.scores == [1.0, 0.0]

    def test_a_function_with_keyword_arguments_receives_every_column(self) -> None:
        def judge(completion: str, **columns: Any) -> float:
            assert columns == {"prompt": "x", "gold": "4", "source": "y"}
            return 1.0

        assert judged(judge, make_group("x", ["a"], gold="4", source="y"))[0].scores == [1.0]

    def test_a_column_cannot_pose_as_the_completion(self) -> None:
        [judgment] = judged(lambda completion: len(completion), make_group("x", ["ab"], completion="abcdef"))
        assert judgment.scores == [2.0]

    def test_a_conversational_prompt_arrives_as_messages_and_the_completion_as_text(self) -> None:
        def judge(prompt: list[dict[str, str]], completion: str) -> float:
            return float(prompt[-1]["content"] == "2+2?" and completion == "4")

        assert judged(judge, CHAT)[0].scores == [1.0, 0.0]

    def test_an_exception_abstains_for_its_completion_alone(self) -> None:
        [judgment] = judged(lambda completion: 1 / len(completion), make_group("x", ["ab", ""]))
        assert judgment.scores == [0.5, None]
        assert judgment.abstentions == [None, "ZeroDivisionError: division by zero"]

    def test_none_nan_and_text_abstain(self) -> None:
        answers = {"a": None, "b": math.nan, "c": "7", "d": 3}
        [judgment] = judged(lambda completion: answers[completion], make_group("x", list("abcd")))
        assert judgment.scores == [None, None, None, 3.0]
        assert all(judgment.abstentions[:3])

    def test_arguments_reach_a_function_and_win_over_a_column_of_their_name(self) -> None:
        def judge(completion: str, factor: float = 1.0) -> float:
            return factor * len(completion)

        assert judged(judge, make_group("x", ["ab"], factor=100), factor=3)[0].scores == [6.0]

    def test_completions_of_several_groups_go_back_to_their_own(self) -> None:
        first, second = judged(len_of, make_group("x", ["a", "bb"]), make_group("y", ["ccc"]))
        assert (first.scores, second.scores) == ([1.0, 2.0], [3.0])


def len_of(completion: str) -> int:
    return len(completion)


class TestClasses:
    def test_a_class_is_made_with_the_arguments(self) -> None:
        class Longer:
            def __init__(self, factor: float) -> None:
                self.factor = factor

            def score(self, prompt: str, completion: str) -> float:
                return self.factor * len(completion)

        assert judged(Longer, make_group("x", ["ab"]), factor=2)[0].scores == [4.0]

    def test_an_object_is_used_as_it_is(self) -> None:
        class Longer:
            def compare(self, a: str, b: str) -> str:
                return "a" if len(a) > len(b) else "b"

        assert judged(Longer(), make_group("x", ["ab", "a"]))[0].scores == [1.0, 0.0]

    def test_the_full_protocol_sees_the_groups(self) -> None:
        class Truncated:
            def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
                return [
                    Judgment(g.prompt.id, [float(not c.truncated) for c in g.completions], [None] * 2) for g in groups
                ]

        assert judged(Truncated, CHAT)[0].scores == [1.0, 0.0]

    def test_a_factory_is_called_once_with_the_arguments(self) -> None:
        def make(factor: float) -> Any:
            return lambda completion: factor * len(completion)

        assert judged(make, make_group("x", ["ab"]), factor=2)[0].scores == [4.0]

    def test_closing_the_judge_closes_the_users_object(self) -> None:
        closed = []

        class Client:
            def score(self, completion: str) -> float:
                return 1.0

            def close(self) -> None:
                closed.append(True)

        adapt(Client, name="mine").close()
        assert closed == [True]

    def test_the_optional_members_of_a_users_object_are_taken_over(self, tmp_path: Path) -> None:
        class Full:
            comparative, needs_device, repeat = True, False, 0
            told: ClassVar[list[Any]] = []

            def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
                return [Judgment(g.prompt.id, [float(self.repeat)] * 2, [None] * 2) for g in groups]

            def judge_each(self, groups: Iterable[CompletionGroup]) -> Iterator[Judgment]:
                self.told.append("judge_each")
                return (self.judge([group])[0] for group in groups)

            def attach(self, run_dir: Path, waiting: Any) -> None:
                self.told.append(run_dir)

            async def begin_stage(self) -> None:
                self.told.append("begin_stage")

            def usage(self) -> dict[str, float]:
                return {"calls": 3}

        judge = adapt(Full, name="mine")
        assert (judge.comparative, judge.needs_device) == (True, False)
        judge.attach(tmp_path, lambda message: nullcontext())
        judge.begin_stage()
        judge.close()  # which it has not
        judge.repeat = 7
        assert judge.judge([CHAT])[0].scores == [7.0, 7.0]
        assert [j.scores for j in judgments_in_turn(lambda: judge, [[CHAT], [CHAT]])] == [[7.0, 7.0]] * 2
        assert Full.told == [tmp_path, "begin_stage", "judge_each"]
        assert judge.usage() == {"calls": 3}

    def test_what_derives_from_the_base_class_is_not_wrapped(self) -> None:
        class Own(JudgeBase):
            def __init__(self, factor: float = 1.0) -> None:
                self.name, self.factor = "own", factor

            def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
                return []

        made = Own()
        assert adapt(made, name="mine", version="1") is made
        assert (made.name, made.version) == ("own", "1")
        for source in (Own, lambda factor: Own(factor)):
            judge: Any = adapt(source, name="mine", args={"factor": 2.0})
            assert (type(judge), judge.factor) == (Own, 2.0)


class TestComparing:
    def test_every_two_completions_are_asked_in_both_orders(self) -> None:
        asked = []

        def judge(prompt: str, a: str, b: str) -> str:
            asked.append(a + b)
            return "a" if a < b else "b"

        [judgment] = judged(judge, make_group("x", ["p", "q", "r"]))
        assert sorted(asked) == ["pq", "pr", "qp", "qr", "rp", "rq"]
        assert judgment.scores == [1.0, 0.5, 0.0]  # p beats both, q beats r alone, r loses both
        assert Comparison(0, 1, "first") in judgment.comparisons
        assert Comparison(1, 0, "second") in judgment.comparisons
        assert len(judgment.comparisons) == 6

    def test_a_judge_that_always_prefers_the_first_ties_everything(self) -> None:
        [judgment] = judged(lambda a, b: "a", make_group("x", ["p", "q", "r"]))
        assert judgment.scores == [0.5, 0.5, 0.5]

    def test_an_opponent_without_a_verdict_is_left_out(self) -> None:
        def judge(a: str, b: str) -> str | None:
            return None if "r" in (a, b) else ("a" if a < b else "b")

        [judgment] = judged(judge, make_group("x", ["p", "q", "r"]))
        assert judgment.scores == [1.0, 0.0, None]
        assert judgment.abstentions == [None, None, "the judge returned None"]

    def test_an_unknown_verdict_abstains_and_is_quoted(self) -> None:
        [judgment] = judged(lambda a, b: "A wins", make_group("x", ["p", "q"]))
        assert judgment.scores == [None, None]
        assert judgment.abstentions[0] == "the judge returned 'A wins', not 'a', 'b', 'tie' or None"

    def test_an_exception_abstains_with_its_reason(self) -> None:
        def judge(a: str, b: str) -> str:
            raise TimeoutError("30 s")

        [judgment] = judged(judge, make_group("x", ["p", "q"]))
        assert judgment.abstentions == ["TimeoutError: 30 s"] * 2
        assert judgment.comparisons[0] == Comparison(0, 1, None, "TimeoutError: 30 s")

    def test_a_single_completion_has_nothing_to_be_compared_with(self) -> None:
        [judgment] = judged(lambda a, b: "a", make_group("x", ["p"]))
        assert judgment.abstentions == ["nothing to compare it with"]


class TestTRLRewardFunctions:
    def test_it_is_called_once_with_what_the_grpo_trainer_gives(self) -> None:
        calls = []

        def reward(
            prompts: list[Any],
            completions: list[Any],
            completion_ids: list[list[int]],
            trainer_state: Any,
            **kwargs: Any,
        ) -> list[float]:
            calls.append((prompts, completions, completion_ids, trainer_state.global_step, kwargs))
            kwargs["log_extra"]("gold", kwargs["gold"])
            kwargs["log_metric"]("accuracy", 0.5)
            return [1.0, 0.0, 0.25]

        chat, plain = judged(reward, CHAT, make_group("say", ["hi"]))
        assert (chat.scores, plain.scores) == ([1.0, 0.0], [0.25])
        [(prompts, completions, completion_ids, step, kwargs)] = calls
        assert prompts == [CHAT.prompt.content, CHAT.prompt.content, "say"]
        assert completions == [[{"role": "assistant", "content": "4"}], [{"role": "assistant", "content": "5"}], "hi"]
        assert completion_ids == [[7], [8, 9], [104, 105]]
        assert step == 0
        assert kwargs["gold"] == ["4", "4", None]

    def test_trls_own_format_reward_works_unchanged(self) -> None:
        from trl.rewards import think_format_reward

        texts = ["<think>\nso\n</think>\n4", "4"]
        group = CompletionGroup(CHAT.prompt, [1], [Completion(t, [1], [-1.0], "stop") for t in texts])
        assert judged(think_format_reward, group)[0].scores == [1.0, 0.0]

    def test_trls_own_factories_take_their_arguments(self) -> None:
        from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

        texts = ["abcd", "aaaaa"]  # FakeSampler's tokens are bytes; 4 bigrams, 1 of them distinct: 1 - 1/4
        assert judged(get_repetition_penalty_reward, make_group("x", texts), ngram_size=2)[0].scores == [0.0, -0.75]
        overlong = judged(
            get_soft_overlong_punishment, make_group("x", texts), max_completion_len=6, soft_punish_cache=2
        )
        assert overlong[0].scores == [0.0, -0.5]  # 5 tokens: one of the two in the margin

    def test_an_exception_abstains_for_the_whole_batch(self) -> None:
        def reward(completions: list[str], **kwargs: Any) -> list[float]:
            raise KeyError("solution")

        [judgment] = judged(reward, make_group("x", ["a", "b"]))
        assert judgment.abstentions == ["KeyError: 'solution'"] * 2

    @pytest.mark.parametrize(
        ("returned", "complaint"),
        [
            ([1.0], "returned 1 scores for 2 completions"),
            (None, "returned nothing for 2"),
            (0.5, "returned a float for 2"),
        ],
    )
    def test_another_number_of_scores_is_an_error(self, returned: Any, complaint: str) -> None:
        def reward(completions: list[str], **kwargs: Any) -> Any:
            return returned

        with pytest.raises(JudgeError, match=f"judge 'mine' {complaint}"):
            judged(reward, make_group("x", ["a", "b"]))


class TestCoroutines:
    def test_calls_run_together_up_to_the_limit(self) -> None:
        running, most = 0, 0

        async def judge(completion: str) -> float:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.001)
            running -= 1
            return len(completion)

        [judgment] = judged(judge, make_group("x", ["a" * k for k in range(40)]))
        assert judgment.scores == [float(k) for k in range(40)]
        assert most == 16

    def test_an_object_sets_its_own_limit(self) -> None:
        class Slow:
            concurrency = 2
            running = most = 0

            async def compare(self, a: str, b: str) -> str:
                Slow.running += 1
                Slow.most = max(Slow.most, Slow.running)
                await asyncio.sleep(0.001)
                Slow.running -= 1
                if a == "q":
                    raise ValueError("no")
                return "tie"

        [judgment] = judged(Slow, make_group("x", ["p", "q", "r"]))
        assert Slow.most == 2
        assert judgment.scores == [0.5, None, 0.5]

    def test_a_batch_and_the_full_protocol_may_be_coroutines(self) -> None:
        async def reward(completions: list[str], **kwargs: Any) -> list[float]:
            return [1.0, 2.0]

        async def judge(groups: Sequence[CompletionGroup]) -> list[Judgment]:
            return [Judgment(g.prompt.id, [1.0, 2.0], [None, None]) for g in groups]

        group = make_group("x", ["a", "b"])
        assert judged(reward, group) == judged(judge, group)

    def test_a_client_made_in_the_constructor_lasts_over_shards_threads_and_stages(self) -> None:
        class Remote:
            def __init__(self, url: str) -> None:
                self.url, self.client, self.closed = url, httpx.AsyncClient(), 0

            async def score(self, completion: str) -> float:
                body = {"messages": [{"role": "user", "content": completion}]}
                reply = await self.client.post(f"{self.url}/chat/completions", json=body)
                return float(reply.json()["choices"][0]["message"]["content"])

            async def close(self) -> None:
                self.closed += 1

        with FakeEndpoint(lambda body: str(len(body["messages"][0]["content"]))) as server:
            judge = adapt(Remote, name="mine", args={"url": server.base_url})
            group = make_group("x", ["a", "bb"])
            with ThreadPoolExecutor() as threads:  # as beside sampling
                early = threads.submit(checked_judgments, judge, [group]).result()
            judge.close()
            later = [checked_judgments(judge, [group]) for _ in range(2)]
        assert [[j.scores for j in judgments] for judgments in (early, *later)] == [[[1.0, 2.0]]] * 3
        assert judge.owner.closed == 1  # type: ignore[attr-defined]

    def test_closing_while_a_thread_still_judges_raises_nothing(self) -> None:
        started, closed = threading.Event(), []

        class Slow:
            async def score(self, completion: str) -> float:
                started.set()
                await asyncio.sleep(0.2)
                return 1.0

            async def close(self) -> None:
                closed.append(True)

        judge = adapt(Slow, name="mine")
        with ThreadPoolExecutor() as threads:
            early = threads.submit(checked_judgments, judge, [make_group("x", ["a"])])
            started.wait()
            judge.close()
            assert early.result()[0].scores == [1.0]
        assert closed == []
        judge.close()
        assert closed == [True]

    def test_a_plain_function_may_run_a_loop_of_its_own(self) -> None:
        async def ask() -> float:
            return 2.0

        assert judged(lambda completion: asyncio.run(ask()), make_group("x", ["a"]))[0].scores == [2.0]


@pytest.mark.parametrize(
    ("made", "args", "complaint"),
    [
        (lambda prompt, response: 1.0, {}, r"its parameters \(prompt, response\) fit no form of judge"),
        (lambda completion, factor=1: 1.0, {"facto": 2}, "unknown argument 'facto'; did you mean 'factor'?"),
        (
            lambda prompt, completion, gold: 1.0,
            {"model": "x"},
            r"unknown argument 'model'; it accepts: gold \(arguments of another judge stay .*judge\.args=\{\}",
        ),
        (type("Empty", (), {}), {}, "a Empty is not a judge"),
        (type("Empty", (), {}), {"x": 1}, "unknown argument 'x'; it accepts: nothing"),
        (3, {}, "a int is not a judge"),
        (lambda: lambda x=1: x, {}, r"its result has the parameters \(x\)"),
    ],
)
def test_what_is_no_judge_is_refused_with_the_remedy(made: Any, args: dict[str, Any], complaint: str) -> None:
    with pytest.raises(JudgeError, match=complaint):
        adapt(made, name="mine", args=args)


def test_a_class_without_its_argument_is_refused() -> None:
    class Needs:
        def __init__(self, url: str) -> None: ...

    with pytest.raises(JudgeError, match="missing argument 'url'"):
        adapt(Needs, name="mine")
