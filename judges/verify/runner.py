"""Runs the steps of tests in one namespace: against the program's sandbox, beside the program, or against stubs."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from judges.verify import pytest_subset
from judges.verify.guards import EVALUATING, restricted
from judges.verify.refs import (
    Ref,
    assert_not_same,
    assert_same,
    for_effect,
    has_attribute,
    is_callable,
    is_instance,
    same,
    type_of,
)
from judges.verify.wire import PLAIN

if TYPE_CHECKING:
    from judges.verify.tester import Tester

Step = list[Any]


class Namespace(dict[str, Any]):
    """The globals of tests, with `names` of a program that is in this process: plain data as it is at the time."""

    def __init__(self, program: ModuleType, names: Collection[str], own: dict[str, Any]) -> None:
        there = {name: vars(program)[name] for name in names if name in vars(program)}
        super().__init__({**own, **{name: value for name, value in there.items() if not isinstance(value, PLAIN)}})
        self.program, self.names = program, names

    def bind(self, tree: ast.AST) -> None:
        """Have the plain data that bodies of classes name, which do not ask `__missing__`, as their methods do."""
        bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        own = [part for body in bodies for part in body if not isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)]
        names = {node.id for part in own for node in ast.walk(part) if isinstance(node, ast.Name)}
        for name in names.intersection(self.names):
            if name not in self and name in vars(self.program):
                self[name] = vars(self.program)[name]

    def __missing__(self, name: str) -> Any:
        if name in self.names and hasattr(self.program, name):
            return getattr(self.program, name)
        raise KeyError(name)

    def attribute(self, name: str) -> Any:
        """An attribute of the module of the tests."""
        if name not in self:
            raise AttributeError(name)
        return self[name]


class Identities(ast.NodeTransformer):
    """Has tests call `same` for `is`, `type_of` for `type(x)` and `x.__class__`, and their `eval` for `builtins.eval`, and
    call by `for_effect` what is a statement.
    """

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.value, ast.Call):
            node.value.func = ast.Call(ast.Name("__effect__", ast.Load()), [node.value.func], [])
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        match node:
            case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot() as operator], comparators=[right]) if not any(
                isinstance(side, ast.Constant) for side in (left, right)
            ):
                call = ast.Call(ast.Name("__same__", ast.Load()), [left, right], [])
                return call if isinstance(operator, ast.Is) else ast.UnaryOp(ast.Not(), call)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "type" and len(node.args) == 1:
            node.func.id = "__type__"
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr == "__class__" and isinstance(node.ctx, ast.Load):
            return ast.Call(ast.Name("__type__", ast.Load()), [node.value], [])
        if node.attr in EVALUATING and ast.unparse(node.value) in ("builtins", "__builtins__"):
            return ast.Name(node.attr, node.ctx)
        return node


class Run:
    """Runs the steps of tests in one namespace.

    Args:
        tester: the wire; None if there is no program, or it is here.
        names: the names that the tests use and do not bind, with the module of each; "" is the program.
        texts: what the tests may evaluate, whatever it is; another text may be the program's.
        stub: makes what stands for a name of the program, if there is none.
        program: the program's module, if it is in this process.
    """

    def __init__(
        self,
        tester: Tester | None,
        names: dict[str, str],
        texts: Collection[str] = (),
        stub: Callable[[str], Stub] | None = None,
        program: ModuleType | None = None,
    ) -> None:
        self.tester, self.stub, self.program = tester, stub, program
        self.parts = 0
        module = sys.modules["tests"] = ModuleType("tests")
        sys.modules["solution"] = program or Solution(tester, stub)
        sys.modules["pytest"] = pytest_subset
        self.namespace = module.__dict__
        if program:
            own = {name for name, source in names.items() if not source}
            self.namespace = Namespace(program, own, module.__dict__)
            module.__dict__["__getattr__"] = self.namespace.attribute
        self.namespace.update(__same__=same, __type__=type_of, __effect__=for_effect)
        if tester:
            tester.namespace = self.namespace
            self.namespace.update(
                {function.__name__: restricted(function, texts) for function in (eval, exec, compile)}
            )
            self.namespace.update(isinstance=is_instance, hasattr=has_attribute, callable=is_callable)
            inspect.isinstance = is_instance  # type: ignore[attr-defined]
        for name, source in names.items():
            if source:
                found = importlib.import_module(source)
                self.namespace[name] = found if source == name else getattr(found, name)
            elif tester and tester.ask("has", name) is True:
                self.namespace[name] = tester.named(name)
                if type(self.namespace[name]) is not Ref:
                    tester.plain[name] = self.namespace[name]
            elif stub:
                self.namespace[name] = stub(name)

    def step(self, step: Step) -> None:
        match step:
            case ["code", source]:
                self.parts += 1
                tree, name = ast.parse(source), f"tests {self.parts}"
                if self.tester:
                    self.tester.checking |= {(name, line) for line in checking_blocks(tree)}
                if isinstance(self.namespace, Namespace):
                    self.namespace.bind(tree)
                else:
                    tree = ast.fix_missing_locations(Identities().visit(tree))
                exec(compile(tree, name, "exec", dont_inherit=True), self.namespace)
            case ["function", name]:
                pytest_subset.call(self.namespace[name], self.namespace)
            case ["check", name, entry]:
                self.namespace[name](self.candidate(entry))
            case ["method", owner, method]:
                self.method(self.namespace[owner], method)
            case ["call", name, arguments, expected]:
                self.compare(self.candidate(name), arguments, expected)

    def candidate(self, entry: str | None) -> Any:
        def missing(*arguments: Any, **named: Any) -> Any:
            raise NameError(f"the program has no {entry!r}")

        owner, _, name = (entry or "").rpartition("().")
        if name and self.stub:
            return self.stub(name)
        if not name or not (self.tester or self.program):
            return missing
        if not owner and not self.has(name) and self.has("Solution"):
            owner = "Solution"  # as LeetCode's programs have it
        if not owner:
            return self.named(name)
        made = self.named(owner)()
        return self.tester.ask("getattr", made, name) if self.tester else getattr(made, name)

    def has(self, name: str) -> bool:
        return self.tester.ask("has", name) is True if self.tester else hasattr(self.program, name)

    def named(self, name: str) -> Any:
        return self.tester.named(name) if self.tester else getattr(self.program, name)

    def method(self, owner: Any, method: str | None) -> None:
        """One test of a class of tests, or all of them."""
        import unittest.case

        if not self.program:
            unittest.case.isinstance = is_instance  # type: ignore[attr-defined]
            unittest.TestCase.assertIs = assert_same  # type: ignore[method-assign, assignment]
            unittest.TestCase.assertIsNot = assert_not_same  # type: ignore[method-assign, assignment]
        if not issubclass(owner, unittest.TestCase):
            pytest_subset.call_method(owner, str(method), self.namespace)
            return
        suite = (
            unittest.TestSuite([owner(method)]) if method else unittest.defaultTestLoader.loadTestsFromTestCase(owner)
        )
        result = unittest.TestResult()
        suite.run(result)
        for _, trace in (*result.errors, *result.failures):
            name = trace.strip().splitlines()[-1]
            if name.startswith("ModuleNotFoundError"):
                raise pytest_subset.Unsupported(name.partition(": ")[2])
        if not result.wasSuccessful() or not result.testsRun or result.skipped or result.unexpectedSuccesses:
            raise AssertionError("a test failed")

    def compare(self, candidate: Any, arguments: list[Any], expected: Any) -> None:
        """As APPS has it: the expected result may stand in a list, and tuples are lists."""
        result = plain_lists(candidate(*arguments))
        wanted = plain_lists(expected)
        if result != wanted and [result] != wanted:
            raise AssertionError("another result")


def checking_blocks(tree: ast.AST) -> Iterator[int]:
    """The lines of assertions, and of the `with` statements and functions that something is checked in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield node.lineno
        if isinstance(node, ast.With | ast.AsyncWith | ast.FunctionDef | ast.AsyncFunctionDef):
            names = [getattr(inner, "id", getattr(inner, "attr", "")) for inner in ast.walk(node)]
            is_with = isinstance(node, ast.With | ast.AsyncWith)
            checks = (ast.Assert, ast.If, ast.Compare, ast.Match) if is_with else (ast.Assert,)
            conditions = any(isinstance(inner, checks) for inner in ast.walk(node))
            if conditions or any(re.match("[Aa]ssert|check|expect|verify|fail|raises", str(name)) for name in names):
                yield min([node.lineno, *(first.lineno for first in getattr(node, "decorator_list", []))])


class Solution(ModuleType):
    """The module `solution`, for tests that import the program."""

    def __init__(self, tester: Tester | None, stub: Callable[[str], Stub] | None) -> None:
        super().__init__("solution")
        self.__dict__["__all__"] = []
        self.__dict__.update(_tester=tester, _stub=stub)

    def __getattr__(self, name: str) -> Any:
        asked = name.startswith("__") and name != "__version__"  # by the import system
        if asked or not (self._tester or self._stub):
            raise AttributeError(name)
        return self._stub(name) if self._stub else self._tester.named(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._tester:
            setattr(self._tester.ask("module"), name, value)

    def __delattr__(self, name: str) -> None:
        if self._tester:
            delattr(self._tester.ask("module"), name)


class Answer:
    """A result that equals everything and is true, or neither."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, agrees: bool) -> None:
        self._agrees = agrees

    def __bool__(self) -> bool:
        return self._agrees

    def __eq__(self, other: object) -> bool:
        return self._agrees

    def __ne__(self, other: object) -> bool:
        return not self._agrees

    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__


STUBS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "all": lambda arguments: Answer(True),
    "other": lambda arguments: Answer(False),
    "none": lambda arguments: None,
    "true": lambda arguments: True,
    "argument": lambda arguments: arguments[0] if arguments else None,
}
"""By kind, what each function of a program returns that does not know its task, to find tests that do not show this."""


class Stub:
    """A function of such a program, a class with such methods, or an object of that class."""

    __hash__ = object.__hash__

    def __init__(self, name: str, kind: str, called: set[str]) -> None:
        self._name, self._kind, self._called = name, kind, called

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self._name[:1].isupper():
            return Stub("", self._kind, self._called)
        self._called.add(self._name)
        return STUBS[self._kind](arguments)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return Stub(name, self._kind, self._called)

    def __eq__(self, other: object) -> bool:
        return self._kind == "all"


def plain_lists(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [plain_lists(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain_lists(item) for key, item in value.items()}
    return value


def run_all(run: Run, tests: list[list[Step]], report: int, passed: str) -> None:
    tester = run.tester
    for number, steps in enumerate(tests):
        try:
            for step in steps:
                run.step(step)
            if tester and tester.denied:
                raise AssertionError("an assertion failed in a callback")
        except (ModuleNotFoundError, pytest_subset.Unsupported) as error:
            if tester is None and run.program is None:  # with a program, the same
                os.write(report, f"unsupported {str(error)!a}\n".encode())
        except BaseException:
            continue
        else:
            os.write(report, f"{passed} {number}\n".encode())
