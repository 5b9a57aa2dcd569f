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

    def test_bad_tests_abstain(self) -> None:
        assert reason(self.JUDGE, ADD) == "the prompt's column 'tests' is missing"
        assert reason(self.JUDGE, ADD, tests="assert (") == "the tests of column 'tests' are not valid Python"
        assert reason(self.JUDGE, ADD, tests=["x ="]) == "the tests of column 'tests' are not valid Python"
        assert "is neither" in reason(self.JUDGE, ADD, tests=[1, 2])

    def test_a_failure_of_the_sandbox_abstains(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise SandboxError("clone: no memory")

        monkeypatch.setattr("judges.verify.code.run_python", fail)
        assert reason(self.JUDGE, ADD, tests=ASSERTS) == "the sandbox failed: clone: no memory"

    def test_arguments_are_checked(self) -> None:
        with pytest.raises(JudgeError, match="only 'python' is"):
            CodeTests.check(language="rust")
        with pytest.raises(JudgeError, match="timeout is 0"):
            CodeTests.check(timeout=0)
