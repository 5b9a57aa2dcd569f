"""The part of pytest that tests of small programs use, for a sandbox that has the standard library alone.

`raises`, `approx`, `fixture`, `param`, `fail`, `mark.parametrize`; marks without effect. Everything else, and every
built-in fixture, is `Unsupported`: such tests abstain.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Complex
from typing import Any


class Unsupported(BaseException):
    """The tests need a part of pytest that is not here."""


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    raise Unsupported(f"pytest.{name}")


class _Raised:
    value: BaseException
    type: type[BaseException]

    def match(self, pattern: str) -> bool:
        assert re.search(pattern, str(self.value))
        return True


@contextmanager
def _raises(expected: Any, match: str | None) -> Iterator[_Raised]:
    raised = _Raised()
    try:
        yield raised
    except expected as error:
        raised.value, raised.type = error, type(error)
        if match is not None and not re.search(match, str(error)):
            raise AssertionError("the message does not match") from None
        return
    raise AssertionError("nothing was raised")


def raises(expected: Any, *call: Any, match: str | None = None, **named: Any) -> Any:
    if not call:
        return _raises(expected, match)
    with _raises(expected, match) as raised:
        call[0](*call[1:], **named)
    return raised


class approx:
    """Equals a number within 1e-6 of `expected`, relatively, or 1e-12; also in sequences and mappings."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, expected: Any, rel: float | None = None, abs: float | None = None, nan_ok: bool = False) -> None:
        self.expected, self.rel, self.abs, self.nan_ok = expected, rel, abs, nan_ok

    def __eq__(self, other: object) -> bool:
        return self._same(self.expected, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def _same(self, expected: Any, found: Any) -> bool:
        if isinstance(expected, Mapping):
            same = isinstance(found, Mapping) and expected.keys() == found.keys()
            return same and all(self._same(item, found[key]) for key, item in expected.items())
        if isinstance(expected, Sequence) and not isinstance(expected, str | bytes):
            same = isinstance(found, list | tuple) and len(expected) == len(found)
            return same and all(map(self._same, expected, found))
        if not all(isinstance(value, Complex) for value in (expected, found)):
            return type(found) is type(expected) and bool(found == expected)
        if expected == found:
            return True
        if math.isnan(abs(expected)) or math.isnan(abs(found)):
            return self.nan_ok and math.isnan(abs(expected)) and math.isnan(abs(found))
        if math.isinf(abs(expected)):
            return False
        absolute = 1e-12 if self.abs is None else self.abs
        relative = (1e-6 if self.abs is None else 0.0) if self.rel is None else self.rel
        return bool(abs(expected - found) <= max(absolute, relative * abs(expected)))


class param:
    def __init__(self, *values: Any, **options: Any) -> None:
        self.values = values


def fail(reason: str = "", **options: Any) -> None:
    raise AssertionError(reason)


def fixture(function: Any = None, **options: Any) -> Any:
    if options.get("params") or options.get("autouse"):
        raise Unsupported("a fixture with params or autouse")

    def mark_as_fixture(inner: Any) -> Any:
        inner.is_fixture = True
        return inner

    return mark_as_fixture(function) if function else mark_as_fixture


class _Marks:
    def __getattr__(self, name: str) -> Any:
        if name.startswith("skip") or name in ("xfail", "usefixtures"):
            raise Unsupported(f"pytest.mark.{name}")
        return lambda *found, **options: found[0] if found and inspect.isfunction(found[0]) else lambda inner: inner

    @staticmethod
    def parametrize(names: Any, rows: Any, **options: Any) -> Callable[[Any], Any]:
        fields = [name.strip() for name in names.split(",") if name.strip()] if isinstance(names, str) else list(names)

        def mark(inner: Any) -> Any:
            table = []
            for row in rows:
                values = row.values if isinstance(row, param) else row if len(fields) > 1 else [row]
                table.append(dict(zip(fields, values, strict=True)))
            inner.tables = [*getattr(inner, "tables", []), table]
            return inner

        return mark


mark = _Marks()


def call(function: Any, namespace: dict[str, Any]) -> None:
    """Run a test function with its fixtures, once for each row of its parameters; at least once."""
    rows: list[dict[str, Any]] = [{}]
    for table in getattr(function, "tables", []):
        rows = [{**row, **more} for row in rows for more in table]
    if not rows:
        raise AssertionError("a test without a row of parameters")
    for row in rows:
        with ExitStack() as stack:
            result = function(**_arguments(function, namespace, row, stack))
            if inspect.iscoroutine(result):
                import asyncio

                asyncio.run(result)


def call_method(owner: Any, name: str, namespace: dict[str, Any]) -> None:
    """Run a test of a class that is no TestCase, in an instance of its own."""
    instance = owner()
    own = {key: getattr(instance, key) for key in dir(owner) if getattr(getattr(owner, key), "is_fixture", False)}
    for setup in ("setup_class", "setup_method"):
        if hasattr(instance, setup):
            begin = getattr(instance, setup)
            begin(*[getattr(instance, name)][: len(inspect.signature(begin).parameters)])
    call(getattr(instance, name), {**namespace, **own})


def _arguments(function: Any, namespace: dict[str, Any], row: dict[str, Any], stack: ExitStack) -> dict[str, Any]:
    made: dict[str, Any] = dict(row)

    def value_of(name: str) -> Any:
        if name not in made:
            source = namespace.get(name)
            if not getattr(source, "is_fixture", False):
                raise Unsupported(f"the fixture {name!r}")
            assert source is not None
            arguments = {inner: value_of(inner) for inner in inspect.signature(source).parameters}
            if inspect.isgeneratorfunction(source):
                made[name] = stack.enter_context(contextmanager(source)(**arguments))
            else:
                made[name] = source(**arguments)
        return made[name]

    wanted = [
        key for key, parameter in inspect.signature(function).parameters.items() if parameter.default is parameter.empty
    ]
    return {name: value_of(name) for name in wanted}
