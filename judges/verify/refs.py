"""A test's name for an object of the program, whose methods and operators are questions to it."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from judges.verify.wire import LIBRARY, PLAIN, TYPES, VERDICTS, Derived, may_have_effects, signature_of, type_name

if TYPE_CHECKING:
    from judges.verify.tester import Tester

ARITHMETIC = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift", "divmod",
)  # fmt: skip
SCALING = {"add", "mul", "truediv"}
"""Operators that may have a plain operand beside any object of a class whose name the tests use."""
COMPARISONS = (("eq", "ne"), ("lt", "le", "gt", "ge"))
CONTRADICTIONS = (("eq", "ne"), ("lt", "gt"), ("lt", "ge"), ("gt", "le"))
CONTRADICTED = "an object of the program contradicts itself"
NUMBERS = (int, float, complex)
KNOWN = {*LIBRARY, "builtins.bytearray", "builtins.range", "collections.defaultdict"}
"""Types of the standard library whose values cross by value."""
GONE = (math.inf, math.inf)
"""The size of an iterator that has given items: it has no length."""

SLOTS = ("_ref_is_class", "_ref_lineage", "_ref_made", "_ref_number", "_ref_tester")


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

    def __getattr__(self, name: str) -> Any:
        value = self._ref_tester.ask("getattr", self, name)
        self._ref_note("attribute", name, value)
        if name in VERDICTS and not self._ref_made and not isinstance(value, PLAIN):
            return functools.partial(self._ref_untold, name, value)
        if name in ("keys", "values", "items") and type(value) is Ref and not self._ref_made:
            return lambda: self._ref_view(name, value)
        return value

    def _ref_untold(self, name: str, method: Any, /, *arguments: Any, **named: Any) -> Any:
        """The answer of a method such as `count`, which is not told what is expected."""
        if arguments or named or type(method) is not Ref:
            raise AttributeError(f"{name!r} of a value is not asked of an object that the program made")
        return method()

    def _ref_view(self, name: str, method: Ref) -> Any:
        """Its keys, values or items, of which it has as many as it says. All three agree, and with items by key."""
        notes = self._ref_tester.notes()
        before = [dict(noted) for noted in notes]
        result = method()
        items = list(result) if type(result) is Ref else result
        for noted, kept in zip(notes, before, strict=True):
            noted.update(kept)
        self._ref_has(len(items), len(items))
        self._ref_note("view", name, list(items))
        if name == "values":
            asked = self._ref_tester.answers.get(self._ref_tester.first(self), {}).items()
            found = [answer for (kind, _), answer in asked if kind == "item" and isinstance(answer, PLAIN)]
            if any(answer not in items for answer in found):
                raise AssertionError(CONTRADICTED)
        if name == "items" and all(type(item) is tuple and len(item) == 2 for item in items):
            keys = [key for key, _ in items]
            plain = [key for key in keys if is_key(key)]
            if len({*plain}) < len(plain):
                raise AssertionError(CONTRADICTED)
            self._ref_note("view", "keys", keys)
            self._ref_note("view", "values", [value for _, value in items])
            for key, value in items:
                if is_key(key):
                    self._ref_note("item", key, value)
        return items

    def __index__(self) -> int:
        if not self._ref_made:
            raise TypeError("an object that the program made is no index: it could be another one each time")
        return int(self._ref_ask("index"))

    def __setattr__(self, name: str, value: Any) -> None:
        self._ref_tester.ask("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        self._ref_tester.ask("delattr", self, name)

    def __iter__(self) -> Any:
        return self._ref_items("iter")

    def __reversed__(self) -> Any:
        return self._ref_items("reversed")

    def __len__(self) -> int:
        length: int = self._ref_ask("len")
        self._ref_has(length, length)
        return length

    def __bool__(self) -> bool:
        truth = bool(self._ref_ask("bool"))
        self._ref_note("bool", 0, truth)
        if truth:
            self._ref_has(1, math.inf)
        return truth

    def _ref_items(self, order: str) -> Any:
        """An iterator. It fails if there are more or fewer items than the object said.

        Otherwise a test would compare no item of an object that has the right length.
        """
        items = self._ref_ask(order)
        if self._ref_made or type(items) is not Ref:
            return items
        once = items._ref_number == self._ref_number  # an iterator itself, and not a sequence that begins anew
        once = once and not any(self._ref_ask("hasattr", name) is True for name in ("__getitem__", "__len__"))

        def follow() -> Iterator[Any]:
            sizes, number, count = self._ref_tester.sizes, self._ref_tester.first(self), 0
            whole: list[Any] = []
            changes = self._ref_tester.changes
            before = self._ref_tester.ended.get(number)
            while (got := self._ref_tester.ask("next", items))[0] is True:
                count += 1
                if once and sizes.get(number, GONE)[1] == math.inf:
                    sizes[number] = GONE
                else:
                    self._ref_has(count, math.inf)
                whole.append(got[1])
                if once:
                    self._ref_tester.answers.pop(number, None)
                    if before and not self._ref_tester.agree(before[count - 1 : count], [got[1]]):
                        raise AssertionError(CONTRADICTED)
                elif order == "iter":
                    self._ref_note("place", count - 1, got[1])
                yield got[1]
            if sizes.get(number) != GONE:
                self._ref_has(count, count)
            if once and count:  # it may begin anew, with the same items
                self._ref_tester.ended.setdefault(number, whole)
                if before and count < len(before):
                    raise AssertionError(CONTRADICTED)
            if not once and changes == self._ref_tester.changes:
                whole = whole if order == "iter" else whole[::-1]
                for place, item in enumerate(whole):
                    self._ref_note("place", place, item)
                self._ref_tester.wholes[number] = whole
                answers = self._ref_tester.answers.get(number, {})
                self._ref_agree([key for kind, key in answers if kind == "item" and type(key) is int])

        return follow()

    def __getitem__(self, key: Any) -> Any:
        """An item. It fails if there is another one at this place by iteration, or was before."""
        answer = self._ref_ask("getitem", key)
        if self._ref_made or self._ref_is_class:
            return answer
        if is_key(key):
            self._ref_note("item", key, answer)
        if type(key) is int:
            self._ref_agree([key])
        if type(key) is slice:
            try:
                items, expected = list(answer), self._ref_sliced(key)
            except TypeError:  # it has no items, or is no slice
                return answer
            if not self._ref_tester.agree(items, expected):
                raise AssertionError(CONTRADICTED)
        if is_key(key) and isinstance(answer, PLAIN):
            values = self._ref_tester.answers.get(self._ref_tester.first(self), {}).get(("view", "values"))
            if values is not None and answer not in values:
                raise AssertionError(CONTRADICTED)
        return answer

    def _ref_sliced(self, key: slice) -> list[Any]:
        """The slice, by iteration; of an endless object too, if it has an end itself."""
        ends = [part for part in (key.start, key.stop, key.step) if part is not None]
        if key.stop is not None and all(type(end) is int and end >= 0 for end in ends):
            return list(itertools.islice(iter(self), key.start, key.stop, key.step))
        return list(self)[key]

    def _ref_note(self, question: str, key: Any, answer: Any) -> None:
        """Note an answer. The same question has the same answer until a call may have changed the object."""
        if self._ref_made:
            return
        kept = copy.copy(answer) if type(answer) in (list, dict, set, bytearray) else answer  # tests may change theirs
        answers = self._ref_tester.answers.setdefault(self._ref_tester.first(self), {})
        if not self._ref_tester.agree(answers.setdefault((question, key), kept), answer):
            raise AssertionError(CONTRADICTED)

    def _ref_agree(self, keys: list[int]) -> None:
        """Compare items by number with those by iteration, if these are not the keys of a mapping."""
        number = self._ref_tester.first(self)
        items = self._ref_tester.wholes.get(number, [])
        keys = [key for key in keys if -len(items) <= key < len(items)]
        if not keys or self._ref_is_mapping(items):
            return
        for key in keys:
            answer, item = self._ref_tester.answers.get(number, {}).get(("item", key)), items[key]
            numbers = isinstance(answer, NUMBERS) and isinstance(item, NUMBERS)
            if not (answer == item if numbers else self._ref_tester.agree(answer, item)):
                raise AssertionError(CONTRADICTED)

    def _ref_is_mapping(self, items: list[Any]) -> bool:
        """Whether `items`, by iteration, are its keys."""
        if self._ref_ask("hasattr", "keys") is not True:
            return False
        try:
            return bool(self._ref_tester.agree(list(self.keys()), items))
        except Exception:  # they are no keys
            return False

    def _ref_has(self, least: float, most: float) -> None:
        """Note how many items it has."""
        if self._ref_made:
            return
        number = self._ref_tester.first(self)
        before = self._ref_tester.sizes.get(number, (0, math.inf))
        least, most = max(least, before[0]), min(most, before[1])
        if least > most:
            raise AssertionError(CONTRADICTED)
        self._ref_tester.sizes[number] = least, most

    def __next__(self) -> Any:
        self._ref_tester.answers.pop(self._ref_tester.first(self), None)
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
            value = self._ref_tester.ask("value", self) if self._ref_made and not self._ref_is_class else self
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
                answers[one] = bool(answer) if isinstance(answer, NUMBERS) else answer
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
        wanted = bool(self._ref_ask(verb, kind, str(error)))
        # It suppresses no failed check, and nothing that keeps the tests from a check.
        frame = sys._getframe(2)
        place = frame.f_code.co_filename, frame.f_lineno
        places = {place, *_places(trace and trace.tb_next)}
        free = place[0].startswith("tests ") and places.isdisjoint(self._ref_tester.checking)
        return wanted and free and not issubclass(kind, AssertionError)

    def __instancecheck__(self, instance: Any) -> bool:
        instance = standing(instance)
        if type(instance) is not Ref or instance._ref_is_class:
            return False
        return self._ref_number in instance._ref_lineage or instance._ref_ask("isinstance", self) is True

    def __subclasscheck__(self, kind: Any) -> bool:
        return type(kind) is Ref and kind._ref_is_class and self._ref_number in kind._ref_lineage

    def __format__(self, layout: str) -> str:
        return str(self._ref_say("format", layout))

    def _ref_say(self, name: str, *rest: Any) -> Any:
        answer = self._ref_ask(name, *rest)
        self._ref_note(name, rest, answer)
        return answer

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("an object of the program cannot be copied")


def for_effect(function: Any) -> Any:
    """What calls the function for what it does to its arguments: the tests do not use the result."""
    if type(function) is not Ref:
        return function
    return lambda *arguments, **named: function._ref_call("any", arguments, named)


def is_key(value: Any) -> bool:
    """Whether it is plain data that an item can be asked by, more than once."""
    if type(value) is tuple:
        return all(map(is_key, value))
    return value is None or type(value) in (bool, int, float, str, bytes)


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
        if name == "or_" and self._ref_is_class and (other is None or isinstance(other, type) or type(other) is Ref):
            return self  # `Node | None`, in an annotation
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


def refresh(old: Any, new: Any) -> None:
    """Give the tests' own containers within `old` the content that the program's copies have."""
    if type(old) is not type(new):
        return
    if isinstance(old, list | tuple) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            if isinstance(before, list | dict | set | bytearray) and type(before) is type(after):
                refresh(before, after)
            elif isinstance(old, list):
                old[index] = after
    elif isinstance(old, list | bytearray):
        old[:] = new
    elif isinstance(old, dict):
        for key in [key for key in old if key not in new]:
            del old[key]
        for key, after in new.items():
            if key in old and isinstance(old[key], list | dict | set | bytearray) and type(old[key]) is type(after):
                refresh(old[key], after)
            else:
                old[key] = after
    elif isinstance(old, set):
        old.clear()
        old.update(new)
