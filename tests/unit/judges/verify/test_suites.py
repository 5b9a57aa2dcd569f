"""Columns of tests as steps and names."""

from __future__ import annotations

import pytest

from judges.verify.suites import BadTests, entry_point, read_suite


def test_each_assertion_is_a_test_with_the_statements_before_it() -> None:
    suite = read_suite("n = 1\nassert f(n) == 1\nassert f(2) == 2\nf(3)", "t")
    assert suite.tests == [[["code", "n = 1\nassert f(n) == 1"]], [["code", "assert f(2) == 2\nf(3)"]]]
    assert suite.names == {"f": ""}


def test_functions_and_classes_that_the_text_does_not_call_are_steps() -> None:
    text = "def test_a(): assert f() == 1\ndef helper(): pass\nclass TestB:\n    def test_c(self): pass\n    def other(self): pass"
    assert [step[0][0] for step in read_suite(text, "t").tests] == ["code", "function", "method"]
    assert len(read_suite(text + "\ntest_a()", "t").tests) == 2


def test_names_are_the_programs_unless_the_library_or_the_tests_have_them() -> None:
    assert read_suite("assert math.isclose(mean([1]), 1)", "t").names == {"mean": "", "math": "math"}
    assert read_suite("assert abs(isclose(f(x), 1))", "t").names == {"f": "", "x": "", "isclose": "math"}
    assert read_suite("import numpy as np\ndef g(a): return a\nassert np.all(f(g(1)))", "t").names == {"f": ""}
    assert read_suite("assert np.allclose(f(1), assert_near)", "t").names == {"f": ""}
    assert read_suite("assert sum(1, 2) == 3", "t").names == {"sum": ""}
    assert read_suite("assert sum(sorted(1, 2)) == 3", "t").names == {}
    own = "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(sum(1, 2), 3)"
    assert read_suite(own, "t").names == {"sum": ""}
    assert read_suite("from solution import board\nassert sum(board) == 3", "t").names == {}
    assert read_suite("def check(candidate): assert sum(candidate(1)) == 3", "t", "sum").names == {}


def test_what_is_no_tests_is_refused_by_name() -> None:
    for gold in ("assert (", "x" * 3 + " =", "(" * 5000):
        with pytest.raises(BadTests, match="column 't' are not valid Python"):
            read_suite(gold, "t")
    for other in (3, [1], [{"input": "1"}], {"inputs": [1], "outputs": []}):
        with pytest.raises(BadTests, match="column 't' is neither"):
            read_suite(other, "t")


def test_the_entry_point_is_given_or_the_prompts_or_the_last_function() -> None:
    program = "def a(): pass\ndef b(): pass\ndef _c(): pass"
    assert entry_point(program, "", "x") == "x"
    assert entry_point(program, "def q(n):\n    '''Doc.'''", None) == "q"
    assert (entry_point(program, "", None), entry_point("def (", "", None)) == ("b", None)


def test_check_calls_the_functions_that_the_prompt_defines_whole() -> None:
    check = "def check(candidate): assert helper(candidate(1)) == 2"
    helper = "import math\ndef helper(x): return math.floor(len(x))\ndef f(x):\n    'Doc.'\n"
    for prompt in (helper, f"Write f.\n```python\n{helper}```\nNow.", f"Write f.\n\n{helper}"):
        suite = read_suite(check, "t", "f", prompt)
        assert suite.tests[0][0] == ["code", "import math\ndef helper(x):\n    return math.floor(len(x))"]
        assert suite.names == {}
    for other in (
        "def helper(x): ...\ndef f(x): ...",
        "Use helper.",
        "def (",
    ):
        assert read_suite(check, "t", "f", other).names == {"helper": ""}
    assert read_suite(check, "t", "helper", helper).names == {"helper": ""}
    assert read_suite(f"{check}\ncheck(f)", "t", None, helper).names == {"f": ""}
    assert read_suite(f"{check}\ncheck(helper)", "t", None, helper).names == {"helper": ""}
    assert read_suite("assert helper(f(1)) == 2", "t", None, helper).names == {"f": ""}
    assert read_suite("assert helper(1) == 2", "t", None, "Mend it.\ndef helper(x): return x").names == {"helper": ""}
    calls = "def helper(x): return f(x)\ndef f(x): ..."
    assert read_suite(check, "t", "f", calls).names == {"f": ""}


def test_a_function_of_the_prompt_is_found_wherever_its_code_ends_and_with_its_constants() -> None:
    check = "def check(candidate): assert close(candidate(9), 3)"
    close = "LIMIT = 10 ** -4\ndef close(a: Number, b) -> Tuple: return abs(a - b) < LIMIT\n"
    for prompt in (
        f"Complete this:\n\n{close}def root(x):\n    'The root.'\n\nReturn only the code.",
        f"```\n{close}def root(x): ...\n```\nSo:\n```\n>>> root(4)\n2\n```",
        f"{close}def root(x):",
        f"{close}def root(x):  # its root",
        "close = lambda a, b: abs(a - b) < 1\ndef root(x): ...",
    ):
        assert read_suite(check, "t", "root", prompt).names == {}
    with pytest.raises(BadTests, match="use close, which the prompt defines by LIMIT, which it does not"):
        read_suite(check, "t", "root", "def close(a, b): return a - b < LIMIT\ndef root(x): ...")


def test_a_decorator_of_a_test_and_a_tolerance_are_not_the_programs() -> None:
    assert read_suite("@slow\ndef test_f(): assert abs(f(1) - 2) < EPS", "t").names == {"f": ""}
    assert read_suite("@memoize\ndef g(n): return n\nassert g(2) == 2", "t").names == {"memoize": ""}
    assert read_suite("@slow\ndef run(): assert f(1) == 2\nrun()", "t").names == {"f": ""}
    case = "import unittest\n@slow\nclass A(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 2)"
    assert read_suite(case, "t").names == {"f": ""}


def test_a_name_is_the_tests_own_only_in_the_scope_that_binds_it() -> None:
    assert read_suite("def run(add): assert add(1, 2) == 3\nrun(add)", "t").names == {"add": ""}
    assert read_suite("def g():\n    f = 1\n    return f\nassert f(g()) == [f(x) for x in [1]]", "t").names == {"f": ""}
    assert read_suite("def g():\n    global f\n    f = abs\ng()\nassert f(-1) == h(1)", "t").names == {"h": ""}
    assert read_suite("def f(x): return x\nassert f(1) == 1\nreturn", "t").names == {}


def test_functions_of_the_library_around_a_result_are_not_the_programs() -> None:
    for name in ("fabs", "floor", "isnan", "reduce", "randint"):
        assert read_suite(f"assert {name}(f(1)) == 2", "t").names["f"] == ""
        assert read_suite(f"assert {name}(f(1)) == 2", "t").names[name] != ""
        assert read_suite(f"assert {name}(1) == 2", "t").names == {name: ""}


def test_a_capital_name_is_a_class_only_if_the_tests_or_the_prompt_use_it_as_one() -> None:
    for text in (
        "assert abs(Mean([1, 2]) - 1.5) < 1e-6",
        "m = Mean([1, 2])\nassert 1.4 < m < 1.6",
        "import solution\nassert solution.Rev('abc').startswith('c')",
        "def check(candidate): assert 3 in candidate([1])",
        "import unittest\nclass A(unittest.TestCase):\n    def test(self): self.assertLess(Mean([1]), 2)",
        "import pytest\nwith pytest.raises(ValueError) as e: Mean([])\nassert e.value.args == ()",
        "from decimal import Decimal\nassert F(1) == [Decimal(1), Decimal(2)]",
    ):
        assert not read_suite(text, "t").objects, text
        assert read_suite(text, "t", prompt="Write a class.").objects
    for text in (
        "s = Stack([1])\ns.push(1)",
        "s = Stack()\nassert s.count(1) == 0",
        "s = Stack([1])\ns.append(2)\nassert s.pop() == 2",
        "assert Vector(1, 2) + Vector(3, 4) == Vector(4, 6)",
        "assert Vector(1, 2) * 3 == Vector(3, 6)",
        "a, b = 1, Vector(1)\nc = Vector(1)\nd = Vector(2)\nassert c != d",
        "assert max([Vector(1), Vector(2)])[0] == 2",
        "assert Solution().find(1) == 2",
        "assert isinstance(make(1), Node)",
        "import unittest\nclass A(unittest.TestCase):\n    def test(self): self.assertEqual(self.s.peek(), 2)",
    ):
        assert read_suite(text, "t").objects, text


def test_tests_that_need_the_program_in_their_process_abstain() -> None:
    for text in (
        "with open('x', 'w') as f: f.write('1')\nassert count('x') == 1",
        "import tempfile\nwith tempfile.TemporaryDirectory() as d: assert save(d) == 1",
        "class Mine(Base): pass\nassert Mine().x == 1",
        "class Mine(metaclass=Meta): pass\nassert Mine().x == 1",
        "class Mine:\n    x = Positive()\nMine().x = 1",
        "match parse('1'):\n    case Num(value=v): assert v == 1",
        "from unittest.mock import patch\n@patch('time.sleep')\ndef test_f(sleep): assert f(1) == 2",
        "from unittest import mock\nwith mock.patch.object(f, 'x'): assert f(1) == 2",
        "import unittest\nclass A(unittest.TestCase):\n    def test(self):\n        with self.assertLogs(): f(1)",
    ):
        with pytest.raises(BadTests, match="need what the sandbox lacks"):
            read_suite(text, "t")
    for text in (
        "from unittest.mock import patch\nwith patch('builtins.input', return_value='1'): assert f(1) == 2",
        "from unittest.mock import patch\n@patch('solution.g', return_value=1)\ndef test_f(g): assert f(1) == 2",
        "import unittest\nclass A(unittest.TestCase):\n    s = Stack()\n    def test(self): assert self.s.pop() == 1",
        "class Node:\n    def __init__(self, x): self.x = make(x)\nassert f(Node(1)) == 2",
        "from dataclasses import dataclass, field\n@dataclass\nclass P:\n    x: list = field(default_factory=list)\nassert f(P()) == 1",
        "assert open(1) == 2",
    ):
        assert "" in read_suite(text, "t").names.values(), text


def test_a_prompt_may_ask_for_a_change_in_place() -> None:
    assert read_suite("f(1)", "t", prompt="Sort it in-place.").in_place
    assert read_suite("f(1)", "t", prompt="Sort it\nIn Place").in_place
    assert not read_suite("f(1)", "t", prompt="Replace the placeholder in places.").in_place
