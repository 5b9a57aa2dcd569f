"""A test's name for an object of the program, whose methods and operators are questions to it."""

from __future__ import annotations

import copy
import functools
import itertools
import sys
import types
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any

from judges.verify.wire import (
    LIBRARY,
    PLAIN,
    TYPES,
    VERDICTS,
    VIEWS,
    Derived,
    may_have_effects,
    signature_of,
    type_name,
)

if TYPE_CHECKING:
    from judges.verify.tester import Tester

ARITHMETIC = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift", "divmod",
)  # fmt: skip
SCALING = {"add", "mul", "truediv"}
"""Operators that may have a plain operand beside any object of a class whose name the tests use."""
COMPARISONS = (("eq", "ne"), ("lt", "le", "gt", "ge"))
CONTRADICTIONS = (("eq", "ne"), ("lt", "gt"), ("lt", "ge"), ("gt", "le"))
NUMERIC = (int, float, complex)
KNOWN = {*LIBRARY, "builtins.bytearray", "builtins.range", "collections.defaultdict"}
"""Types of the standard library whose values cross by value."""

SLOTS = ("_ref_is_class", "_ref_lineage", "_ref_made", "_ref_number", "_ref_tester")


class Items:
    """The items of an object of the program, each of which is asked for once, by iteration or by its number."""

    def __init__(self, tester: Tester, source: Ref) -> None:
        self.tester, self.source = tester, source  # an iterator
        self.found: list[Any] = []
        self.asked: dict[int, Any] = {}  # by number, before the iteration came there
        self.length: int | None = None  # as the object says
        self.place = 0  # of an iterator, how many it has given
        self.end: list[Any] = []  # what a generator returned, if all have been found

    def has(self, place: int) -> bool:
        while len(self.found) <= place and not self.end:
            going, value = self.tester.ask("next", self.source)
            if going is True:
                self.found.append(self.asked.pop(len(self.found), value))
            else:
                self.end.append(value)
            self.check()
        return place < len(self.found)

    def check(self) -> None:
        """Fail if there are more or fewer than the object says, or if others have been asked for by number."""
        count = len(self.found)
        if self.length is not None and (count > self.length or (self.end and count < self.length)):
            raise AssertionError("an object of the program has another number of items than it says")
        for number, answer in self.asked.items() if self.end else ():
            if answer not in (self.found[number:][:1] if -count <= number < 0 else self.found):
                raise AssertionError("an object of the program has items by number that it has not by iteration")

    def by_number(self, number: int, ask: Callable[[], Any]) -> Any:
        count = len(self.found)
        if (-count if self.end else 0) <= number < count:
            return self.found[number]
        if number not in self.asked:
            self.asked[number] = ask()
            self.check()
        return self.asked[number]

    def more(self) -> bool:
        return self.has(self.place)

    def next(self) -> Any:
        if not self.more():
            raise StopIteration(*self.end)
        self.place += 1
        return self.found[self.place - 1]

    def begin_anew(self) -> None:
        """An iterator that has ended may begin anew, with the same items."""
        if self.end and self.place:
            again = self.tester.ask("operator", "iter", self.source)
            if self.tester.ask("next", again)[0] is True:
                self.place = 0

    def __iter__(self) -> Iterator[Any]:
        place = 0
        while self.has(place):
            yield self.found[place]
            place += 1

    def __getitem__(self, part: slice) -> list[Any]:
        ends = [part.start, part.stop, part.step]
        if part.stop is not None and all(end is None or end >= 0 for end in ends):
            return list(itertools.islice(self, *ends))
        return list(self)[part]


class Union(tuple[Any, ...]):
    """`Leaf | Node | None`, of classes of the program."""

    def __or__(self, other: Any) -> Union:
        return Union((*self, *kinds_of(other)))

    def __ror__(self, other: Any) -> Union:
        return Union((*kinds_of(other), *self))


class Ref:
    """An object of the program: `Ref(tester, 4, {4, 5}, is_class=True)`, the class with number 4, derived from 5.

    `made`: the tests made it, by a call of its class, or it is a class that they call by its name.
    """

    __slots__ = SLOTS

    def __init__(self, tester: Tester, number: int, lineage: frozenset[int], is_class: bool, *, made: bool) -> None:
        for name, value in zip(SLOTS, (is_class, lineage, made, number, tester), strict=True):
            object.__setattr__(self, name, value)

    _ref_is_class: bool
    _ref_lineage: frozenset[int]
    _ref_made: bool
    _ref_number: int
    _ref_tester: Tester

    def _ref_ask(self, name: str, *operands: Any) -> Any:
        return self._ref_tester.ask("operator", name, self, *operands)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._ref_call("number" if self._ref_tester.in_place else "none", arguments, named)

    def _ref_call(self, effects: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        tester = self._ref_tester
        capture = sys.stdout is not sys.__stdout__
        result, changed, output = tester.ask("call", self, arguments, named, capture, effects)
        if output:
            sys.stdout.write(output)
        if changed is not None and may_have_effects(result, effects):
            refresh(arguments, changed[0])
            refresh(named, changed[1])
        if self._ref_is_class and self._ref_made and type(result) is Ref:  # not a class that the program gave
            return result._ref_as_made()
        return result

    def _ref_as_made(self) -> Ref:
        made = Ref(self._ref_tester, self._ref_number, self._ref_lineage, False, made=True)
        return self._ref_tester.made.setdefault(self._ref_number, made)

    def __copy__(self) -> Any:
        return self._ref_copy("copy")

    def __deepcopy__(self, memo: Any) -> Any:
        return self._ref_copy("deepcopy")

    def _ref_copy(self, name: str) -> Any:
        value = self._ref_ask(name)
        alike = type(value) is Ref and not value._ref_is_class and value._ref_lineage == self._ref_lineage
        return value._ref_as_made() if self._ref_made and alike else value

    def _ref_once(self, question: str, key: Any, ask: Callable[[], Any]) -> Any:
        """The answer to a question, which is asked once until a call may have changed the object."""
        if self._ref_made:
            return ask()
        tester, number = self._ref_tester, self._ref_number
        tester.settle()
        if (question, key) in tester.kept.get(number, {}):
            answer = tester.kept[number][question, key]
            if question == "attribute":
                tester.peer.lend(self, key, answer)
            return answer
        answer = ask()
        tester.kept.setdefault(number, {})[question, key] = answer
        return answer

    def _ref_has(self, name: str) -> bool:
        """Whether its class has a method."""
        return self._ref_once("has", name, lambda: self._ref_ask("has", name)) is True

    def _ref_attribute(self, name: str) -> Any:
        return self._ref_once("attribute", name, lambda: self._ref_tester.ask("getattr", self, name))

    def __getattr__(self, name: str) -> Any:
        value = self._ref_attribute(name)
        if self._ref_made or isinstance(value, PLAIN):
            return value
        if name in VERDICTS:
            return functools.partial(self._ref_untold, name, value)
        return functools.partial(self._ref_view, name, value) if name in VIEWS and type(value) is Ref else value

    def _ref_untold(self, name: str, method: Any, /, *arguments: Any, **named: Any) -> Any:
        """The answer of a method such as `count`, which is not told what is expected."""
        if arguments or named or type(method) is not Ref:
            raise AttributeError(f"{name!r} of a value is not asked of an object that the program made")
        return method()

    def _ref_view(self, name: str, method: Ref, /, *arguments: Any, **named: Any) -> Any:
        """What such a method gives; of a mapping, in its type, and from the keys and what it has by key."""
        if arguments or named:
            return method(*arguments, **named)
        content = self._ref_content(name, method)
        if self._ref_is_mapping():
            keys = dict.fromkeys(self._ref_keys())
            view = keys.keys() if name == "keys" else getattr({key: self._ref_item(key) for key in keys}, name)()
            return type(content)(view) if type(content) in (list, tuple, set) else view
        self._ref_only(name)
        if self._ref_has("__len__") and len(self) != len(content):
            raise AssertionError("an object of the program has another length than its keys, values or items")
        return copy.copy(content) if type(content) in (list, dict, set) else content

    def _ref_content(self, name: str, method: Any) -> Any:
        """What a method gives that is a question, after which nothing has changed."""

        def ask() -> Any:
            before = dict(self._ref_tester.kept)
            answer = method()
            answer = list(answer) if type(answer) is Ref else answer
            self._ref_tester.kept.clear()
            self._ref_tester.kept.update(before)
            return answer

        return self._ref_once("content", name, ask)

    def _ref_only(self, kind: str) -> None:
        """Have an object that is no mapping either items by key, or values, or items.

        Raises:
            TypeError: the test has used another of these of the object.
        """
        if kind != "keys" and self._ref_once("kind", None, lambda: kind) != kind:
            raise TypeError("an object of the program that is no mapping")

    def _ref_is_mapping(self) -> bool:
        return bool(self._ref_once("mapping", None, self._ref_find_mapping))

    def _ref_find_mapping(self) -> bool:
        """Whether it has items by key, and its keys are what it has by iteration."""
        if not (self._ref_has("keys") and self._ref_has("__getitem__")):
            return False
        keys = list(self._ref_content("keys", self._ref_attribute("keys")))
        items = self._ref_items() if self._ref_has("__iter__") else None
        return items is None or list(items) == keys

    def _ref_keys(self) -> list[Any]:
        """Of a mapping."""
        keys = list(self._ref_content("keys", self._ref_attribute("keys")))
        standing = set(map(self._ref_key, keys))
        length = self._ref_tester.kept.get(self._ref_number, {}).get(("len", None), len(keys))
        if not len(standing) == len(keys) == length:
            raise AssertionError("a mapping of the program has a key twice, or another length than it says")
        return keys

    def _ref_key(self, key: Any) -> Any:
        """What stands for a key in `kept`: itself, or a type and the number of what is no plain data."""
        if isinstance(key, tuple | frozenset):
            return (tuple if isinstance(key, tuple) else frozenset)(map(self._ref_key, key))
        if key is None or type(key) in (bool, int, float, complex, str, bytes):
            return key
        if type_name(type(key)) in LIBRARY and isinstance(key, Hashable):
            return key
        return (Ref, key._ref_number) if type(key) is Ref else (object, self._ref_tester.place(key))

    def _ref_item(self, key: Any) -> Any:
        return self._ref_once("item", self._ref_key(key), lambda: self._ref_ask("getitem", key))

    def __index__(self) -> int:
        if not self._ref_made:
            raise TypeError("an object that the program made is no index: it could be another one each time")
        return int(self._ref_ask("index"))

    def __setattr__(self, name: str, value: Any) -> None:
        self._ref_tester.ask("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        self._ref_tester.ask("delattr", self, name)

    def _ref_items(self) -> Items | None:
        """Its items, if it has any. Those of an iterator stay what they were, whatever is called."""
        stream = self._ref_tester.streams.get(self._ref_number)
        return stream or self._ref_once("items", None, self._ref_find_items)

    def _ref_find_items(self) -> Items | None:
        if not (self._ref_has("__iter__") or self._ref_has("__getitem__")):
            return None
        source = self._ref_ask("iter")
        if type(source) is not Ref:
            return None
        items = Items(self._ref_tester, source)
        if source._ref_number == self._ref_number and not (self._ref_has("__getitem__") or self._ref_has("__len__")):
            self._ref_tester.streams[self._ref_number] = items
        items.length = self._ref_tester.kept.get(self._ref_number, {}).get(("len", None))
        return items

    def __iter__(self) -> Any:
        if self._ref_made:
            items = self._ref_ask("iter")
            return self if same(self, items) else items
        stream, items = self._ref_tester.streams.get(self._ref_number), self._ref_items()
        if items is None:
            raise TypeError("an object of the program has no items")
        if self._ref_number not in self._ref_tester.streams:
            return iter(items)
        if stream:
            stream.begin_anew()
        return self

    def __reversed__(self) -> Any:
        return self._ref_ask("reversed") if self._ref_made else reversed(list(self))

    def __len__(self) -> int:
        length: int = self._ref_once("len", None, lambda: self._ref_ask("len"))
        items = self._ref_tester.kept.get(self._ref_number, {}).get(("items", None))
        if items is not None and not self._ref_made:
            items.length = length
            items.check()
        return length

    def __bool__(self) -> bool:
        truth = bool(self._ref_once("bool", None, lambda: self._ref_ask("bool")))
        by_length = not self._ref_made and self._ref_has("__len__") and not self._ref_has("__bool__")
        return truth and (not by_length or len(self) > 0)

    def __getitem__(self, key: Any) -> Any:
        """An item; a slice of those that it has by iteration; of a mapping, by one of its keys."""
        if self._ref_made or self._ref_is_class:
            return self._ref_ask("getitem", key)
        if self._ref_is_mapping():
            if self._ref_key(key) not in self._ref_once("keys", None, lambda: {*map(self._ref_key, self._ref_keys())}):
                raise KeyError(key)
        elif type(key) in (int, slice) and (items := self._ref_items()):
            if type(key) is slice:
                return items[key]
            number = key + len(self) if key < 0 and self._ref_has("__len__") else key
            return items.by_number(number if number >= 0 else key, lambda: self._ref_ask("getitem", key))
        elif type(key) is slice:
            raise TypeError("an object of the program that has no items by iteration")
        else:
            self._ref_only("item")
        return self._ref_item(key)

    def __next__(self) -> Any:
        kept = self._ref_tester.kept.pop(self._ref_number, {})
        self._ref_tester.kept[self._ref_number] = {key: kept[key] for key in kept if key[0] == "items"}
        if not self._ref_made and (stream := self._ref_items()):
            return stream.next()
        going, value = self._ref_tester.ask("next", self)
        if going is not True:
            raise StopIteration(value)
        return value

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """A function of the program's in a class of the tests is a method."""
        bound = instance is not None and not self._ref_is_class and self._ref_ask("is_function") is True
        return types.MethodType(self, instance) if bound else self

    def __contains__(self, item: Any) -> bool:
        if self._ref_made and not self._ref_is_class:
            return self._ref_ask("contains", item) is True
        return any(item is one or item == one for one in self)

    def __eq__(self, other: object) -> bool:
        if type(other) is not Ref:  # not NotImplemented, which counts as true if a test calls this by name
            value = self
            if not self._ref_is_class:
                value = self._ref_once("value", None, lambda: self._ref_tester.ask("value", self))
            return isinstance(value, Derived) and bool(value == other)
        if self._ref_number == other._ref_number:
            return True
        return self._ref_tester.own(self, other) and self._ref_compare("eq", other) is True

    def __ne__(self, other: object) -> bool:
        if type(other) is not Ref:
            return not self == other
        if not self._ref_tester.own(self, other):
            return not self == other
        return self._ref_number != other._ref_number and self._ref_compare("ne", other) is True

    def _ref_compare(self, name: str, other: Any) -> Any:
        """The answer to a comparison. The others of its kind are asked too: a program that says yes to all fails."""
        kind = next(names for names in COMPARISONS if name in names)
        answers: dict[str, Any] = {}
        for one in kind:  # always in this order, which is then all that the program knows of the question
            try:
                answer = self._ref_ask(one, other)
                answers[one] = bool(answer) if isinstance(answer, NUMERIC) else answer
            except Exception:
                if one == name:
                    raise
        if any(answers.get(a) is True and answers.get(b) is True for a, b in CONTRADICTIONS):
            raise AssertionError("its comparisons contradict each other")
        return answers[name]

    def __hash__(self) -> int:
        return self._ref_ask("hash") if self._ref_tester.own(self) else hash(self._ref_number)

    def __enter__(self) -> Any:
        value = self._ref_ask("enter")
        return self if same(self, value) else value

    async def __aenter__(self) -> Any:
        value = self._ref_ask("aenter")
        return self if same(self, value) else value

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        return self._ref_leave("exit", kind, error, trace)

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> bool:
        return self._ref_leave("aexit", kind, error, trace)

    def __await__(self) -> Any:
        yield from ()
        return self._ref_tester.ask("await", self)

    def __aiter__(self) -> Any:
        return self._ref_ask("aiter")

    async def __anext__(self) -> Any:
        going, value = self._ref_tester.ask("anext", self)
        if going is not True:
            raise StopAsyncIteration
        return value

    def _ref_leave(self, verb: str, kind: Any, error: Any, trace: Any) -> bool:
        if kind is None:
            return bool(self._ref_ask(verb, None, ""))
        text = "" if isinstance(error, AssertionError) else str(error)  # which says what is expected
        wanted = bool(self._ref_ask(verb, kind, text))
        # It suppresses no failed check, and nothing that keeps the tests from a check.
        frame = sys._getframe(2)
        place = frame.f_code.co_filename, frame.f_lineno
        places = {place, *_places(trace and trace.tb_next)}
        free = place[0].startswith("tests ") and places.isdisjoint(self._ref_tester.checking)
        return wanted and free and not issubclass(kind, AssertionError)

    def __instancecheck__(self, instance: Any) -> bool:
        instance = standing(instance)
        if type(instance).__module__ == "tests":  # as a protocol of the program's has it
            return self._ref_tester.ask("operator", "isinstance", instance, self) is True
        if type(instance) is not Ref or instance._ref_is_class:
            return False
        return self._ref_number in instance._ref_lineage or instance._ref_ask("isinstance", self) is True

    def __subclasscheck__(self, kind: Any) -> bool:
        return type(kind) is Ref and kind._ref_is_class and self._ref_number in kind._ref_lineage

    def __format__(self, layout: str) -> str:
        return str(self._ref_say("format", layout))

    def _ref_say(self, name: str, *rest: Any) -> Any:
        return self._ref_once(name, rest, lambda: self._ref_ask(name, *rest))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("an object of the program cannot be copied")


def for_effect(function: Any) -> Any:
    """What calls the function for what it does to its arguments: the tests do not use the result."""
    if type(function) is not Ref:
        return function
    return lambda *arguments, **named: function._ref_call("any", arguments, named)


def kinds_of(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, Union) else (type(None) if value is None else value,)


def same(one: Any, other: Any) -> bool:
    """Whether they are one object, as `is` has it. There may be two `Ref`s of an object."""
    one, other = standing(one), standing(other)
    return one is other or (type(one) is type(other) is Ref and one._ref_number == other._ref_number)


def assert_same(case: Any, one: Any, other: Any, msg: Any = None) -> None:
    if not same(one, other):
        case.fail(msg)


def assert_not_same(case: Any, one: Any, other: Any, msg: Any = None) -> None:
    if same(one, other):
        case.fail(msg)


def standing(value: Any) -> Any:
    """The object of the program that a value of plain data came from, if it is of a class of the program's own."""
    return value._object if isinstance(value, Derived) else value


def type_of(value: Any) -> Any:
    value = standing(value)
    if type(value) is not Ref:
        return type(value)
    kind = value._ref_tester.ask("getattr", value, "__class__")
    return kind if type(kind) is Ref else Ref


def is_instance(value: Any, kinds: Any) -> bool:
    """`isinstance`. Whether an object of the program is of a type of Python, the program says, as in
    `isinstance(f(3), Iterator)`, but not of an answer and a type of plain data.
    """
    if type(value) is not Ref:
        return isinstance(value, kinds)
    for kind in kinds if isinstance(kinds, tuple) else [kinds]:
        is_known = isinstance(kind, type) and kind.__module__.partition(".")[0] in sys.stdlib_module_names
        if type(kind) is Ref or not is_known or kind is object:
            found = isinstance(value, kind)
        else:
            is_plain = TYPES.get(kind.__name__) is kind or type_name(kind) in KNOWN
            found = (value._ref_made or not is_plain) and value._ref_ask("isinstance", kind) is True
        if found:
            return True
    return False


def has_attribute(value: Any, name: str) -> bool:
    if type(value) is Ref and name.startswith("__"):
        return value._ref_ask("hasattr", name) is True
    return hasattr(value, name)


def is_callable(value: Any) -> bool:
    return value._ref_ask("callable") is True if type(value) is Ref else callable(value)


def _places(trace: Any) -> Iterator[tuple[str, int]]:
    """The files and lines of the functions and statements that an error has passed through."""
    while trace:
        code = trace.tb_frame.f_code
        yield from ((code.co_filename, code.co_firstlineno), (code.co_filename, trace.tb_lineno))
        trace = trace.tb_next


def _unary(name: str, method: str) -> Callable[..., Any]:
    return lambda self, *rest: getattr(self, method)(name, *rest)


def _binary(name: str, *, swapped: bool = False) -> Callable[[Ref, Any], Any]:
    def method(self: Ref, other: Any) -> Any:
        tester, is_made = self._ref_tester, self._ref_made and not self._ref_is_class
        if name == "or_" and self._ref_is_class and isinstance(other, Ref | type | None):
            return other | Union((self,)) if swapped else Union((self,)) | other
        scaled = name.removeprefix("i") in SCALING and tester.own(self) and not self._ref_is_class
        if not (is_made or scaled or tester.own(self, other)):
            raise TypeError(f"{name!r} is not asked of an object that the program made")
        if name in COMPARISONS[1]:
            return self._ref_compare(name, other)
        result = tester.ask("operator", name, *((other, self) if swapped else (self, other)))
        if not is_made and not tester.own(result) and not tester.own(self, other):
            raise TypeError(f"{name!r} of an object that the program made gives another such object")
        return self if same(self, result) and name.startswith("i") else result

    return method


for _name in ("str", "repr", "int", "float", "complex", "round", "abs"):
    setattr(Ref, f"__{_name}__", _unary(_name, "_ref_say"))
for _name in ("neg", "pos", "invert", "setitem", "delitem"):
    setattr(Ref, f"__{_name}__", _unary(_name, "_ref_ask"))
for _name in ("lt", "le", "gt", "ge"):
    setattr(Ref, f"__{_name}__", _binary(_name))
for _name in ("__doc__", "__slots__", "__annotations__"):
    setattr(
        Ref, _name, property(functools.partial(lambda name, self: self._ref_tester.ask("getattr", self, name), _name))
    )
setattr(Ref, "__signature__", property(lambda self: signature_of(self._ref_ask("signature"))))  # noqa: B010
for _name in ARITHMETIC:
    _function = f"{_name}_" if _name in ("and", "or") else _name
    setattr(Ref, f"__{_name}__", _binary(_function))
    setattr(Ref, f"__r{_name}__", _binary(_function, swapped=True))
    if _name != "divmod":
        setattr(Ref, f"__i{_name}__", _binary(f"i{_name}"))


MUTABLE = (list, dict, set, bytearray, deque)


def refresh(old: Any, new: Any) -> None:
    """Give the tests' own containers within `old` the content that the program's copies have."""
    if not _alike(old, new):
        return
    if isinstance(old, list | tuple) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            if isinstance(before, MUTABLE) and _alike(before, after):
                refresh(before, after)
            elif isinstance(old, list):
                old[index] = after
    elif isinstance(old, list | bytearray):
        old[:] = new
    elif isinstance(old, dict):
        own = dict(old)
        if list(old) != list(new):  # in the program's order
            old.clear()
        for key, after in new.items():
            if isinstance(own.get(key), MUTABLE) and _alike(own[key], after):
                refresh(own[key], after)
                old[key] = own[key]
            else:
                old[key] = after
    elif isinstance(old, set):
        old.clear()
        old.update(new)
    elif isinstance(old, deque) and old != new:
        old.clear()
        old.extend(new)


def _alike(old: Any, new: Any) -> bool:
    return type(old) is type(new) or (isinstance(old, dict) and isinstance(new, dict))
