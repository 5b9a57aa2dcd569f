"""The process of the tests, in a sandbox: it runs them, and calls the program, which is in another sandbox.

Tests that pass so are run once more together with the program, in one process, as everybody runs them: between two
processes an object is a copy, threads take turns, and a function of the program may print unheard. What the program does
to that process gains it nothing.

The tests' names for the program's objects are `Ref`s. Plain data comes back by value. An object comes back as a `Ref`,
whose methods and operators are calls too, except those that hand the program a value of the tests and take its word for
the answer (`==`, `in`, `<`, `-`, `.startswith(...)`): these are asked of objects alone that the tests themselves made by
a class of the program, as in `Vector(1, 2)`, and `==` of two such objects. Otherwise an answer could equal everything.
Of any other object, each question is asked once until a call may have changed it, so that its answers agree.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import operator
import os
import re
import sys
import types
from collections.abc import Collection
from types import BuiltinFunctionType, ModuleType
from typing import Any

from judges.verify.guards import ask_for_fields, constants, limit_both, load_plain_pickles, seed_both, watch_pickles
from judges.verify.refs import ARITHMETIC, Items, Ref
from judges.verify.runner import STUBS, Run, Step, Stub, run_all
from judges.verify.wire import PLAIN, VERDICTS, Peer, parameters_of, put, run_awaitable

NOT_FINITE = {"nan": r"(?i)\b(is)?nan\b", "inf": r"(?i)\b(is)?(inf|infinity|infinite|finite)\b"}
"""By number, how tests speak of it."""
CHANGES = {
    "call", "await", "anext", "aenter", "aexit", "setattr", "delattr", "setitem", "delitem", "enter", "exit",
    *(f"i{n}" for n in ARITHMETIC),
}  # fmt: skip
"""Questions after which an object of the program may answer otherwise."""
READS = {"lt", "le", "gt", "ge", "getitem"}
FILES = {"read", "readline", "readlines", "write", "writelines", "getvalue", "seek", "tell", "flush", "close"}


class Tester:
    """The tests' end of the wire.

    `in_place`: whether a function may change its arguments and return a number.
    `not_finite`: which of "nan" and "inf" are answers at all. `abs(f(2) - 3) > 1e-6` is False of no number.
    `objects`: whether the tests use objects. If not, a class of the program is only a function to them, as are `functions`.
    """

    def __init__(
        self,
        reading: int,
        writing: int,
        not_finite: Collection[str],
        *,
        objects: bool,
        functions: Collection[str],
        in_place: bool,
    ) -> None:
        self.objects, self.functions, self.in_place = objects, functions, in_place
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
            keeps=self.keeps,
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
        self.questions = 0  # how many are being asked that change nothing
        # Whether an object of the tests has failed an assertion when the program called it. The program then knows what is
        # not expected, and no later test passes.
        self.denied = False

    def ask(self, verb: str, *values: Any) -> Any:
        with self.peer.lock:
            changes = not self.questions and (verb in CHANGES or (verb == "operator" and values[0] in CHANGES))
            self.settle()
            if changes:
                self.kept.clear()
            self.questions += not changes
            try:
                return self.peer.ask(verb, *values)
            finally:
                self.questions -= not changes
                if changes:
                    self.kept.clear()
                for name, last in list(self.plain.items()) if changes else ():
                    if self.namespace.get(name) is last:  # not one that the tests have bound since
                        self.namespace[name] = self.plain[name] = self.peer.ask("global", name)

    def settle(self) -> None:
        with self.peer.lock:
            if self.peer.settle():
                self.kept.clear()

    def keeps(self, owner: Any, name: str, container: Any) -> bool:
        return self.kept.get(owner._ref_number, {}).get(("attribute", name)) is container

    def named(self, name: str) -> Any:
        """What the program calls `name`. Raises AttributeError if it has none."""
        value = self.ask("global", name)
        is_class = self.objects and name[:1].isupper() and name not in self.functions
        if is_class and type(value) is Ref and value._ref_is_class:
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
            if name.isidentifier() and not name.startswith("_") and not hasattr(Exception, name):
                told = self.decoded(value)
                if name not in VERDICTS or isinstance(told, PLAIN):
                    setattr(made, name, told)
        made.__cause__ = self.error_from_json(cause) if cause else None
        return made

    def decoded(self, value: Any) -> Any:
        """A part of an exception. Its texts may have any word."""
        return value if isinstance(value, str) else self.peer.decode(value)

    def handle(self, verb: str, *values: Any) -> Any:
        """What the program asks of an object that the tests passed to it."""
        if not self.questions:  # it is called, and may have changed
            self.kept.clear()
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


def main(
    tests: list[list[Step]],
    names: dict[str, str],
    objects: bool,
    functions: Collection[str],
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
        tester = Tester(reading, writing, not_finite, objects=objects, functions=functions, in_place=in_place)
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
