"""The process of the program, in a sandbox: it runs the program, then answers the calls of its tests.

It holds no test. It is told the arguments of a call and sends back the result, so that whatever the program changes in
this process, it can change its answers alone.
"""

from __future__ import annotations

import builtins
import copy
import importlib
import inspect
import io
import operator
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from types import ModuleType, SimpleNamespace
from typing import Any

from judges.verify.wire import PLAIN, Peer, may_have_effects, parameters_of, put, run_awaitable, signature_of


def serve(program: str, reading: int, writing: int) -> None:
    """Run `program` as the module `solution`, say so, and answer until the tests are done."""
    callee = Callee(reading, writing)
    module = sys.modules["solution"] = ModuleType("solution")
    callee.module = module
    exec(compile(program, "solution.py", "exec", dont_inherit=True), module.__dict__)
    builtins.input = lambda prompt="": callee.peer.ask("input", prompt)
    sys.stdin = Stdin(callee.peer)
    callee.peer.send(["ready"])
    while (message := callee.peer.receive()) is not None:
        callee.peer.answer(message)


class Callee:
    def __init__(self, reading: int, writing: int) -> None:
        self.module: ModuleType
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}
        self.handles: dict[int, Handle] = {}
        self.errors: dict[int, type[BaseException]] = {}  # the tests' own
        self.peer = Peer(
            reading,
            writing,
            handle=self.handle,
            export=self.export,
            resolve=self.resolve,
            error_to_json=self.error_to_json,
            error_from_json=self.error_from_json,
        )

    def number(self, value: Any) -> int:
        """What stands for `value` with the tests; it is kept, so that the number stays its own."""
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return self.numbers[id(value)]

    def export(self, value: Any) -> list[Any]:
        if type(value) is Handle:
            return ["handle", object.__getattribute__(value, "_number")]
        if type(value) is Made:
            value = value.value
        if isinstance(value, type) and issubclass(value, BaseException):
            return ["exception", self.lineage(value)]
        if inspect.iscoroutine(value):
            return ["coroutine", self.number(value)]
        is_class = isinstance(value, type)
        lineage = [self.number(kind) for kind in (value if is_class else type(value)).__mro__[:-1]]
        return ["object", self.number(value), lineage, is_class]

    def resolve(self, value: list[Any]) -> Any:
        match value:
            case ["object", int(number)]:
                return self.objects[number]
            case ["name", str(module), str(name)]:
                return getattr(importlib.import_module(module), name)
            case ["coroutine", int(number)]:

                async def run() -> Any:
                    return self.peer.ask("await", self.resolve(["handle", number]))

                return run()
            case ["handle", int(number)]:
                if number not in self.handles:
                    self.handles[number] = Handle(self.peer, number)
                return self.handles[number]
            case ["error", int(number), str(name), str(base)]:
                return self.errors.setdefault(number, type(name, (getattr(builtins, base),), {}))
        raise ValueError("a value that is none of the protocol's")

    def lineage(self, kind: type) -> list[list[Any]]:
        kinds = [base for base in kind.__mro__ if issubclass(base, BaseException)]
        return [
            [str(base.__module__), str(base.__qualname__), self.number(base), self.constants(base)] for base in kinds
        ]

    def constants(self, kind: type) -> dict[str, Any]:
        """The attributes of a class of the program's that are plain data."""
        own = vars(kind).items() if kind.__module__ == "solution" else ()
        return {str(name): self.peer.encode(value) for name, value in own if isinstance(value, PLAIN)}

    def error_to_json(self, error: BaseException) -> list[Any]:
        """Where the tests have it, if they raised it; else its lineage, arguments, text, attributes, and cause."""

        def plain(value: Any) -> Any:
            try:
                return self.peer.encode(value)
            except Exception:
                return repr(value)

        if (place := vars(error).get("_place")) is not None:
            return [place]
        attributes = {}
        for name in set(dir(error)).difference(dir(Exception)):
            if not name.startswith("_"):
                with suppress(Exception):
                    attributes[name] = plain(getattr(error, name))
        try:
            text = str(error)
        except Exception:
            text = ""
        cause = self.error_to_json(error.__cause__) if error.__cause__ else None
        return [self.lineage(type(error)), [plain(argument) for argument in error.args], text, attributes, cause]

    def error_from_json(self, error: list[Any]) -> BaseException:
        kind, arguments, place = error
        found = self.resolve(kind)
        if not issubclass(found, Exception):
            found = RuntimeError
        try:
            made: BaseException = found(*arguments)
        except Exception:  # one whose constructor wants more than a text
            made = found.__new__(found, *arguments)
        vars(made)["_place"] = place
        return made

    def handle(self, verb: str, *values: Any) -> Any:
        match verb, values:
            case "global", [name]:
                return getattr(self.module, name)
            case "has", [name]:
                return hasattr(self.module, name)
            case "getattr", [value, name]:
                return getattr(value, name)
            case "setattr", [value, name, item]:
                setattr(value, name, item)
                return None
            case "put", [value, name, content]:
                put(value, name, content)
                return None
            case "delattr", [value, name]:
                delattr(value, name)
                return None
            case "construct", [kind, arguments, named]:
                return self.error_to_json(kind(*arguments, **named))
            case "module", []:
                return self.module
            case "value", [value]:
                return value
            case "await", [value]:
                return run_awaitable(value)
            case "anext", [value]:
                try:
                    return True, run_awaitable(anext(value))
                except StopAsyncIteration:
                    return False, None
            case "next", [value]:
                try:
                    return True, next(value)
                except StopIteration as stop:
                    return False, stop.value
            case "call", [function, arguments, named, capture, effects]:
                return self.call(function, arguments, named, capture=capture, effects=effects)
            case "operator", [name, *operands]:
                function = OPERATORS.get(name) or getattr(operator, name)
                return function(*operands)
        raise ValueError(f"no verb {verb!r}")

    def call(
        self, function: Any, arguments: tuple[Any, ...], named: dict[str, Any], *, capture: bool, effects: str
    ) -> Any:
        """The result; the arguments afterwards, if they may have been changed; and the output, if it is captured."""
        output = io.StringIO()
        if capture:
            with redirect_stdout(output):
                result = function(*arguments, **named)
        else:
            result = function(*arguments, **named)
        made = isinstance(function, type) and function.__module__ == "solution"
        if made and not isinstance(result, BaseException):
            result = Made(result)
        changed = may_have_effects(result, effects)
        return result, ((arguments, named) if changed else None), output.getvalue()


class Stdin:
    """The standard input of the tests, which they may replace."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self._peer.ask("stdin", name, *arguments)

    def __iter__(self) -> Any:
        return iter(self.readline, "")


class Made:
    """An instance that a call of its class made: it crosses as itself, even if its class is derived from list."""

    def __init__(self, value: Any) -> None:
        self.value = value


OPERATORS: dict[str, Callable[..., Any]] = {
    "len": len, "iter": iter, "str": str, "repr": repr, "hash": hash, "bool": bool, "int": int, "float": float,
    "complex": complex, "round": round, "abs": abs, "reversed": reversed, "format": format, "divmod": divmod,
    "isinstance": isinstance, "hasattr": hasattr, "callable": callable, "is_function": inspect.isfunction,
    "has": lambda value, name: hasattr(type(value), name),
    "copy": copy.copy, "deepcopy": copy.deepcopy,
    "dataclass": lambda value, name, more, named: getattr(importlib.import_module("dataclasses"), name)(
        value, *more, **named
    ),
    "seed": lambda *seed: importlib.import_module("random").seed(*seed), "signature": parameters_of, "aiter": aiter,
    "recursion": sys.setrecursionlimit,
    "aenter": lambda value: run_awaitable(value.__aenter__()),
    "aexit": lambda value, kind, text: run_awaitable(value.__aexit__(kind, kind(text) if kind else None, None)),
    "enter": lambda value: value.__enter__(),
    "exit": lambda value, kind, text: value.__exit__(kind, kind(text) if kind else None, None),
}  # fmt: skip


class Handle:
    """An object of the tests, which they passed to the program: it can be called, and has what they let it have."""

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def _ask(self, verb: str, *values: Any) -> Any:
        peer: Peer = object.__getattribute__(self, "_peer")
        return peer.ask(verb, self, *values)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._ask("call", arguments, named)

    def __iter__(self) -> Any:
        return self._ask("iter")

    def __next__(self) -> Any:
        going, value = self._ask("next")
        if not going:
            raise StopIteration
        return value

    __doc__ = property(lambda self: self._ask("getattr", "__doc__"))

    def __getattr__(self, name: str) -> Any:
        if name == "__signature__":
            return signature_of(self._ask("getattr", name))
        if name == "__code__":
            rows = self._ask("getattr", "__signature__")
            names = tuple(name for name, kind, _ in rows if kind < inspect.Parameter.VAR_POSITIONAL)
            return SimpleNamespace(co_argcount=len(names), co_varnames=names)
        if name.startswith("_") and name not in ("__name__", "__qualname__", "__annotations__"):
            raise AttributeError(name)
        return self._ask("getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("setattr", name, value)

    def __len__(self) -> int:
        try:
            length: int = self._ask("operator", "len")
        except AttributeError as error:  # which `list(iterator)` would not take for "unknown"
            raise TypeError(*error.args) from None
        return length

    def __bool__(self) -> bool:
        return bool(self._ask("operator", "bool"))

    def __getitem__(self, key: Any) -> Any:
        return self._ask("operator", "getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("operator", "setitem", key, value)

    def __str__(self) -> str:
        return str(self._ask("operator", "str"))

    def __eq__(self, other: object) -> bool:
        return bool(self._ask("operator", "eq", other))

    def __hash__(self) -> int:
        number: int = object.__getattribute__(self, "_number")
        return number


for _name in ("lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "contains"):
    setattr(Handle, f"__{_name}__", lambda self, other, name=_name: self._ask("operator", name, other))


def main(program: str, reading: int, writing: int) -> None:
    try:
        serve(program, reading, writing)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
