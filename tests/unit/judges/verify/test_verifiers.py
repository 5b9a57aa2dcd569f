"""Judges that check completions by rule, and programs by running them."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from iterdpo.errors import JudgeError
from iterdpo.judging.judge import JudgeBase, checked_judgments
from iterdpo.testing import make_group
from judges.verify import verifiers
from judges.verify.sandbox import SandboxError, sandbox_problems
from judges.verify.verifiers import (
    CodeTests,
    ExactMatch,
    JSONSchema,
    Math,
    NumericMatch,
    Regex,
    last_number,
    program_of,
)


def scores(judge: Any, *completions: str, **columns: Any) -> list[float | None]:
    assert isinstance(judge, JudgeBase)
    [judgment] = checked_judgments(judge, [make_group("q", completions, **columns)])
    return judgment.scores


def reason(judge: Any, completion: str, **columns: Any) -> str:
    [judgment] = checked_judgments(judge, [make_group("q", [completion], **columns)])
    assert judgment.scores == [None]
    assert judgment.abstentions[0]
    return judgment.abstentions[0]


@pytest.mark.parametrize("judge", [ExactMatch(), NumericMatch(), Regex(column="gold"), JSONSchema(column="gold")])
def test_a_missing_or_empty_column_abstains_and_is_named(judge: Any) -> None:
    assert reason(judge, "4", answer="4") == "the prompt's column 'gold' is missing"
    assert reason(judge, "4", gold=None) == "the prompt's column 'gold' is empty"
    assert reason(judge, "4", gold=[]) == "the prompt's column 'gold' is empty"


def test_groups_keep_their_order_and_columns() -> None:
    groups = [make_group("a", ["1", "2"], gold="1"), make_group("b", ["2"], gold="2"), make_group("c", ["1"])]
    judgments = checked_judgments(ExactMatch(), groups)
    assert [j.scores for j in judgments] == [[1.0, 0.0], [1.0], [None]]
    assert not ExactMatch.needs_device


class TestExactMatch:
    def test_space_around_is_no_difference_and_case_is_one(self) -> None:
        assert scores(ExactMatch(), " Paris\n", "paris", "Paris.", gold="Paris") == [1, 0, 0]
        assert scores(ExactMatch(ignore_case=True), "PARIS", gold="Paris") == [1]
        assert scores(ExactMatch(strip=False), "Paris ", "Paris", gold="Paris") == [0, 1]

    def test_any_of_a_list_counts_and_a_number_is_its_text(self) -> None:
        assert scores(ExactMatch(), "a", "b", "c", gold=["a", "b"]) == [1, 1, 0]
        assert scores(ExactMatch(column="n"), "4", n=4) == [1]

    def test_the_last_line_alone(self) -> None:
        assert scores(ExactMatch(last_line=True), "Let me think.\n42\n\n", "42\nor not", "", gold="42") == [1, 0, 0]


class TestNumericMatch:
    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("It is 42.", 42),
            ("first 3, then 4", 4),
            ("#### 42\nNext question: 17", 42),
            ("#### 1,234", 1234),
            ("1,234,567.5 people", "1234567.5"),
            ("1\u202f234", 1234),
            ("a list 1,2,3", 3),
            ("3.14", "3.14"),
            (".5", "0.5"),
            ("-7", -7),
            ("−7", -7),
            ("x=-7", -7),
            ("10-5", 5),
            ("10 - 5", 5),
            ("GPT-4", 4),
            ("$5.50", "5.5"),
            ("-$5", -5),
            ("$-5", -5),
            ("€5", 5),
            ("$42$", 42),
            (r"\boxed{42}", 42),
            ("**42**", 42),
            ("42km", 42),
            ("42 km2", 42),
            ("5 m^2", 5),
            ("3/4", "3/4"),
            ("-3/4", "-3/4"),
            ("1 1/2", "3/2"),
            ("1/0", 1),
            ("1e3", 1000),
            ("2.5E-3", "0.0025"),
            ("2.5 × 10^-3", "0.0025"),
            (r"2.5 \times 10^{4}", 25000),
            ("10^6", 1000000),
            ("答案是42", 42),
            ("12345678901234567890", 12345678901234567890),
            ("9:30", 30),
            ("007", 7),
        ],
    )
    def test_the_last_number_is_read(self, text: str, number: int | str) -> None:
        found = last_number(text)
        assert found is not None
        assert found[0] == Fraction(number)

    def test_a_text_without_a_number_has_none(self) -> None:
        assert [last_number(t) for t in ("", "none", "x2", "####", "H_2")] == [None] * 5

    def test_hostile_texts_take_no_time(self) -> None:
        begin = time.monotonic()
        for text in ("9" * 200_000, "1," * 100_000, "1e999999999", "-" * 200_000, "1/" * 100_000, " 1 " * 70_000):
            last_number(text)
        assert last_number("1e999") == (Fraction(10) ** 999, False)
        assert time.monotonic() - begin < 5

    def test_tolerances(self) -> None:
        assert scores(NumericMatch(), "0.3333333", "0.33", gold="1/3") == [1, 0]
        assert scores(NumericMatch(tolerance=0.5), "41.5", "41.4", gold=42) == [1, 0]
        assert scores(NumericMatch(relative=0.01), "1010", "1011", gold=1000) == [1, 0]
        assert scores(NumericMatch(tolerance=0), "12345678901234567890", "12345678901234567891", gold="12345678901234567890") == [1, 0]  # fmt: skip

    def test_a_percent_sign_on_one_side_may_be_a_unit_or_a_hundredth(self) -> None:
        assert scores(NumericMatch(), "50%", "50", "0.5", gold="50") == [1, 1, 0]
        assert scores(NumericMatch(), "50%", "50", "0.5", gold="0.5") == [1, 0, 1]
        assert scores(NumericMatch(), "50%", "50", "0.5", r"50\%", gold="50%") == [1, 1, 1, 1]
        assert scores(NumericMatch(), "0.5%", gold="50%") == [0]

    def test_gold_forms(self) -> None:
        assert scores(NumericMatch(), "18", "19", "eighteen", gold="She has 9 * 2 = 18.\n#### 18") == [1, 0, 0]
        assert scores(NumericMatch(), "2", "3", "4", gold=[2, "3"]) == [1, 1, 0]
        assert scores(NumericMatch(), "0", "1", gold=0) == [1, 0]
        assert reason(NumericMatch(), "4", gold="four") == "no number in the column 'gold'"

    def test_a_negative_tolerance_is_refused(self) -> None:
        with pytest.raises(JudgeError, match="tolerance is -1"):
            NumericMatch.check(tolerance=-1)


class TestMath:
    @pytest.fixture(scope="class")
    def judge(self) -> Any:
        pytest.importorskip("math_verify")
        judge = Math()
        yield judge
        judge.close()

    def test_equal_expressions_match_whatever_their_form(self, judge: Math) -> None:
        completions = [
            r"So it is $\boxed{\frac{1}{2}}$.",
            "The answer is 0.5",
            r"$\frac{2}{4}$",
            r"$\boxed{2}$",
            "no idea",
        ]
        assert scores(judge, *completions, gold=r"\frac{1}{2}") == [1, 1, 1, 0, 0]
        assert scores(judge, r"\boxed{x^2+2x+1}", r"\boxed{x^2}", gold="$(x+1)^2$") == [1, 0]
        assert scores(judge, r"$\boxed{\{2, 1\}}$", gold=r"\{1, 2\}") == [1]
        assert scores(judge, "12", gold=12) == [1]

    def test_any_of_a_list_counts(self, judge: Math) -> None:
        assert scores(judge, "3", "4", "5", gold=["3", "4"]) == [1, 1, 0]

    def test_a_gold_text_that_does_not_parse_abstains(self, judge: Math) -> None:
        assert reason(judge, "4", gold="it depends") == "the gold expression cannot be parsed"

    def test_it_works_outside_the_main_thread(self, judge: Math) -> None:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(scores(judge, "4", "5", gold="4")))
        thread.start()
        thread.join()
        assert found == [[1, 0]]

    def test_a_comparison_that_never_ends_abstains_and_the_next_one_works(self) -> None:
        pytest.importorskip("math_verify")
        judge = Math(timeout=1, concurrency=1)
        try:
            scores(judge, "1", gold="1")
            begin = time.monotonic()
            why = reason(judge, r"$\boxed{(10^{10})!}$", gold="2")  # sympy starts to multiply
            assert time.monotonic() - begin < 4
            assert why == "the comparison did not end within 1 s, or ran out of memory"
            assert scores(judge, "4", gold="4") == [1]
        finally:
            judge.close()

    def test_gold_latex_may_be_bare(self, judge: Math) -> None:
        for gold in ("x^2+1", "$x^2+1$", r"\boxed{x^2+1}", r"\(x^2+1\)"):
            assert scores(judge, r"$\boxed{1+x^2}$", r"$\boxed{x^2}$", gold=gold) == [1, 0], gold
        assert scores(judge, r"$\boxed{(1, \pi)}$", r"$\boxed{(\pi, 1)}$", gold=r"(1, \pi)") == [1, 0]

    def test_a_missing_package_is_named_before_the_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(JudgeError, match="pip install 'math-verify'"):
            Math.check()


class TestJSONSchema:
    SCHEMA: Any = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}  # noqa: RUF012

    def test_json_that_satisfies_the_schema(self) -> None:
        completions = ['{"age": 4}', '{"age": "4"}', "{}", '{"age": 4', "", "[" * 100_000, '{"age": NaN}']
        assert scores(JSONSchema(schema=self.SCHEMA), *completions) == [1, 0, 0, 0, 0, 0, 0]

    def test_one_fenced_block_counts_and_two_do_not(self) -> None:
        block = '```json\n{"age": 4}\n```'
        assert scores(JSONSchema(schema=self.SCHEMA), f"Here:\n{block}\nDone.", f"{block}\n{block}") == [1, 0]

    def test_from_a_file_or_a_column(self, tmp_path: Path) -> None:
        (tmp_path / "s.json").write_text(json.dumps(self.SCHEMA))
        assert scores(JSONSchema(path=str(tmp_path / "s.json")), '{"age": 4}') == [1]
        for column in (self.SCHEMA, json.dumps(self.SCHEMA)):
            assert scores(JSONSchema(column="s"), '{"age": 4}', "{}", s=column) == [1, 0]
        assert "not a JSON schema" in reason(JSONSchema(column="s"), "{}", s={"type": "objekt"})
        assert "not JSON" in reason(JSONSchema(column="s"), "{}", s="{")

    def test_references_within_work_and_others_are_not_fetched(self) -> None:
        local = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}}
        assert scores(JSONSchema(schema=local), "4", '"4"') == [1, 0]
        remote = JSONSchema(schema={"$ref": "http://127.0.0.1:9/schema.json"})
        assert "nothing is fetched" in reason(remote, "4")

    def test_what_is_wrong_is_said_before_the_run(self, tmp_path: Path) -> None:
        with pytest.raises(JudgeError, match="one of `schema`, `path` and `column`"):
            JSONSchema.check()
        with pytest.raises(JudgeError, match="not a JSON schema"):
            JSONSchema.check(schema={"type": "objekt"})
        with pytest.raises(JudgeError, match=r"nothing\.json"):
            JSONSchema.check(path=str(tmp_path / "nothing.json"))


class TestRegex:
    def test_a_part_or_the_whole_matches(self) -> None:
        assert scores(Regex(pattern=r"\d+"), "a 1", "a") == [1, 0]
        assert scores(Regex(pattern=r"\d+", full=True), "a 1", "11") == [0, 1]
        assert scores(Regex(column="p"), "abc", "xyz", p="(?i)B") == [1, 0]

    def test_a_bad_pattern_is_refused_before_the_run_or_abstains(self) -> None:
        with pytest.raises(JudgeError, match=r"'\(' is not valid"):
            Regex.check(pattern="(")
        with pytest.raises(JudgeError, match="one of `pattern` and `column`"):
            Regex.check()
        assert "not valid" in reason(Regex(column="p"), "abc", p="(")

    def test_a_pattern_that_backtracks_for_ever_abstains(self) -> None:
        judge = Regex(pattern=r"^(a|a)*$")
        judge.SECONDS = 0.2
        begin = time.monotonic()
        assert reason(judge, "a" * 60 + "!") == "the pattern took longer than 0.2 s to match"
        assert time.monotonic() - begin < 3


ADD = "def add(a, b):\n    return a + b\n"
ASSERTS = "assert add(1, 2) == 3\nassert add(0, 0) == 0\nassert add(-1, 1) == 0"


class TestPrograms:
    def test_the_last_python_block_is_the_program(self) -> None:
        assert program_of("x\n```python\na\n```\ny\n```py\nb\n```\n```bash\nls\n```") == "b\n"
        assert program_of("```\na\n```") == "a\n"
        assert program_of("a = 1") == "a = 1"
        assert program_of("```python\na\nb") == "a\nb"  # cut off
        assert program_of("1. So:\n   ```python\n   if x:\n       y\n   ```") == "if x:\n    y\n"


@pytest.mark.skipif(bool(sandbox_problems()), reason="this machine has no sandbox")
class TestCodeTests:
    JUDGE = CodeTests(timeout=2, concurrency=2)

    def score(self, program: str, tests: Any = ASSERTS) -> float | None:
        return scores(self.JUDGE, f"```python\n{program}\n```", tests=tests)[0]

    def test_the_share_of_assertions_that_hold(self) -> None:
        assert self.score(ADD) == 1
        assert self.score("def add(a, b):\n    return max(a, b, 0) * 3 // 2") == pytest.approx(2 / 3)
        assert self.score("def sub(a, b):\n    return a - b") == 0
        strict = CodeTests(partial=False)
        assert scores(strict, ADD, "def add(a, b):\n    return 3", tests=ASSERTS) == [1, 0]

    def test_tests_may_have_helpers_and_no_assertion_at_the_top(self) -> None:
        check = "def check(f):\n    assert f(1, 2) == 3\ncheck(add)"
        assert (self.score(ADD, check), self.score("def add(a, b):\n    return 0", check)) == (1, 0)
        setup = "import math\nn = 2\nassert add(1, n) == 3\nn = math.pi\nassert add(0, n) == n\nadd('a', 'b')"
        assert self.score(ADD, setup) == 1

    def test_a_list_of_assertions(self) -> None:
        assert self.score("def add(a, b):\n    return 3", ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]) == 0.5

    def test_inputs_and_outputs(self) -> None:
        tests = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5\n", "output": "10"}]
        assert self.score("print(sum(map(int, input().split())))", tests) == 1
        assert self.score("print(3)  # whatever", tests) == 0.5
        assert self.score("print(sum(map(int, input().split())))\nexit(1)", tests) == 0

    def test_a_main_guard_does_not_run_before_assertions(self) -> None:
        assert self.score(f"{ADD}\nif __name__ == '__main__':\n    print(add(*input().split()))") == 1

    @pytest.mark.parametrize(
        "program",
        [
            "while True: pass",
            "import os\nwhile True: os.fork()",
            "import os\nwhile True:\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork(): os._exit(0)",
            "import sys\nwhile True: sys.stdout.write('x' * 1_000_000)",
            "f = open('big', 'w')\nwhile True: f.write('x' * 1_000_000)",
            "x = []\nwhile True: x.append(bytearray(1 << 20))",
            "import os\nos.kill(os.getppid(), 9)",
            "import os\nos.kill(-1, 9)",
            "import socket\nsocket.create_connection(('127.0.0.1', 22), 1)",
            "import os, time\nos.close(1)\nos.close(2)\ntime.sleep(60)",
            "import ctypes\nctypes.string_at(0)",
            "def f(): f()\nf()",
            "def add(:",
            "raise SystemExit(0)",
            "import os\nos._exit(0)",
            "input()",
            "import threading, time\nthreading.Thread(target=lambda: time.sleep(60)).start()",
        ],
        ids=lambda program: program[-30:],
    )
    def test_a_program_that_fails_in_any_way_scores_0_though_its_functions_are_right(self, program: str) -> None:
        begin = time.monotonic()
        assert self.score(f"{ADD}\n{program}\n") == 0
        assert time.monotonic() - begin < 6

    def test_a_program_writes_nothing_outside_the_sandbox(self, tmp_path: Path) -> None:
        name = f"iterdpo-escape-{os.getpid()}"
        for target in (tmp_path / name, Path.home() / name, Path(tempfile.gettempdir()) / name):
            assert self.score(f"{ADD}\nopen({str(target)!r}, 'w').write('x')\n") == 0
            assert not target.exists()

    @pytest.mark.parametrize(
        "trick",
        [
            "import os, sys\nprint('passed', flush=True)\nos._exit(0)",
            "import atexit\nadd = None\natexit.register(lambda: print('ok'))",
            "import builtins\nbuiltins.AssertionError = type('E', (Warning,), {})\nadd = lambda a, b: 9",
            "import builtins\nbuiltins.exec = lambda *a: None\nbuiltins.compile = lambda *a: None\nadd = lambda a, b: 9",
            "import builtins\nbuiltins.BaseException = int\nadd = lambda a, b: 9",
            "import os\nadd = lambda a, b: os._exit(0)",
            "import sys\nadd = lambda a, b: sys.exit(0)",
            "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'ok passed 1 true ' * 3)\n    except OSError: pass",
            "import sys\nsys.settrace(lambda *a: None)\nadd = lambda a, b: 9",
        ],
    )
    def test_a_program_that_plays_at_success_scores_0(self, trick: str) -> None:
        assert self.score(trick) == 0

    def test_what_a_loop_in_one_test_costs_is_all(self) -> None:
        slow = "def add(a, b):\n    while a == 0: pass\n    return a + b"
        assert self.score(slow) == 0
        tests = [{"input": "1", "output": "1"}, {"input": "0", "output": "0"}, {"input": "2", "output": "2"}]
        begin = time.monotonic()
        assert self.score("n = int(input())\nwhile n == 0: pass\nprint(n)", tests) == pytest.approx(1 / 3)
        assert time.monotonic() - begin < 5

    def test_bad_tests_abstain(self) -> None:
        assert reason(self.JUDGE, ADD) == "the prompt's column 'tests' is missing"
        assert reason(self.JUDGE, ADD, tests="assert (") == "the tests of column 'tests' are not valid Python"
        assert reason(self.JUDGE, ADD, tests=["x ="]) == "the tests of column 'tests' are not valid Python"
        assert "is neither" in reason(self.JUDGE, ADD, tests=[1, 2])

    def test_a_failure_of_the_sandbox_abstains(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise SandboxError("clone: no memory")

        monkeypatch.setattr(verifiers, "run_python", fail)
        assert reason(self.JUDGE, ADD, tests=ASSERTS) == "the sandbox failed: clone: no memory"

    def test_arguments_are_checked(self) -> None:
        with pytest.raises(JudgeError, match="only 'python' is"):
            CodeTests.check(language="rust")
        with pytest.raises(JudgeError, match="timeout is 0"):
            CodeTests.check(timeout=0)
