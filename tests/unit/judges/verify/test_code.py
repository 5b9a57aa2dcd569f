"""Programs with tests, run in a real sandbox."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from iterdpo.errors import JudgeError
from iterdpo.testing import make_group
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
        assert program_of("```python\r\na\r\n```\r\nx") == "a\n"
        assert program_of("```python\nreturn a + b```") == "return a + b"
        assert program_of("```python\na\n```<|im_end|>") == "a\n"
        assert program_of("```python\n'Example: ```f(3)```'\na\n```") == "'Example: ```f(3)```'\na\n"
        assert program_of("- so\n  ```python\n\n  def f(): ...\n  ```") == "\ndef f(): ...\n"
        assert program_of("```python\nx = '''\n  \n'''\n```") == "x = '''\n  \n'''\n"
        assert program_of("1. So:\n   ```python\n   if x:\n       y\n   ```") == "if x:\n    y\n"

    def test_a_usage_example_after_the_program_is_not_the_program(self) -> None:
        example = "```python\nprint(add(1, 2))\n```"
        assert program_of(f"```python\n{ADD}```\nUse it so:\n{example}", {"add"}) == ADD
        assert (
            program_of(f"```python\n{ADD}```\nBetter:\n```python\ndef add(*x): ...\n```", {"add"})
            == "def add(*x): ...\n"
        )
        assert program_of(f"```python\n{ADD}```\n{example}", {"sub"}) == "print(add(1, 2))\n"
        for last in ("class Solution:\n    def add(self, a, b): return a + b\n", "add = lambda a, b: a + b\n"):
            assert program_of(f"```python\n{ADD}```\n```python\n{last}```", {"add"}) == last


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

    def test_a_machine_without_processes_or_pipes_left_abstains(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refused(*args: Any, **settings: Any) -> Any:
            raise BlockingIOError(11, "Resource temporarily unavailable")

        monkeypatch.setattr("subprocess.Popen", refused)
        tests = "assert add(3, 4) == 7  # not cached"
        assert "the sandbox failed: [Errno 11]" in reason(CodeTests(), ADD, tests=tests)

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
        for tests in (
            "import not_installed\nassert add(1, 2) == 3",
            "def test_add(tmp_path): assert add(1, 2) == 3",
            "open('x', 'w').write('1')\nassert count('x') == 1",
            "from pathlib import Path\nsave('x')\nassert Path('x').read_text() == '1'",
            "class Mine(Base): pass\nassert Mine().go() == 3",
            "class Mine:\n    x = Positive()\nMine().x = 3",
            "from unittest.mock import patch\nwith patch('builtins.print') as p: add(1, 2)\np.assert_called_with(3)",
            "import warnings\nwith warnings.catch_warnings(record=True) as w: add(1, 2)\nassert len(w) == 1",
            "from solution import add\ndef test_add(capsys): assert add(1, 2) == 3",
            "from solution import add\nimport not_installed\nassert add(1, 2) == 3",
            "import os\nsave('a.txt')\nassert os.path.exists('a.txt')",
            "from pathlib import Path\nsave('x')\nassert Path('x').exists()",
            "import sqlite3\nassert count(sqlite3.connect(':memory:')) == 0",
            "import os\nos.environ['KEY'] = 'v'\nassert key() == 'v'",
            "import sys\nsys.argv = ['prog', '3']\nassert args() == 3",
            "from decimal import getcontext\ngetcontext().prec = 6\nassert add(1, 2) == 3",
            "import warnings\nwarnings.simplefilter('error')\nassert add(1, 2) == 3",
            "from os.path import exists\nsave('a')\nassert exists('a')",
            "import os\nos.environ.setdefault('K', 'v')\nassert key() == 'v'",
            "from os import environ\nenviron['K'] = 'v'\nassert key() == 'v'",
            "import decimal\nwith decimal.localcontext() as c: assert add(1, 2) == 3",
            "import logging\nlogging.getLogger('app').addHandler(logging.NullHandler())\nassert add(1, 2) == 3",
        ):
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
            "assert item() == Item('a') and Item('a') != Item('b')", "import dataclasses\nassert dataclasses.asdict(item()) == {'name': 'a', 'n': 0} and dataclasses.replace(item(), n=2).n == 2", "assert item().name == 'a'"]),
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
        ("class One:\n    made = None\n    def __new__(cls):\n        cls.made = cls.made or super().__new__(cls)\n        return cls.made\n    def me(self): return self\nONE = One()\ndef one(): return ONE", [
            "assert One() is One() and One().me() is One() and one() is One()", "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertIs(One(), One())",
            "assert type(One()) is One and One().__class__.__name__ == 'One' and type(one()).__name__ == 'One'"]),
        ("import enum, collections\nclass Level(enum.IntEnum):\n    LOW = 1\n    HIGH = 2\nclass Color(enum.Enum):\n    RED = 'r'\nclass P(collections.namedtuple('P', 'x y')):\n    def total(self): return self.x + self.y\n"
         "class Stack(list):\n    def push(self, x): self.append(x)\nclass Slug(str):\n    def shout(self): return self.upper()\ndef level(n): return Level(n)\ndef point(): return P(1, 2)\ndef slug(): return Slug('a')\n"
         "def is_high(n): return n is Level.HIGH\ndef keys(d): return d.keys()\ndef items(d): return d.items()", [
            "assert level(2) == 2 and level(2) is Level.HIGH and level(1).name == 'LOW' and isinstance(level(1), Level) and is_high(level(2))", "assert Color('r') is Color.RED",
            "assert point() == (1, 2) and point().total() == 3 and P(1, 2) == (1, 2)", "s = Stack()\ns.push(1)\nassert s == [1] and isinstance(s, list) and s != [2]",
            "assert slug() == 'a' and slug().shout() == 'A'", "assert keys({'a': 1}) == {'a'} and items({'a': 1}) == {('a', 1)}"]),
        ("import functools, inspect\ncalls = {}\ndef count(f):\n    @functools.wraps(f)\n    def inner(*a):\n        calls[f.__name__] = calls.get(f.__name__, 0) + 1\n        return f(*a)\n    return inner\n"
         "def curry(f):\n    n = len(inspect.signature(f).parameters)\n    def take(*a): return f(*a) if len(a) >= n else lambda *b: take(*a, *b)\n    return take\ndef arity(f): return f.__code__.co_argcount\n"
         "def log(f):\n    def inner(self, *a):\n        self.seen.append(f.__name__)\n        return f(self, *a)\n    return inner\n"
         "def retry(f, kinds=Exception):\n    try: return f()\n    except kinds: return f()", [
            "@count\ndef g(x):\n    'doubles'\n    return x * 2\nassert g(2) == 4 and g(3) == 6 and g.__name__ == 'g' and g.__doc__ == 'doubles' and calls == {'g': 2}",
            "assert curry(lambda a, b, c: a + b + c)(1)(2)(3) == 6 and arity(lambda a, b: 0) == 2", "class A:\n    def __init__(self): self.seen = []\n    @log\n    def go(self, x): return x\na = A()\nassert a.go(1) == 1 and a.seen == ['go']",
            "import inspect\nassert list(inspect.signature(retry).parameters) == ['f', 'kinds']",
            "class Mine(Exception): pass\ndef bad(): raise Mine('x')\nimport pytest\nwith pytest.raises(Mine): retry(bad)", "class Mine(Exception): pass\nn = []\ndef once():\n    n.append(1)\n    if len(n) < 2: raise Mine\n    return 3\nassert retry(once, (Mine,)) == 3"]),
        ("import asyncio, contextlib\nclass Pool:\n    async def __aenter__(self):\n        self.task = asyncio.create_task(self.work())\n        return self\n    async def __aexit__(self, *a): self.closed = await self.task\n    async def work(self):\n        await asyncio.sleep(0.001)\n        return True\n"
         "async def count(n):\n    for i in range(n): yield i\nasync def both(f): return await asyncio.gather(f(1), f(2))\n@contextlib.asynccontextmanager\nasync def made(): yield 3\nclass Ignores:\n    async def __aenter__(self): return self\n    async def __aexit__(self, kind, *a): return kind is KeyError", [
            "import asyncio\nasync def run():\n    async with Pool() as p: pass\n    return p.closed\nassert asyncio.run(run()) is True", "import asyncio\nasync def run(): return [x async for x in count(3)]\nassert asyncio.run(run()) == [0, 1, 2]",
            "import asyncio\nasync def twice(x):\n    await asyncio.sleep(0.001)\n    return x * 2\nassert asyncio.run(both(twice)) == [2, 4]", "import asyncio\nasync def run():\n    async with made() as x: assert x == 3\nasyncio.run(run())",
            "import asyncio\nasync def run():\n    async with Ignores(): raise KeyError\nasyncio.run(run())"]),
        ("class NotFound(Exception):\n    status = 404\n    def __init__(self, key): self.key = key; super().__init__(f'no {key}')\n    def hint(self): return f'add {self.key}'\ndef find(k):\n    try: return {}[k]\n    except KeyError as e: raise NotFound(k) from e\ndef guard(f):\n    try: return f()\n    except NotFound as e: return 'caught'", [
            "import pytest\nwith pytest.raises(NotFound) as e: find('a')\nassert e.value.status == NotFound.status == 404 and e.value.hint() == 'add a' and isinstance(e.value.__cause__, KeyError)", "def f(): raise NotFound('x')\nassert guard(f) == 'caught'", "e = NotFound('b')\nassert str(e) == 'no b' and e.key == 'b' and isinstance(e, Exception)"]),
        ("class Node:\n    def __init__(self, v): self.v, self.children, self.tags = v, [], {}\n    def total(self): return self.v + sum(c.total() for c in self.children)\nseen = []\ndef see(x): seen.append(x)\nRATE = 2\ndef price(x): return fetch(x) * RATE\ndef fetch(x): return x\n"
         "class Bus:\n    def __init__(self): self.found = []\n    def on(self, f): self.found.append(f)\n    def off(self, f): self.found.remove(f)\n    def fire(self, x): return [f(x) for f in self.found]\ndef name_of(api, i): return api.get(i)['name']\nimport random, sys\ndef mixed(x): return random.sample(x, len(x))\ndef read(): return sys.stdin.read().split()", [
            "a = Node(1)\na.children.append(Node(2))\na.tags['x'] = 1\nassert a.total() == 3 and a.tags == {'x': 1}", "import copy\na = Node(1)\nb = copy.deepcopy(a)\nb.v = 5\nassert a.v == 1 and b.v == 5", "see(1)\nsee(2)\nassert seen == [1, 2]",
            "import solution\nassert solution.price(2) == 4\nsolution.RATE = 3\nassert solution.price(2) == 6", "from unittest.mock import patch\nwith patch('solution.fetch', return_value=5): assert price(1) in (10, 15)\nassert price(0) == 0",
            "got = []\nb = Bus()\nb.on(got.append)\nb.fire(1)\nb.off(got.append)\nb.fire(2)\nassert got == [1]", "from unittest.mock import Mock\napi = Mock()\napi.get.return_value = {'name': 'x'}\nassert name_of(api, 3) == 'x'\napi.get.assert_called_once_with(3)",
            "import random\nrandom.seed(1)\na = mixed([1, 2, 3, 4, 5, 6])\nrandom.seed(1)\nassert a == mixed([1, 2, 3, 4, 5, 6]) and sorted(a) == [1, 2, 3, 4, 5, 6]", "import io\nfrom unittest.mock import patch\nwith patch('sys.stdin', io.StringIO('1 2')): assert read() == ['1', '2']"]),
        ("class V:\n    def __init__(s, x): s.x = x\n    def __add__(s, o): return V(s.x + o.x)\n    def __iadd__(s, o): s.x += o.x; return s\n    def __mul__(s, k): return V(s.x * k)\n    __rmul__ = __mul__\n    def __truediv__(s, k): return V(s.x / k)\n    def __eq__(s, o): return s.x == o.x\n"
         "class P:\n    __slots__ = ('x',)\ndef f(x: int) -> int:\n    'One more.'\n    return x + 1\ndef total(xs): return xs[0] + xs[1]\ndef pay(a, n):\n    a.balance += n\n    a.seen.append(n)\ndef slope(t): return '2 * x'\ndef gen():\n    yield 1\n    return 5\nfrom concurrent.futures import ThreadPoolExecutor\ndef at_once(f, xs): return list(ThreadPoolExecutor(3).map(f, xs))\n"
         "import typing\n@typing.runtime_checkable\nclass HasX(typing.Protocol):\n    x: int", [
            "a, b = V(1), V(3)\nassert (a + b) * 2 == V(8) and 2 * (a + b) == V(8) and (a + b) / 2 == V(2)\na += b\nassert 2 * a == V(8)", "assert P.__slots__ == ('x',) and not hasattr(P(), '__dict__')", "assert f.__doc__ == 'One more.' and f.__annotations__ == {'x': int, 'return': int}",
            "class N:\n    def __init__(s, n): s.n = n\n    def __add__(s, o): return N(s.n + o.n)\nassert total([N(1), N(2)]).n == 3", "from dataclasses import dataclass, field\n@dataclass\nclass A:\n    balance: int = 0\n    seen: list = field(default_factory=list)\na = A()\npay(a, 3)\nassert a == A(3, [3])", "x = 3\nassert eval(slope('x ** 2')) == 6", "g = gen()\nnext(g)\ntry: next(g)\nexcept StopIteration as e: assert e.value == 5", "assert at_once(lambda x: x * 2, [1, 2, 3]) == [2, 4, 6]",
            "import inspect\nfrom collections.abc import Iterator\nassert inspect.isgenerator(gen()) and isinstance(gen(), Iterator) and hasattr(gen(), '__next__') and not callable(gen())", "assert isinstance(V(1), HasX)"]),
        ("class Solution:\n    def twice(self, x): return [x, x]", ["assert Solution().twice(2) == [2, 2]", "s = Solution()\nassert s.twice('a') == ['a', 'a']"]),
    )  # fmt: skip

    def test_right_programs_pass_each_test(self) -> None:
        for program, tests in self.RIGHT:
            if self.score(program, tests) != 1:
                assert [test for test in tests if self.score(program, [test]) != 1] == []

    def test_a_change_in_place_beside_a_number_counts_if_the_prompt_asks_for_it(self) -> None:
        program = "```python\ndef dedupe(x):\n    x[:] = sorted({*x})\n    return len(x)\n```"
        tests = "x = [1, 1, 2]\nassert dedupe(x) == 2 and x[:2] == [1, 2]"
        prompts = ("Remove duplicates in-place and return the number left.", "Count the different numbers.")
        groups = [make_group(prompt, [program], tests=tests) for prompt in prompts]
        assert [judgment.scores for judgment in self.JUDGE.judge(groups)] == [[1], [0]]

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
