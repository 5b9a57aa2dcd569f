"""Programs with tests, run in a real sandbox."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from iterdpo.errors import JudgeError
from judges.verify.code import CodeTests, program_of
from judges.verify.sandbox import SandboxError, sandbox_problems
from judges.verify.suites import entry_point
from tests.unit.judges.verify.harness import reason, scores

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
        assert self.score(f"{ADD}\n{program}\n") == 0

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

    def test_a_loop_in_one_test_costs_the_tests_after_it_too(self) -> None:
        slow = "def add(a, b):\n    while a == 0: pass\n    return a + b"
        assert self.score(slow) == 0
        tests = [{"input": "1", "output": "1"}, {"input": "0", "output": "0"}, {"input": "2", "output": "2"}]
        assert self.score("n = int(input())\nwhile n == 0: pass\nprint(n)", tests) == pytest.approx(1 / 3)

    @pytest.mark.slow
    def test_each_way_to_write_tests_is_called_as_it_is_meant(self) -> None:
        unittest = "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(add(1, 2), 3)\n"
        guard = 'if __name__ == "__main__":\n    '
        for tests in (
            "def check(candidate):\n    assert candidate(1, 2) == 3\n",
            "METADATA = {}\ndef check(candidate):\n    assert candidate(1, 2) == 3\ncheck(add)",
            "def test_add():\n    assert add(1, 2) == 3\n",
            f"def test_add():\n    assert add(1, 2) == 3\n{guard}test_add()",
            ["def test_add():\n    assert add(1, 2) == 3\n"],
            "from solution import add as plus\nassert plus(1, 2) == 3",
            "import solution\nassert solution.add(1, 2) == 3",
            unittest,
            unittest + "unittest.main()\n",
            f"{unittest}{guard}unittest.main()\n",
            unittest + "unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(T))",
            "class TestAdd:\n    def test_it(self): assert add(1, 2) == 3",
            "import pytest\n@pytest.mark.parametrize('a,b', [(1, 3), (4, 6)])\ndef test_add(a, b): assert add(a, 2) == b",
            "import pytest\n@pytest.fixture\ndef three(): return 3\ndef test_add(three): assert add(1, 2) == three",
            "import pytest\ndef test_add():\n    with pytest.raises(TypeError): add(1)\n    assert add(1, 2) == pytest.approx(3)",
            '{"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [[3], 7]}',
            {"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]},
        ):
            programs = [f"```python\n{program}\n```" for program in (ADD, "def add(a, b): return None", "pass")]
            assert scores(self.JUDGE, *programs, tests=tests) == [1, 0, 0], tests
        apps = {"inputs": ["1 2\n", ["3", "4"]], "outputs": ["3\n", "3,4"]}
        assert self.score("print(sum(map(int, input().split())))", apps) == 0.5

    def test_the_candidate_is_the_column_s_the_prompts_or_the_last_function(self) -> None:
        check = "def check(candidate):\n    assert candidate(1, 2) == 3"
        two = f"```python\n{ADD}\ndef helper(x): return x\n```"
        assert scores(self.JUDGE, two, tests=check) == [0]
        assert scores(self.JUDGE, two, tests=check, entry_point="add") == [1]
        assert entry_point(two, "def first(): ...\ndef add(a, b):\n", None) == "add"
        assert scores(self.JUDGE, "```python\nclass Solution:\n    def add(self, a, b): return a + b\n```", tests=check, entry_point="add") == [1]  # fmt: skip

    @pytest.mark.parametrize(
        "tests",
        ["# no tests\n", [""], "x = 1", "def check(candidate): pass", "try:\n    assert add(1, 2) == 3\nexcept Exception: pass",
         "def test_add(): pass", "class TestNothing: pass", '{"inputs": ["1"], "outputs": [""]}', [{"input": "1", "output": " \n"}]],
    )  # fmt: skip
    def test_tests_that_an_empty_program_passes_abstain(self, tests: Any) -> None:
        assert "test nothing" in reason(self.JUDGE, ADD, tests=tests)

    @pytest.mark.parametrize(
        "tests",
        ["if add(1, 2) == 3: print('PASS')\nelse: print('FAIL')", "try: assert add(1, 2) == 3\nexcept AssertionError: print('FAIL')",
         "def test_add(): return add(1, 2) == 3", "assert (add(1, 2) == 3, 'wrong')", "print(Adder().add(1, 2) == 3)",
         "from solution import add\nadd(1, 2) == 3", "def check(candidate): return candidate(1, 2) == 3",
         "assert is_three(add(1, 2))", "assert decode(encode('ab')) == 'ab'", "for i in range(3): assert slow(i, i) == add(i, i)",
         "a = Adder()\nassert a.is_sum(3, a.add(1, 2))"],
    )  # fmt: skip
    def test_tests_that_do_not_depend_on_the_program_s_answers_abstain(self, tests: str) -> None:
        assert "test nothing" in reason(self.JUDGE, ADD, tests=tests)

    def test_tests_that_depend_on_an_answer_count_though_some_constant_passes_them(self) -> None:
        assert self.score("def f(x): pass", ["assert f(1) is not None", "assert f(2) is None"]) == 0.5
        assert self.score("def f(x): return True", ["assert f(1)", "assert not f(2)", "print(f(3) == 4)"]) == 0.5
        assert self.score("def f(x): return 3", ["assert f(1) != 3", "assert f(2) == 3"]) == 0.5
        close = ["assert is_close(f(1), 2)", "assert f(1) == 2"]
        assert self.score("def is_close(a, b): return a == b\ndef f(x): return 2", close) == 1

    def test_tests_that_an_empty_program_passes_do_not_count_beside_others(self) -> None:
        assert self.score("def add(a, b): return a + b + 1", ["assert True", "assert add(1, 2) == 3"]) == 0
        assert self.score(ADD, ["assert True", "assert add(1, 2) == 3", "assert add(1, 1) == 3"]) == 0.5

    def test_tests_that_need_what_the_sandbox_lacks_abstain(self) -> None:
        for tests in ("import not_installed\nassert add(1, 2) == 3", "def test_add(tmp_path): assert add(1, 2) == 3"):
            assert "need what the sandbox lacks" in reason(self.JUDGE, ADD, tests=tests)

    RIGHT = (  # a program, and tests that it passes, each
        ("def f(x): return x", [f"assert f({value}) == {value}" for value in (
            "None", "True", "3", "10**30", "-1.5", "float('inf')", "1j", "'é\\ud800'", "b'\\xff'", "bytearray(b'a')", "[1, [2]]",
            "(1, (2,))", "{1: 'a', (1, 2): [3]}", "{1, 2}", "frozenset({1})", "range(3)", "int", "slice(1, 2)",
            "__import__('decimal').Decimal('1.50')", "__import__('fractions').Fraction(1, 3)", "__import__('datetime').date(2020, 1, 2)",
            "__import__('collections').Counter('aab')", "__import__('collections').deque([1], maxlen=2)")]),
        ("def sort(x): x.sort()\ndef rotate(m): m[:] = [list(r) for r in zip(*m[::-1])]", [
            "x = [3, 1]\nsort(x)\nassert x == [1, 3]", "m = [[1, 2], [3, 4]]\nassert rotate(m) is None\nassert m == [[3, 1], [4, 2]]"]),
        ("def apply(f, xs): return [f(x) for x in xs]\ndef compose(f, g): return lambda x: f(g(x))", [
            "assert apply(lambda x: x + 1, [1, 2]) == [2, 3]", "assert apply(str, [1]) == ['1']", "assert apply(len, ['ab']) == [2]",
            "assert compose(lambda x: x * 2, abs)(-3) == 6", "assert apply(lambda x: x, (i for i in range(2))) == [0, 1]"]),
        ("def count():\n    for i in range(3): yield i\ndef squares(n): return map(lambda x: x * x, range(n))", [
            "assert list(count()) == [0, 1, 2]", "g = count()\nassert next(g) == 0\nassert next(g) == 1", "assert list(squares(3)) == [0, 1, 4]",
            "assert sum(squares(3)) == 5", "assert 4 in squares(3)"]),
        ("class Vector:\n    def __init__(s, x, y): s.x, s.y = x, y\n    def __add__(s, o): return Vector(s.x + o.x, s.y + o.y)\n"
         "    def __eq__(s, o): return isinstance(o, Vector) and (s.x, s.y) == (o.x, o.y)\n    def __mul__(s, k): return Vector(s.x * k, s.y * k)\n"
         "    def __abs__(s): return (s.x ** 2 + s.y ** 2) ** .5\n    def __repr__(s): return f'Vector({s.x}, {s.y})'\n    def __len__(s): return 2\n"
         "    def __iter__(s): return iter((s.x, s.y))\n    def __getitem__(s, i): return (s.x, s.y)[i]\n    def __contains__(s, v): return v in (s.x, s.y)\n"
         "    def __lt__(s, o): return abs(s) < abs(o)\n    @classmethod\n    def zero(cls): return cls(0, 0)\n    def count(s, v): return (s.x, s.y).count(v)\n", [
            "assert Vector(1, 2) + Vector(3, 4) == Vector(4, 6)", "assert Vector(1, 2) != Vector(2, 2)", "assert Vector(1, 2) * 3 == Vector(3, 6)",
            "assert abs(Vector(3, 4)) == 5", "assert repr(Vector(1, 2)) == 'Vector(1, 2)'", "v = Vector(1, 2)\nv.x = 5\nassert v.x == 5 and v[0] == 5",
            "assert len(Vector(1, 2)) == 2 and list(Vector(1, 2)) == [1, 2]", "assert 2 in Vector(1, 2) and 3 not in Vector(1, 2)",
            "assert Vector(1, 1) < Vector(2, 2)", "assert Vector(2, 2) > Vector(1, 1) and not Vector(2, 2) < Vector(1, 1)", "assert Vector.zero().x == 0", "assert isinstance(Vector.zero(), Vector)", "assert Vector(1, 1).count(1) == 2",
            "assert max([Vector(1, 1), Vector(2, 2)]).x == 2", "a, b = Vector(1, 2)\nassert (a, b) == (1, 2)"]),
        ("class Stack(list):\n    def push(self, x): self.append(x)\n    def peek(self): return self[-1]", [
            "s = Stack()\ns.push(1)\ns.push(2)\nassert s.peek() == 2 and len(s) == 2 and s.pop() == 2", "assert issubclass(Stack, object)"]),
        ("class TooMuch(ValueError):\n    def __init__(self, n): super().__init__(f'{n} is too much'); self.n = n\ndef f(n):\n    if n > 2: raise TooMuch(n)\n"
         "    if n < 0: raise KeyError('n')\n    if n == 2: import json; json.loads('{')\n    return n", [
            "import pytest\nwith pytest.raises(TooMuch) as e: f(3)\nassert str(e.value) == '3 is too much' and e.value.n == 3",
            "try:\n    f(3)\n    assert False\nexcept ValueError as e: assert 'too much' in str(e)", "import pytest\nwith pytest.raises(KeyError): f(-1)",
            "import json, pytest\nwith pytest.raises(json.JSONDecodeError): f(2)", "try: f(3)\nexcept TooMuch as e: n = e.n\nassert n == 3"]),
        ("import enum, collections, dataclasses\nclass Color(enum.Enum):\n    RED = 1\nP = collections.namedtuple('P', 'x y')\n"
         "@dataclasses.dataclass\nclass Item:\n    name: str\n    n: int = 0\ndef red(): return Color.RED\ndef point(): return P(1, 2)\ndef item(): return Item('a')", [
            "assert red() == Color.RED and red() is Color.RED", "assert Color.RED.value == 1", "assert point().x == 1 and point() == (1, 2)",
            "assert item() == Item('a') and Item('a') != Item('b')", "assert item().name == 'a'"]),
        ("async def f(x): return x + 1\nclass Box:\n    def __enter__(self): return self\n    def __exit__(self, *a): self.closed = True\n    def get(self, k): return k", [
            "import asyncio\nassert asyncio.run(f(1)) == 2", "b = Box()\nwith b as c: assert c.get(2) == 2\nassert b.closed is True"]),
        ("def hello(): print('hi')\ndef ask(): return int(input('n? ')) + 1", [
            "import io, contextlib\nout = io.StringIO()\nwith contextlib.redirect_stdout(out): hello()\nassert out.getvalue() == 'hi\\n'",
            "from unittest.mock import patch\nwith patch('builtins.input', return_value='4'): assert ask() == 5"]),
        ("def insert(root, v):\n    if root is None: return None\n    root.left = type(root)(v) if 0 else root.make(v)\n    return root\ndef depth(n): return 1 + max(depth(n.left), depth(n.right)) if n else 0", [
            "class Node:\n    def __init__(s, v): s.v, s.left, s.right = v, None, None\n    def make(s, v): return Node(v)\nr = Node(1)\n"
            "assert insert(r, 2) is r and r.left.v == 2 and depth(r) == 2"]),
        ("def f(x): raise ValueError('neither NaN nor Infinity')", ["import pytest\nwith pytest.raises(ValueError, match='neither'): f(1)"]),
        ("def sum(a, b): return a + b + 1", ["assert sum(1, 2) == 4"]),
        ("def add(a, b): return a + b", ["def run(add): assert add(1, 2) == 3\nrun(add)", "assert add('na', 'n') == 'nan'"]),
        ("class Solution:\n    def twice(self, x): return [x, x]", ["assert Solution().twice(2) == [2, 2]", "s = Solution()\nassert s.twice('a') == ['a', 'a']"]),
    )  # fmt: skip

    def test_right_programs_pass_each_test(self) -> None:
        for program, tests in self.RIGHT:
            if self.score(program, tests) != 1:
                assert [test for test in tests if self.score(program, [test]) != 1] == []

    def test_bad_tests_abstain(self) -> None:
        assert reason(self.JUDGE, ADD) == "the prompt's column 'tests' is missing"
        assert reason(self.JUDGE, ADD, tests="assert (") == "the tests of column 'tests' are not valid Python"
        assert reason(self.JUDGE, ADD, tests=["x ="]) == "the tests of column 'tests' are not valid Python"
        assert "is neither" in reason(self.JUDGE, ADD, tests=[1, 2])

    def test_a_failure_of_the_sandbox_abstains(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise SandboxError("clone: no memory")

        monkeypatch.setattr("judges.verify.code.run_pair", fail)
        assert reason(self.JUDGE, ADD, tests=ASSERTS) == "the sandbox failed: clone: no memory"

    def test_arguments_are_checked(self) -> None:
        with pytest.raises(JudgeError, match="only 'python' is"):
            CodeTests.check(language="rust")
        with pytest.raises(JudgeError, match="timeout is 0"):
            CodeTests.check(timeout=0)
