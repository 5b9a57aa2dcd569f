"""Plain data as JSON between two processes that call each other: the tests' and the program's.

A value crosses by value if it is plain: None, bool, int, float, complex, str, bytes, containers of plain data, and the
types of `LIBRARY`. An instance of a class derived from one of these crosses as the base type's value: whatever methods
the class overrides stay behind, and its others are asked of the object. Anything else crosses as a number that stands
for it (`Peer.export`).

Decoding makes these types alone, whatever the other process sends. Both processes run this file; it imports only what
starts fast.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Collection, ItemsView, KeysView, ValuesView
from typing import Any

LIBRARY: dict[str, Callable[[Any], tuple[Any, ...]]] = {  # by name, the arguments that make an equal value
    "decimal.Decimal": lambda value: (str(value),),
    "fractions.Fraction": lambda value: (value.numerator, value.denominator),
    "datetime.timedelta": lambda value: (value.days, value.seconds, value.microseconds),
    "datetime.datetime": lambda value: (value.isoformat(),),
    "datetime.date": lambda value: (value.isoformat(),),
    "datetime.time": lambda value: (value.isoformat(),),
    "collections.deque": lambda value: (list(value), value.maxlen),
    "collections.Counter": lambda value: (dict(value),),
    "collections.OrderedDict": lambda value: (list(value.items()),),
    "uuid.UUID": lambda value: (str(value),),
    "pathlib.PosixPath": lambda value: (str(value),),
}
CONTAINERS: dict[str, type] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
TYPES = {
    kind.__name__: kind for kind in (int, float, complex, bool, str, bytes, *CONTAINERS.values(), dict, type(None))
}
PLAIN = (int, float, complex, str, bytes, bytearray, dict, *CONTAINERS.values())
VIEWS: dict[str, Any] = {"keys": KeysView, "values": ValuesView, "items": ItemsView}
SMALL = 1 << 53
WORDS = {"nan": r"(?i)\bs?nan(\d+|j)?\b", "inf": r"(?i)\binf(inity)?j?\b"}
"""By number that is not finite, the words that `float` and JSON read as it."""
NUMBERS = r"(?i)\b\d[\d_]*(?:\.[\d_]*(?:e\+?[\d_]+)?|e\+?[\d_]+)(?!\w)"
"""Numbers in a text, with a point or an exponent, that may be too large for a float."""
VERDICTS = {  # methods that are told what is expected
    "count", "index", "find", "rfind", "rindex", "startswith", "endswith", "issubset", "issuperset", "isdisjoint", "is_relative_to",
    "union", "replace", "strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "partition", "rpartition", "difference", "symmetric_difference", "intersection", "equals", "compare", "__contains__", "__eq__", "__ne__", "__lt__",
    "__le__", "__gt__", "__ge__", "__sub__", "__rsub__", "__truediv__", "__floordiv__", "__mod__", "__xor__", "__and__",
}  # fmt: skip


class Derived:
    """What an instance of a class derived from plain data is here: the base type's value, and the object's attributes.

    Not its `keys`, `values` and `items`: the base type would not know how many there must be.
    """

    _object: Any

    def __str__(self) -> str:
        return str(self._object) if "_object" in vars(self) else super().__str__()

    def __repr__(self) -> str:
        return repr(self._object) if "_object" in vars(self) else super().__repr__()

    def __format__(self, layout: str) -> str:
        return format(self._object, layout) if "_object" in vars(self) else super().__format__(layout)

    def __getattr__(self, name: str) -> Any:
        if name == "_object" or name.startswith("__") or name in VERDICTS or name in VIEWS:
            raise AttributeError(name)
        return getattr(self._object, name)


_DERIVED: dict[type, type] = {}


def _derived(value: Any, standing: Any) -> Any:
    base = type(value)
    if base not in _DERIVED:
        _DERIVED[base] = type(base.__name__, (Derived, base), {})
    made = _DERIVED[base](*value) if hasattr(base, "_fields") else _DERIVED[base](value)
    made._object = standing
    return made


def parameters_of(function: Any) -> list[tuple[str, int, bool]]:
    """The parameters of a function, each with its kind and whether it has a default."""
    import inspect

    parameters = inspect.signature(function).parameters.values()
    return [(one.name, int(one.kind), one.default is not one.empty) for one in parameters]


def signature_of(parameters: list[tuple[str, int, bool]]) -> Any:
    from inspect import Parameter, Signature, _ParameterKind

    defaults = {True: None, False: Parameter.empty}
    return Signature([Parameter(name, _ParameterKind(kind), default=defaults[has]) for name, kind, has in parameters])


def type_name(kind: type) -> str:
    """As in `LIBRARY`: "decimal.Decimal"."""
    return f"{kind.__module__}.{kind.__qualname__}"


def may_have_effects(result: Any, effects: str) -> bool:
    """Whether a call with this result may have changed its arguments.

    `effects`: "any" if the tests do not use the result, "number" if the prompt asks for a change in place, else "none".
    """
    return result is None or effects == "any" or (effects == "number" and isinstance(result, int))


def put(owner: Any, name: str, content: Any) -> None:
    """Give a container, which is an attribute of `owner`, another content."""
    match getattr(owner, name), content:
        case (list() as container, list()) | (bytearray() as container, bytearray()):
            container[:] = content
        case (dict() as container, dict()) | (set() as container, set()):
            container.clear()
            container.update(content)
        case _:
            setattr(owner, name, content)


_LOOPS: list[Any] = []


def run_awaitable(awaitable: Any) -> Any:
    """The result of an awaitable. It has the event loop of the one before, or within that one's, another."""
    import asyncio

    async def run() -> Any:
        return await awaitable

    outer = asyncio._get_running_loop()
    loop = next((loop for loop in _LOOPS if not loop.is_running()), None)
    if loop is None:
        loop = asyncio.new_event_loop()
        _LOOPS.append(loop)
    asyncio._set_running_loop(None)
    try:
        return loop.run_until_complete(run())
    finally:
        asyncio._set_running_loop(outer)


class Peer:
    """One end of a pair of pipes. Both ends may ask; an answer is waited for, and questions meanwhile are answered.

    Args:
        reading, writing: descriptors.
        handle: the answer to a question of the other end, called with its verb and values.
        export: what stands for a value that is not plain, as JSON.
        resolve: the value that such JSON stands for.
        error_to_json, error_from_json: turn an exception into JSON, and a JSON of the other end into one to raise.
        not_finite: which of "nan" and "inf" the other end may send.
        keeps: whether this end itself holds a container that is an attribute of the other end's, once.
    """

    def __init__(
        self,
        reading: int,
        writing: int,
        *,
        handle: Callable[..., Any],
        export: Callable[[Any], list[Any]],
        resolve: Callable[[list[Any]], Any],
        error_to_json: Callable[[BaseException], list[Any]],
        error_from_json: Callable[[list[Any]], BaseException],
        not_finite: Collection[str] = ("nan", "inf"),
        keeps: Callable[[Any, str, Any], bool] = lambda owner, name, container: False,
    ) -> None:
        self.keeps = keeps
        self.reading, self.writing, self.not_finite = reading, writing, not_finite
        self.handle, self.export, self.resolve = handle, export, resolve
        self.error_to_json, self.error_from_json = error_to_json, error_from_json
        self.lock = threading.RLock()
        self.lent: list[tuple[Any, str, Any, Any]] = []  # owner, attribute, its container, and that encoded

    def ask(self, verb: str, *values: Any) -> Any:
        """The other end's answer; raises the exception that it met."""
        with self.lock:
            self.settle()
            answer = self._ask(verb, *values)
            if verb == "getattr":
                owner, name = values
                self.lend(owner, name, answer)
            return answer

    def lend(self, owner: Any, name: str, answer: Any) -> None:
        """Note a container that is an attribute of the other end's, and may be changed here."""
        if type(answer) in (list, dict, set, bytearray) and not any(answer is lent for _, _, lent, _ in self.lent):
            self.lent.append((owner, name, answer, self.encode(answer)))

    def settle(self) -> bool:
        """Change the other end's containers as this end has changed its copies, as in `node.children.append(leaf)`.

        Whether there was one to change.
        """
        lent, self.lent = self.lent, []
        changed = False
        for owner, name, container, before in lent:
            if (now := self.encode(container)) != before:
                self._ask("put", owner, name, container)
                changed = True
            here = 3 + self.keeps(owner, name, container)  # the tuple, `container`, and the argument
            if sys.getrefcount(container) > here:
                self.lent.append((owner, name, container, now))
        return changed

    def _ask(self, verb: str, *values: Any) -> Any:
        self.send(["ask", verb, [self.encode(value) for value in values]])
        while True:
            message = self.receive()
            if message is None:
                raise EOFError("the program has ended")
            match message:
                case ["ask", str(), list()]:
                    self.answer(message)
                case ["is", value]:
                    return self.decode(value)
                case ["raised", list(error)]:
                    met = self.error_from_json(error)
                    raise met from met.__cause__
                case _:
                    raise ValueError("a message that is none of the protocol's")

    def answer(self, message: list[Any]) -> None:
        try:
            result = self.handle(message[1], *map(self.decode, message[2]))
            self.settle()
            reply = ["is", self.encode(result)]
        except BaseException as error:
            reply = ["raised", self.error_to_json(error)]
        self.send(reply)

    def send(self, message: list[Any]) -> None:
        data = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")  # two surrogates stay two
        rest = memoryview(len(data).to_bytes(8, "little") + data)
        while rest:
            rest = rest[os.write(self.writing, rest) :]

    def receive(self) -> Any:
        """The next message, or None after the last."""
        if (head := self._read(8)) is None:
            return None
        data = self._read(int.from_bytes(head, "little"))
        return None if data is None else json.loads(data.decode("utf-8", "surrogatepass"))

    def _read(self, count: int) -> bytes | None:
        parts = []
        while count:
            data = os.read(self.reading, min(count, 1 << 20))
            if not data:
                return None
            parts.append(data)
            count -= len(data)
        return b"".join(parts)

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, Derived):
            return self.export(value._object)
        if value is None or kind is bool or kind is str or kind is float or (kind is int and -SMALL < value < SMALL):
            return value
        if isinstance(value, type) and TYPES.get(value.__name__) is value:
            return ["type", value.__name__]
        if (name := type_name(kind)) in LIBRARY:
            return ["library", name, self.encode(LIBRARY[name](value))]
        if kind.__module__ == "solution" and isinstance(value, PLAIN):
            return ["derived", self._plain(value), self.export(value)]
        return self._plain(value)

    def _plain(self, value: Any) -> Any:
        kind = type(value)
        match value:  # by the base type's own methods
            case int():
                number = int.__index__(value)
                return number if -SMALL < number < SMALL else ["int", hex(number)]
            case float():
                return float.__float__(value)
            case complex():
                return ["complex", complex.__repr__(value)]
            case str():
                return str.__str__(value)
            case bytes() | bytearray():
                return [("bytearray" if isinstance(value, bytearray) else "bytes"), bytes(value).decode("latin-1")]
            case dict():
                return ["dict", [[self.encode(key), self.encode(item)] for key, item in dict.items(value)]]
            case range() | slice():
                return [kind.__name__, [self.encode(part) for part in (value.start, value.stop, value.step)]]
            case tuple() if isinstance(fields := getattr(kind, "_fields", None), tuple):
                items = [self.encode(item) for item in tuple.__iter__(value)]
                return ["namedtuple", kind.__name__, [str(field) for field in fields], items]
        for tag, base in CONTAINERS.items():
            if isinstance(value, base):
                return [tag, [self.encode(item) for item in base.__iter__(value)]]  # type: ignore[attr-defined]
        for tag, view in VIEWS.items():
            if isinstance(value, view):
                return ["view", tag, [self.encode(item) for item in value]]
        return self.export(value)

    def decode(self, value: Any) -> Any:
        match value:
            case None | bool() | int():
                return value
            case str():
                return self._text(value)
            case float():
                return value if value - value == 0 else self._number(value)
            case ["int", str(digits)]:
                return int(digits, 16)
            case ["complex", str(text)]:
                return self._number(complex(text))
            case ["bytes", str(text)]:
                return self._text(text).encode("latin-1")
            case ["bytearray", str(text)]:
                return bytearray(self._text(text).encode("latin-1"))
            case ["dict", list(items)]:
                return {self.decode(key): self.decode(item) for key, item in items}
            case ["range" | "slice" as tag, [start, stop, step]]:
                return {"range": range, "slice": slice}[tag](*map(self.decode, (start, stop, step)))
            case ["view", "keys", list(items)]:
                return dict.fromkeys(map(self.decode, items)).keys()
            case ["view", "values", list(items)]:
                return dict(enumerate(map(self.decode, items))).values()
            case ["view", "items", list(items)]:
                return dict(map(self.decode, items)).items()
            case ["derived", plain, list(standing)]:
                value = self.decode(plain)
                if not isinstance(value, PLAIN):
                    raise ValueError("a value that is not plain")
                return _derived(value, self.resolve(standing))
            case ["type", str(name)]:
                return TYPES[name]
            case ["namedtuple", str(name), list(fields), list(items)]:
                values = list(map(self.decode, items))
                methods = {field for field, item in zip(fields, values, strict=True) if callable(item)}
                if methods & (VERDICTS | {"keys", "values", "items"}):
                    raise ValueError("a field that stands in for a method")
                return _named_tuple(name, tuple(fields))(*values)
            case ["library", str(name), ["tuple", list(arguments)]] if name in LIBRARY:
                module, _, attribute = name.partition(".")
                made = getattr(importlib.import_module(module), attribute)
                value = getattr(made, "fromisoformat", made)(*map(self.decode, arguments))
                return self._number(value) if attribute == "Decimal" else value
            case [str(tag), list(items)] if tag in CONTAINERS:
                return CONTAINERS[tag](map(self.decode, items))
            case list():
                return self.resolve(value)
        raise ValueError("a value that is none of the protocol's")

    def _text(self, text: str) -> str:
        """The text, if the tests can make no number of it that may not be sent."""
        for kind, words in WORDS.items():
            if kind not in self.not_finite and re.search(words, text):
                raise ValueError(f"{kind} is not expected")
        if "inf" not in self.not_finite:
            for number in re.findall(NUMBERS, text):
                if float(number.replace("_", "")) == float("inf"):
                    raise ValueError("inf is not expected")
        return text

    def _number(self, value: Any) -> Any:
        for kind in ("nan", "inf"):
            if kind in str(value).lower() and kind not in self.not_finite:
                raise ValueError(f"{value} is not expected")
        return value


_NAMED_TUPLES: dict[tuple[str, tuple[str, ...]], type] = {}


def _named_tuple(name: str, fields: tuple[str, ...]) -> type:
    import collections

    if (name, fields) not in _NAMED_TUPLES:
        _NAMED_TUPLES[name, fields] = collections.namedtuple(name, fields)
    return _NAMED_TUPLES[name, fields]
