"""What replaces Python's own functions in the process of the tests.

`eval` and `pickle` may be given what the program made: as code in this process, it could report that all tests pass.
`dataclasses` take the program's objects, and `random.seed` and `sys.setrecursionlimit` are for both processes.
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Callable, Collection
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from judges.verify.refs import Ref
from judges.verify.wire import LIBRARY, TYPES, type_name

if TYPE_CHECKING:
    from judges.verify.runner import Step
    from judges.verify.tester import Tester

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
