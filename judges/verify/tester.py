"""The process of the tests, in a sandbox: it runs them, and calls the program, which is in another sandbox.

Tests that pass so are run once more together with the program, in one process, as everybody runs them: between two
processes an object is a copy, threads take turns, and a function of the program may print unheard. What the program does
to that process gains it nothing.

The tests' names for the program's objects are `Ref`s. Plain data comes back by value. An object comes back as a `Ref`,
whose methods and operators are calls too, except those that hand the program a value of the tests and take its word for
the answer (`==`, `in`, `<`, `-`, `.startswith(...)`): these are asked of objects alone that the tests themselves made by
a class of the program, as in `Vector(1, 2)`, and `==` of two such objects. Otherwise an answer could equal everything.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import inspect
import operator
import os
import re
import sys
import types
from collections.abc import Callable, Collection, Iterator
from types import BuiltinFunctionType, ModuleType
from typing import Any, ClassVar

from judges.verify import pytest_subset
from judges.verify.refs import (
    ARITHMETIC,
    Items,
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
from judges.verify.wire import (
    LIBRARY,
    PLAIN,
    TYPES,
    VERDICTS,
    Peer,
    parameters_of,
    put,
    run_awaitable,
    type_name,
)

Step = list[Any]
NOT_FINITE = {"nan": r"(?i)\b(is)?nan\b", "inf": r"(?i)\b(is)?(inf|infinity|infinite|finite)\b"}
"""By number, how tests speak of it."""
CHANGES = {
    "call", "await", "anext", "aenter", "aexit", "setattr", "delattr", "setitem", "delitem", "enter", "exit",
    *(f"i{n}" for n in ARITHMETIC),
}  # fmt: skip
"""Questions after which an object of the program may have another length."""
READS = {"lt", "le", "gt", "ge", "getitem"}
EVALUATING: dict[str, Callable[..., Any]] = {"eval": eval, "exec": exec, "compile": compile}
COMPUTING = {
    "abs", "all", "any", "bool", "complex", "dict", "divmod", "float", "frozenset", "int", "len", "list", "max", "min", "pow",
    "range", "reversed", "round", "set", "sorted", "str", "sum", "tuple", "zip", "True", "False", "None",
}  # fmt: skip
EXPRESSIONS = (
    ast.Expression, ast.Constant, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.operator, ast.unaryop,
    ast.boolop, ast.cmpop, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Subscript, ast.Slice, ast.Call, ast.keyword,
    ast.Starred, ast.Name, ast.expr_context,
)  # fmt: skip
PICKLED = {("copyreg", "_reconstructor"), *(("builtins", name) for name in (*TYPES, "object", "range", "slice"))}
FILES = {"read", "readline", "readlines", "write", "writelines", "getvalue", "seek", "tell", "flush", "close"}


class Tester:
    """The tests' end of the wire.

    `in_place`: whether a function may change its arguments and return a number.
    `not_finite`: which of "nan" and "inf" are answers at all. `abs(f(2) - 3) > 1e-6` is False of no number.
    `objects`: whether the tests use objects. If not, a class of the program is only a function to them.
    """

    def __init__(
        self, reading: int, writing: int, not_finite: Collection[str], *, objects: bool, in_place: bool
    ) -> None:
        self.objects, self.in_place = objects, in_place
        self.peer = Peer(
            reading,
            writing,
            handle=self.handle,
            export=self.export,
            resolve=self.resolve,
            error_to_json=lambda error: [
                self.exception_to_json(type(error)),
                [] if isinstance(error, AssertionError) else [str(error)],
                self.place(error),
            ],
            error_from_json=self.error_from_json,
            not_finite=not_finite,
        )
        self.namespace: dict[str, Any] = {}  # of the tests
        self.plain: dict[str, Any] = {}  # names in it of plain data of the program, which its functions may change
        self.refs: dict[int, Ref] = {}
        self.made_by: set[int] = set()  # the classes whose names the tests use
        self.made: dict[int, Ref] = {}  # the objects that the tests made by them
        self.passed_on: list[Any] = []
        self.places: dict[int, int] = {}  # in it, by id
        self.exceptions: dict[int, type[BaseException]] = {}
        self.kept: dict[int, dict[tuple[str, Any], Any]] = {}  # by object and question, what was answered
        self.streams: dict[int, Items] = {}  # by iterator
        self.checking: set[tuple[str, int]] = set()  # the files and lines of `with` statements and functions that check
        self.denied = False  # whether an object of the tests has failed an assertion in a question of the program

    def ask(self, verb: str, *values: Any) -> Any:
        changes = verb in CHANGES or (verb == "operator" and values[0] in CHANGES)
        self.settle()
        if changes:
            self.kept.clear()
        try:
            return self.peer.ask(verb, *values)
        finally:
            for name, last in list(self.plain.items()) if changes else ():
                if self.namespace.get(name) is last:  # not one that the tests have bound since
                    self.namespace[name] = self.plain[name] = self.peer.ask("global", name)

    def settle(self) -> None:
        with self.peer.lock:
            if self.peer.settle():
                self.kept.clear()

    def named(self, name: str) -> Any:
        """What the program calls `name`. Raises AttributeError if it has none."""
        value = self.ask("global", name)
        if self.objects and type(value) is Ref and value._ref_is_class and name[:1].isupper():
            self.made_by.add(value._ref_number)
            return Ref(self, value._ref_number, value._ref_lineage, True, made=True)
        return value

    def own(self, *values: Any) -> bool:
        """Whether all are objects of classes whose names the tests use."""
        return all(type(value) is Ref and not self.made_by.isdisjoint(value._ref_lineage) for value in values)

    def exception_to_json(self, kind: type[BaseException]) -> list[Any]:
        if kind in self.exceptions.values():
            return ["object", next(number for number, one in self.exceptions.items() if one is kind)]
        if kind.__module__ != "tests":
            return ["name", kind.__module__, kind.__qualname__]
        base = next(one for one in kind.__mro__ if one.__module__ == "builtins")
        return ["error", self.place(kind), kind.__name__, base.__name__]

    def export(self, value: Any) -> list[Any]:
        if type(value) is Ref:
            return ["object", value._ref_number]
        if isinstance(value, type) and value in self.exceptions.values():
            return self.exception_to_json(value)
        module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
        if isinstance(value, type) and issubclass(value, BaseException) and module == "tests":
            return self.exception_to_json(value)
        if isinstance(value, type) and module == "builtins" and not hasattr(builtins, name):  # `generator`
            module, name = "types", next((key for key, kind in vars(types).items() if kind is value), "")
        is_known = isinstance(value, type) and str(module).partition(".")[0] in sys.stdlib_module_names
        is_function = isinstance(value, BuiltinFunctionType) and module in ("builtins", "_operator", "math")
        if (is_known or is_function) and name.isidentifier():
            return ["name", module, name]
        if inspect.iscoroutine(value):
            return ["coroutine", self.place(value)]
        return ["handle", self.place(value)]

    def place(self, value: Any) -> int:
        """Where `value` stands in what was passed on. A method of an object is made anew each time it is named."""
        if isinstance(value, types.MethodType | BuiltinFunctionType):
            value = next((one for one in self.passed_on if type(one) is type(value) and one == value), value)
        if id(value) not in self.places:
            self.places[id(value)] = len(self.passed_on)
            self.passed_on.append(value)
        return self.places[id(value)]

    def resolve(self, value: list[Any]) -> Any:
        match value:
            case ["object", int(number), list(lineage), bool(is_class)]:
                if number not in self.refs:
                    self.refs[number] = Ref(self, number, frozenset(lineage), is_class, made=False)
                return self.refs[number]
            case ["exception", list(lineage)]:
                kind = self.exception(lineage)
                # `except MyError` after a failed `assert False` is not to catch that.
                return type(kind.__name__, (kind,), {}) if issubclass(AssertionError, kind) else kind
            case ["handle", int(number)] if 0 <= number < len(self.passed_on):
                return self.passed_on[number]
            case ["coroutine", int(number)]:
                coroutine = Ref(self, number, frozenset(), False, made=False)

                async def run() -> Any:
                    return self.ask("await", coroutine)

                return run()
        raise ValueError("a value that is none of the protocol's")

    def exception(self, lineage: list[Any]) -> type[BaseException]:
        """The class of an exception of the program: the tests' own class of that name, or a new one."""
        (module, name, number, constants), *bases = lineage
        if number in self.exceptions:
            return self.exceptions[number]
        if module == "builtins":
            found = getattr(builtins, name, None)
        elif module.partition(".")[0] in sys.stdlib_module_names - {"unittest"}:
            found = getattr(sys.modules.get(module), name, None)
        else:
            base = self.exception(bases) if bases else Exception
            told = {key: self.peer.decode(value) for key, value in constants.items() if not key.startswith("_")}
            told = {key: value for key, value in told.items() if key not in VERDICTS and not hasattr(Exception, key)}

            def construct(error: BaseException, *arguments: Any, **named: Any) -> None:
                made = self.error_from_json(self.ask("construct", found, arguments, named))
                error.args, error.__class__ = made.args, type(made)
                vars(error).update(vars(made))

            own = base if issubclass(base, Exception) else Exception
            found = type(str(name), (own,), {**told, "__init__": construct})
        allowed = isinstance(found, type) and issubclass(found, (Exception, SystemExit))
        # One that ends a loop, or this process's patience, would end the test well.
        if not allowed or issubclass(found, (StopIteration, StopAsyncIteration)):  # type: ignore[arg-type]
            found = self.exception(bases) if module != "builtins" and bases else RuntimeError
        assert isinstance(found, type)
        self.exceptions[number] = found
        return found

    def error_from_json(self, error: list[Any]) -> BaseException:
        match error:
            case [int(place)] if isinstance(self.passed_on[place], Exception):  # what a function of the tests raised
                again: BaseException = self.passed_on[place]
                ends = isinstance(again, StopIteration | StopAsyncIteration) or type(again).__name__ == "SkipTest"
                return RuntimeError() if ends else again
        lineage, arguments, text, attributes, cause = error
        kind = self.exception(lineage)
        values = list(map(self.decoded, arguments))
        made = _raised(kind, values)
        if _text(made) != text:
            made = _raised(type(kind.__name__, (kind,), {"__str__": lambda self: str(text)}), values)
        for name, value in attributes.items():
            if (
                name.isidentifier()
                and not name.startswith("_")
                and not hasattr(Exception, name)
                and name not in VERDICTS
            ):
                setattr(made, name, self.decoded(value))
        made.__cause__ = self.error_from_json(cause) if cause else None
        return made

    def decoded(self, value: Any) -> Any:
        """A part of an exception. Its texts may have any word."""
        return value if isinstance(value, str) else self.peer.decode(value)

    def handle(self, verb: str, *values: Any) -> Any:
        """What the program asks of an object that the tests passed to it."""
        try:
            return self.answer(verb, *values)
        except AssertionError:  # a program that may go on would ask until it finds what is expected
            self.denied = True
            raise

    def answer(self, verb: str, *values: Any) -> Any:
        if verb == "input":
            return input(*values)
        if verb == "await" and inspect.iscoroutine(values[0]):
            return run_awaitable(values[0])
        if verb == "stdin" and values[0] in FILES:
            return getattr(sys.stdin, values[0])(*values[1:])
        target, *rest = values
        mine = getattr(type(target), "__module__", "") == "tests" and not isinstance(target, type)
        match verb, rest:
            case "call", [arguments, named] if callable(target) and type(target) is not Ref:
                return target(*arguments, **named)
            case "iter", []:
                return iter(target)
            case "next", []:
                for item in target:
                    return True, item
                return False, None
            case "getattr", [name] if not name.startswith("_") and (
                mine or name in FILES or is_part_of_mock(target, name)
            ):
                return getattr(target, name)
            case "getattr", ["__signature__"] if callable(target):
                return parameters_of(target)
            case "getattr", ["__name__" | "__qualname__" | "__doc__" | "__annotations__" as name]:
                return getattr(target, name)
            case "setattr", [str(name), value] if mine and may_be_set(target, name):
                setattr(target, name, value)
                return None
            case "put", [str(name), content] if mine and may_be_set(target, name):
                put(target, name, content)
                return None
            case "operator", ["len"] if mine:
                return len(target)
            case "operator", ["bool"]:
                return bool(target)
            case "operator", ["str"]:
                return str(target)
            case "operator", ["eq", other]:
                return target is other or bool(mine and target == other)
            case "operator", [str(name), other] if name == "contains" or (mine and name in (*ARITHMETIC, *READS)):
                return getattr(operator, name)(target, other)
            case "operator", ["setitem", key, value] if mine:
                target[key] = value
                return None
        raise AttributeError(f"{verb} is not possible here")


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


def may_be_set(target: Any, name: str) -> bool:
    """Whether the program may set an attribute of an object of the tests.

    Not a method, which may be the verdict, nor what all objects of the class share, which may be the expected value.
    """
    shared = getattr(type(target), name, None)
    return not name.startswith("_") and not callable(shared) and not isinstance(shared, list | dict | set | bytearray)


def is_part_of_mock(target: Any, name: str) -> bool:
    """Whether it is a method that a `Mock` stands in for, and none of its own, such as `assert_called_with`."""
    mocks = sys.modules.get("unittest.mock")
    return mocks is not None and isinstance(target, mocks.NonCallableMock) and not hasattr(type(target), name)


def _raised(kind: type[BaseException], values: list[Any]) -> BaseException:
    if kind.__module__.partition(".")[0] not in sys.stdlib_module_names:  # the program's: it has run its constructor
        return kind.__new__(kind, *values)
    try:
        return kind(*values)
    except Exception:  # one whose constructor wants more than it keeps
        return kind.__new__(kind, *values)


def _text(error: BaseException) -> str | None:
    try:
        return str(error)
    except Exception:
        return None


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


def restricted(function: Callable[..., Any], texts: Collection[str]) -> Callable[..., Any]:
    """`eval`, `exec` or `compile` for the tests: of an expression without attributes, if it is none of `texts`.

    Code of the program in this process could report that all tests pass. Nor may it name a variable of the tests,
    such as the expected value, unless a text of theirs computes with it, as "x + 1" does.
    """
    words = set().union(*map(variables, texts))

    def run(source: Any, *more: Any, **named: Any) -> Any:
        frame = sys._getframe(1)
        here = frame.f_globals, frame.f_locals
        text = ast.unparse(source) if isinstance(source, ast.AST) else source
        written = isinstance(text, str) and text in texts and not text.strip().isidentifier()
        if isinstance(text, str | bytes | bytearray) and not written:
            known = {
                name: value for scope in (*here, *more) if isinstance(scope, dict) for name, value in scope.items()
            }
            own = {name for name, value in known.items() if not is_of_program(value) and name not in words}
            if not is_harmless(text, own):
                raise ValueError("a text that the tests did not write is evaluated only if it computes")
        scopes = more or (() if function is compile else here)
        return function(source, *scopes, **named)

    return run


def variables(text: str) -> set[str]:
    """The names in a text, if it is an expression with an operator."""
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    computes = any(isinstance(node, ast.BinOp) for node in nodes)
    return {node.id for node in nodes if computes and isinstance(node, ast.Name)}


def is_of_program(value: Any) -> bool:
    """Whether a text of the program may name `value`: an object of the program, or a type of plain data."""
    return type(value) is Ref or (isinstance(value, type) and type_name(value) in LIBRARY)


def constants(tests: list[list[Step]]) -> set[str]:
    """The texts that the tests' code has."""
    trees = [ast.parse(step[1]) for steps in tests for step in steps if step[0] == "code"]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return {node.value for node in nodes if isinstance(node.value, str)}


def is_harmless(source: str | bytes | bytearray, denied: Collection[str] = ()) -> bool:
    """Whether it is an expression of constants, operators, containers, and calls of functions by names not `denied`."""
    try:
        nodes = list(ast.walk(ast.parse(source.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    for name in names:
        if name in denied or (name not in COMPUTING and (name.startswith("_") or name in dir(builtins))):
            return False
    return all(isinstance(node, EXPRESSIONS) for node in nodes)


def ask_for_fields() -> None:
    """Have the functions of `dataclasses` take objects of the program."""
    import dataclasses

    def asking(function: Callable[..., Any]) -> Callable[..., Any]:
        def ask(value: Any, *more: Any, **named: Any) -> Any:
            if type(value) is Ref:
                return value._ref_ask("dataclass", function.__name__, more, named)
            return function(value, *more, **named)

        return ask

    for name in ("asdict", "astuple", "fields", "is_dataclass", "replace"):
        setattr(dataclasses, name, asking(getattr(dataclasses, name)))


def seed_both(tester: Tester) -> None:
    """Have `random.seed` in the tests seed the program's `random` too."""
    import random

    seed = random.seed

    def seed_here_and_there(value: Any = None, version: int = 2) -> None:
        seed(value, version)
        tester.ask("operator", "seed", value, version)

    random.seed = seed_here_and_there  # type: ignore[assignment]


def limit_both(tester: Tester) -> None:
    """Have `sys.setrecursionlimit` in the tests set the program's limit too."""
    set_limit = sys.setrecursionlimit

    def set_here_and_there(limit: int) -> None:
        set_limit(limit)
        tester.ask("operator", "recursion", limit)

    sys.setrecursionlimit = set_here_and_there


def load_plain_pickles() -> None:
    """Have `pickle` read as its Python code does, and change no class: a pickle could put another check in a test's place."""
    import io
    import pickle

    plain: Any = vars(pickle)["_Unpickler"]

    class Unpickler(plain):
        dispatch: ClassVar[dict[int, Any]] = dict(plain.dispatch)

        def load_build(self) -> None:
            if isinstance(self.stack[-2], type | ModuleType):
                raise ValueError("a pickle that changes a class")
            super().load_build()

        dispatch[pickle.BUILD[0]] = load_build

    vars(pickle).update(
        Unpickler=Unpickler,
        load=lambda file, **more: Unpickler(file, **more).load(),
        loads=lambda data, **more: Unpickler(io.BytesIO(data), **more).load(),
    )


def watch_pickles(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: a pickle may be the program's, and makes nothing but plain data and objects of the tests' classes."""
    if event == "pickle.find_class":
        module, name = arguments[:2]
        own = module == "tests" and isinstance(vars(sys.modules[module]).get(name), type)
        if not own and f"{module}.{name}" not in LIBRARY and (module, name) not in PICKLED:
            raise ValueError(f"a pickle with {module}.{name}")


class Solution(ModuleType):
    """The module `solution`, for tests that import the program."""

    def __init__(self, tester: Tester | None, stub: Callable[[str], Stub] | None) -> None:
        super().__init__("solution")
        self.__dict__["__all__"] = []
        self.__dict__.update(_tester=tester, _stub=stub)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not (self._tester or self._stub):
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


def main(
    tests: list[list[Step]],
    names: dict[str, str],
    objects: bool,
    in_place: bool,
    reading: int | None,
    writing: int | None,
    report: int,
    program: str | None = None,
) -> None:
    """Write the number of each test that passes to the descriptor `report`.

    Without a program, then also of those that each kind of stub passes, and how many functions were called. `program` is
    one to run in this process.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    if program is not None:
        module = sys.modules["solution"] = ModuleType("solution")
        exec(compile(program, "solution.py", "exec", dont_inherit=True), module.__dict__)
        run_all(Run(None, names, program=module), tests, report, "passed")
        return
    tester: Tester | None = None
    text = repr(tests)
    if reading is not None and writing is not None:
        not_finite = [number for number, words in NOT_FINITE.items() if re.search(words, text)]
        tester = Tester(reading, writing, not_finite, objects=objects, in_place=in_place)
        if tester.peer.receive() != ["ready"]:
            return
        if "dataclasses" in text:
            ask_for_fields()
        if "random.seed" in text:
            seed_both(tester)
        if "setrecursionlimit" in text:
            limit_both(tester)
        if "pickle" in text:
            load_plain_pickles()
            sys.addaudithook(watch_pickles)
    texts = constants(tests) if re.search(r"\b(eval|exec|compile)\b", text) else ()
    run_all(Run(tester, names, texts), tests, report, "passed")
    if tester is None:
        os.write(report, b"ended\n")
        for kind in STUBS:
            called: set[str] = set()
            stub = functools.partial(Stub, kind=kind, called=called)
            run_all(Run(None, names, stub=stub), tests, report, kind)
            os.write(report, f"called {kind} {len(called)}\n".encode())


def run_all(run: Run, tests: list[list[Step]], report: int, passed: str) -> None:
    tester = run.tester
    for number, steps in enumerate(tests):
        if tester:
            tester.denied = False
        try:
            for step in steps:
                run.step(step)
            if tester and tester.denied:
                raise AssertionError("an assertion failed in a callback")
        except (ModuleNotFoundError, pytest_subset.Unsupported) as error:
            if tester is None and run.stub is None and run.program is None:  # with a program, the same
                os.write(report, f"unsupported {str(error)!a}\n".encode())
        except BaseException:
            continue
        else:
            os.write(report, f"{passed} {number}\n".encode())
