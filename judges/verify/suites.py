"""Reads a column of tests into steps that `judges.verify.runner` runs. Pure; the tests are parsed, never run, here.

Each way to write tests is called as it is meant: `assert`s at the top level, functions `test_*`, classes of tests,
HumanEval's `check(candidate)`, the block under `if __name__ == "__main__"`, and APPS's object of inputs and outputs.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import importlib
import itertools
import json
import re
import symtable
import sys
from dataclasses import dataclass, field, replace
from typing import Any

from judges.verify.base import fenced_blocks

BUILTINS = frozenset(dir(builtins))
COMPARATORS = re.compile(
    r"allclose|array_equal|assert\w*|expect|np|numpy|pd|pandas|scipy|torch|sympy|(?i:eps|epsilon|tol|[ar]tol|tolerance)"
)
"""Names that a program may not define for its tests: they compare a result with what is expected."""
TOLERANCES = re.compile(r"(?i:eps\w*|\w*tolerance)")
"""The same of names that are not called."""
LIBRARY = {
    "fabs": "math", "floor": "math", "ceil": "math", "trunc": "math", "isnan": "math", "isinf": "math", "isfinite": "math",
    "reduce": "functools", "islice": "itertools", "randint": "random", "uniform": "random", "choice": "random",
    "isclose": "math", "sqrt": "math", "pi": "math", "inf": "math", "nan": "math", "approx": "pytest", "raises": "pytest",
    "fixture": "pytest",
    "Counter": "collections", "OrderedDict": "collections", "defaultdict": "collections", "deque": "collections",
    "namedtuple": "collections", "Decimal": "decimal", "Fraction": "fractions", "date": "datetime",
    "datetime": "_datetime", "timedelta": "datetime", "deepcopy": "copy", "Path": "pathlib", "TestCase": "unittest", "patch": "unittest.mock",
    "Mock": "unittest.mock", "MagicMock": "unittest.mock", "StringIO": "io", "BytesIO": "io",
}  # fmt: skip
"""Names of the standard library, with their modules, that tests use without an import because programs have one.

A name that is its own module's is the module, and `_datetime` has the class of that name.
"""
STARRED = {
    "bisect", "cmath", "collections", "datetime", "decimal", "fractions", "functools", "heapq", "itertools", "math", "operator",
    "random", "statistics", "string", "typing",
}  # fmt: skip
"""Modules of the standard library whose names tests have by `from math import *`."""
MOST_LINES = 300
"""Of a prompt, that are read as Python."""
METHODS = {name for kind in (str, list, dict, set, int, float) for name in dir(kind)}


@dataclass(frozen=True)
class Suite:
    """The tests of one prompt.

    `Suite(tests=[[["code", "assert add(1, 2) == 3"]]], names={"add": ""})`: one test of one step, which takes the name
    `add` from the program; a name with a module is that module's. `runs` has pairs of stdin and stdout instead, for a program that reads and prints.
    """

    tests: list[list[list[Any]]] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    runs: list[tuple[str, str]] = field(default_factory=list)
    wants_entry: bool = False
    objects: bool = False
    """Whether the tests use objects. If not, a name that begins with a capital letter is not one of a class to them."""
    functions: frozenset[str] = frozenset()
    """Names with a capital letter that are of functions in any case: all their results are used as values."""
    in_place: bool = False
    """Whether the prompt asks for a change in place, so that a function which returns a number changes its arguments."""

    @functools.cached_property
    def asked(self) -> set[str]:
        """The names that a program has to define."""
        steps = [step for steps in self.tests for step in steps]
        called = {str(step[1]) for step in steps if step[0] == "call"}
        code = "\n".join(step[1] for step in steps if step[0] == "code")
        imported = re.findall(r"\w+", " ".join(re.findall(r"\bfrom solution import (.*)", code)))
        return {*called, *imported, *re.findall(r"\bsolution\.(\w+)", code)} | {
            n for n, m in self.names.items() if not m
        }


class BadTests(ValueError):
    """Why a column of tests cannot be run."""


def read_suite(gold: Any, column: str, entry: str | None = None, prompt: str = "") -> Suite:
    """The suite of a column's value.

    Args:
        gold: a text of Python, a list of such texts, a list of objects with `input` and `output`, or APPS's object with
            `inputs` and `outputs`, as it is or as JSON text.
        column: its name, for messages.
        entry: the name of the function to test, which `check(candidate)` is given.
        prompt: the prompt's text. `check` calls the functions that it defines whole, beside the one to write, and not
            the program's of that name: HumanEval's `poly` and `encode_cyclic` tell right from wrong.

    Raises:
        BadTests: it is none of these, or not valid Python.
    """
    if isinstance(gold, str) and gold.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError, RecursionError):  # Python may begin so, too
            gold = json.loads(gold)
    match gold:
        case str():
            return _of_texts((gold,), column, entry, prompt, apart=True)
        case {"inputs": [*inputs], "outputs": [*outputs]} if len(inputs) == len(outputs):
            return _of_apps(gold, inputs, outputs)
        case [*tests] if all(isinstance(test, str) for test in tests):
            return _of_texts(tuple(tests), column, entry, prompt)
        case [*tests] if all(isinstance(test, dict) and {"input", "output"} <= test.keys() for test in tests):
            return Suite(runs=[(str(test["input"]), str(test["output"])) for test in tests])
    kinds = "a text of tests, a list of texts, a list of objects with `input` and `output`, nor an object with `inputs` and `outputs`"
    raise BadTests(f"the column {column!r} is neither {kinds}")


@functools.lru_cache(64)
def _of_texts(texts: tuple[str, ...], column: str, entry: str | None, prompt: str, *, apart: bool = False) -> Suite:
    """Each text is a test, of all of its parts; or `apart`, each part is one. Kept for a prompt's other completions."""
    bodies = [_parsed(text, column) for text in texts]
    tests = [_steps(body, entry) for body in bodies]
    whole = [statement for body in bodies for statement in body]
    names, checked = _names(whole), _checked(whole, entry)
    if lacking := _out_of_reach(whole, {name for name, module in names.items() if not module}):
        raise BadTests(f"the tests of column {column!r} need what the sandbox lacks: {lacking}")
    suite = Suite(
        [[step] for steps in tests for step in steps] if apart else tests,
        names,
        wants_entry=any(map(_wants_entry, tests)),
        objects=_uses_objects(whole, prompt),
        functions=_capital_functions(whole, prompt, checked),
        in_place=re.search(r"\bin[- ]?place\b", prompt, re.IGNORECASE) is not None,
    )
    return _with_helpers(suite, checked, prompt)


FILES = {
    "open", "NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory", "mkdtemp", "mkstemp", "read_text", "write_text",
}  # fmt: skip
"""Functions and methods with files, by the last part of their names."""
FOLDERS = re.compile(
    r"os\.(path\.)?(exists|isfile|isdir|getsize|listdir|scandir|walk|stat|remove|unlink|makedirs|mkdir|rmdir|rename|replace|chdir)"
    r"|shutil\.\w+|glob\.i?glob|sqlite3\.connect|tempfile\.gettempdir"
)
OF_PATHS = {
    "exists", "is_file", "is_dir", "iterdir", "unlink", "mkdir", "rmdir", "rename", "touch", "stat", "read_bytes", "write_bytes",
}  # fmt: skip
"""Methods of a path that need its file. `FOLDERS` has functions of modules, by their whole names."""
STATE = re.compile(
    r"decimal\.(getcontext|setcontext|localcontext)|random\.(getstate|setstate)|sys\.(set_int_max_str_digits|settrace)"
    r"|os\.putenv|os\.environ\.(setdefault|update|pop|clear)|.*\.addHandler|contextlib\.redirect_stderr"
)
"""Calls that change what the program has in common with its tests if they are one process."""
RECORDS = {"assertLogs", "assertNoLogs", "assertWarns", "assertWarnsRegex", "catch_warnings"}
PATCHED = re.compile(r"builtins\.input|sys\.std(in|out)|solution\..*")
"""What tests may patch: the rest is patched in their process, and not in the program's."""


def _out_of_reach(body: list[ast.stmt], own: set[str]) -> str | None:
    """What the tests share with the program as if it were in their process. `own`: the names of the program's."""
    nodes = [node for statement in body for node in ast.walk(statement)]
    made = [
        node for node in nodes if isinstance(node, ast.Assign) and re.search(r"\b[Pp]ath\b", ast.unparse(node.value))
    ]
    paths = {ast.unparse(target) for node in made for target in node.targets}
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    def whole_name(node: ast.expr) -> str:
        """Its text, with a name that is imported from a module as the module's."""
        first, dot, rest = ast.unparse(node).partition(".")
        name, bracket, key = first.partition("[")
        return f"{imported.get(name, name)}{bracket}{key}{dot}{rest}"

    for node in nodes:
        match node:
            case ast.ClassDef(bases=bases, keywords=keywords) if not _is_test(node):
                values = [inner.value for inner in node.body if isinstance(inner, ast.Assign | ast.AnnAssign)]
                if any(_loads(part) & own for part in [*bases, *(keyword.value for keyword in keywords)]):
                    return f"{node.name}, a class that is derived from one of the program's"
                if any(isinstance(value, ast.Call) and _loads(value.func) & own for value in values):
                    return f"{node.name}, a class with descriptors of the program's"
            case ast.MatchClass(cls=kind) if _loads(kind) & {*own, "solution"}:
                return f"{ast.unparse(kind)}, a class in a pattern"
            case ast.Assign(targets=targets):
                for name in map(whole_name, targets):
                    if re.match(r"(os\.environ|sys\.argv)\b", name):
                        return f"{name}, of the program's process"
            case ast.Call(func=function, args=arguments):
                name = whole_name(function)
                last = name.rpartition(".")[2]
                if last in FILES and last not in own and not _is_own_open(function, arguments, paths):
                    return "files that they share with the program"
                owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
                of_path = last in OF_PATHS and (owner in paths or re.search(r"\b[Pp]ath\b", owner) is not None)
                if FOLDERS.fullmatch(name) or of_path:
                    return "files that they share with the program"
                raises = last in ("simplefilter", "filterwarnings") and not name.startswith("pytest.mark")
                if (raises and "'error'" in map(ast.unparse, arguments)) or STATE.fullmatch(name):
                    return f"{name}, of the program's process"
                if last in RECORDS:
                    return f"{last}, of the program's process"
                target = arguments[0].value if arguments and isinstance(arguments[0], ast.Constant) else ""
                if re.fullmatch(r"(.+\.)?patch(\.object|\.dict)?", name) and not PATCHED.fullmatch(str(target)):
                    return f"{name}, of the program's process"
    return None


def _is_own_open(function: ast.expr, arguments: list[ast.expr], paths: set[str]) -> bool:
    """Whether it is a method `open` of an object, such as a door, and not of a file. `paths`: variables that have paths."""
    if not isinstance(function, ast.Attribute) or function.attr != "open":
        return False
    owner = ast.unparse(function.value)
    mode = arguments[0].value if arguments and isinstance(arguments[0], ast.Constant) else None
    is_file = owner in paths or re.search(r"\b[Pp]ath\b", owner) or owner.partition(".")[0] in sys.stdlib_module_names
    return not is_file and not re.fullmatch(r"[rwaxbt+]+", str(mode))


def _checked(body: list[ast.stmt], entry: str | None) -> set[str]:
    """The names of the functions that `check(candidate)` is given, by a call in the tests or as `entry`."""
    checks = {node.name for node in body if isinstance(node, ast.FunctionDef) and _takes_candidate(node)}
    nodes = [node for statement in body for node in ast.walk(statement) if isinstance(node, ast.Call)]
    calls = [node for node in nodes if isinstance(node.func, ast.Name) and node.func.id in checks]
    given = {value.id for call in calls for value in call.args if isinstance(value, ast.Name)}
    return given | ({entry} if entry else set())


def _takes_candidate(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    arguments = [argument.arg for argument in node.args.args]
    return (node.name == "check" and len(arguments) == 1) or arguments == ["candidate"]


def _with_helpers(suite: Suite, checked: set[str], prompt: str) -> Suite:
    """The suite, with the functions that the prompt defines whole and the tests use, ahead of its first test."""
    code = _code_of(prompt)
    functions = {name: node for node in code for name in _defined(node)}
    if not checked:  # what the prompt leaves open is to be written, and what it defines beside that is not
        checked = {name for name, node in functions.items() if not _is_whole(node, set())} & suite.names.keys()
    if not checked:
        return suite
    body = [node for node in code if isinstance(node, _Imports) or _is_constant(node) or _is_whole(node, checked)]
    helpers = {name for name, node in functions.items() if node in body}
    classes = {node.name for node in code if isinstance(node, ast.ClassDef)}  # the program has them too
    names = {name: module for name, module in _names(body).items() if name not in BUILTINS}
    used = {name for name in helpers if suite.names.get(name) == ""}
    if not used:
        return suite
    if lacking := sorted({name for name, module in names.items() if not module} - classes - checked - helpers):
        raise BadTests(f"the tests use {sorted(used)[0]}, which the prompt defines by {lacking[0]}, which it does not")
    names |= {name: module for name, module in suite.names.items() if name not in helpers}
    first: list[list[Any]] = [["code", "\n".join(map(ast.unparse, body))]]
    return replace(suite, tests=[first + suite.tests[0], *suite.tests[1:]], names=names)


def given_by(prompt: str, program: str, suite: Suite, entry: str | None) -> str:
    """What a program may use of the prompt without repeating it, as HumanEval runs a prompt with its completion: imports,
    constants, and the functions and classes that the prompt defines whole. Not what the program defines, nor what the
    tests are about.
    """
    try:
        body = ast.parse(program).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    own = {node.name for node in body if isinstance(node, _Defines)} | suite.asked | ({entry} if entry else set())
    if any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in body):
        return ""
    given = [
        node
        for node in _code_of(prompt)
        if (isinstance(node, _Imports) and getattr(node, "module", "") != "__future__")
        or (isinstance(node, ast.ClassDef) and node.name not in own)
        or (_is_constant(node) and not _bound(node) & (own | BUILTINS))
        or _is_whole(node, own)
    ]
    ignored = ast.ExceptHandler(ast.Name("Exception", ast.Load()), None, [ast.Pass()])  # what the program may not need
    return "\n".join(ast.unparse(ast.fix_missing_locations(ast.Try([node], [ignored], [], []))) for node in given)


def _is_whole(node: ast.stmt, checked: set[str]) -> bool:
    """Whether it is a function, not one to write, with a body: more than a text, `pass` or `...`."""
    if not _defined(node) or _defined(node) & checked:
        return False
    body = node.body if isinstance(node, ast.FunctionDef) else [node]
    return any(not isinstance(part, ast.Pass | ast.Raise) and not _is_text(part) for part in body)


def _defined(node: ast.stmt) -> set[str]:
    """The name of the function that a statement defines, if it does."""
    match node:
        case ast.FunctionDef(name=name) | ast.Assign(targets=[ast.Name(id=name)], value=ast.Lambda()):
            return {name}
    return set()


def _unannotated(node: ast.stmt) -> ast.stmt:
    """The statement, a function without its annotations: a prompt may not import their names."""
    if isinstance(node, ast.FunctionDef):
        node.returns = None
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
    return node


def _is_constant(node: ast.stmt) -> bool:
    """Whether it gives a name a value that needs nothing, as in `MOD = 10**9 + 7`."""
    if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
        return False
    return not any(isinstance(part, ast.Name | ast.Call | ast.Lambda) for part in ast.walk(node.value))


def _bound(node: ast.stmt) -> set[str]:
    """The names that an assignment binds."""
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


@functools.lru_cache(64)
def _code_of(prompt: str) -> list[ast.stmt]:
    """The Python of a prompt, without annotations: all of it, its fenced blocks, or what begins with a definition, an import
    or an assignment. Kept, since each completion of the prompt asks again.
    """
    blocks = [text for language, text in fenced_blocks(prompt) if language in ("", "python", "py", "python3")]
    begins = re.search(r"^(?:(?:import|from|def|class)\b|@|[A-Za-z_]\w* *=).*", prompt, re.MULTILINE | re.DOTALL)
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        return [_unannotated(node) for node in ast.parse(prompt).body]
    for texts in (blocks, [begins[0]] if begins else []):
        if body := [_unannotated(node) for text in texts for node in _first_part(text)]:
            return body
    return []


def _first_part(text: str) -> list[ast.stmt]:
    """The statements of the longest beginning of a text that is Python; a last function may have no body yet."""
    lines = text.rstrip().splitlines()[:MOST_LINES]
    while lines:
        opened = re.match(r"(\s*).*:\s*(#.*)?$", lines[-1])
        for more in ([], [f"{opened[1]}    pass"] if opened else []):
            with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
                return ast.parse("\n".join([*lines, *more])).body
        lines.pop()
    return []


def _of_apps(gold: dict[str, Any], inputs: list[Any], outputs: list[Any]) -> Suite:
    if name := gold.get("fn_name"):
        pairs = zip(inputs, outputs, strict=True)
        return Suite([[["call", str(name), list(given), wanted]] for given, wanted in pairs])
    joined = [
        ["\n".join(map(str, part)) if isinstance(part, list) else str(part) for part in side]
        for side in (inputs, outputs)
    ]
    return Suite(runs=list(zip(*joined, strict=True)))


def _parsed(text: str, column: str) -> list[ast.stmt]:
    try:
        return _without_guards(ast.parse(text).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise BadTests(f"the tests of column {column!r} are not valid Python") from None


def _without_guards(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements, those under a main guard too, without the calls that would start a test runner."""
    flat: list[ast.stmt] = []
    for statement in body:
        match statement:
            case ast.If(test=test) if "__name__" in ast.unparse(test):
                flat += _without_guards(statement.body)
            case ast.Expr(value=ast.Call()) if _starts_a_runner(statement.value):
                pass
            case _:
                flat.append(statement)
    return flat


def _starts_a_runner(call: ast.expr) -> bool:
    text = ast.unparse(call)
    return re.match(r"(?:(?:sys\.)?exit\()?(?:unittest|pytest)\.main\(", text) is not None


def _steps(body: list[ast.stmt], entry: str | None) -> list[list[Any]]:
    """The statements, cut after each `assert`, then what they define and do not call."""
    ends = [number for number, node in enumerate(body) if isinstance(node, ast.Assert)][:-1]
    cuts = itertools.pairwise([0, *(number + 1 for number in ends), len(body)])
    parts = [body[start:end] for start, end in cuts]
    steps: list[list[Any]] = [["code", "\n".join(map(ast.unparse, part))] for part in parts if part]
    used = {name for node in body if not isinstance(node, _Defines) for name in _loads(node)}
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() if node.name not in used:
                if node.name.startswith("test"):
                    steps.append(["function", node.name])
                elif _takes_candidate(node):
                    steps.append(["check", node.name, entry])
            case ast.ClassDef():
                case = any(ast.unparse(base).endswith("TestCase") for base in node.bases)
                methods = [
                    inner.name for inner in node.body if isinstance(inner, _Functions) and inner.name.startswith("test")
                ]
                units: list[str | None] = [*methods] or [None]
                if case or (methods and node.name.startswith("Test")):
                    steps += [["method", node.name, method] for method in units]
    return steps


_Functions = (ast.FunctionDef, ast.AsyncFunctionDef)
_Defines = (*_Functions, ast.ClassDef)
_Imports = (ast.Import, ast.ImportFrom)


def _wants_entry(steps: list[list[Any]]) -> bool:
    return any(step[0] == "check" for step in steps)


def _loads(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def _names(body: list[ast.stmt]) -> dict[str, str]:
    """The names that the tests use and do not bind.

    A name of a builtin or of `LIBRARY` is the program's only if the tests call nothing else. A decorator of a test, or
    of a function with an assertion, never is.
    """
    nodes = [node for statement in body for node in ast.walk(statement)]
    loads = _free(body)
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)} & loads
    modules = {name: name for name in loads - called if name in sys.stdlib_module_names or name == "pytest"}
    known = BUILTINS | LIBRARY.keys()
    tests = [node for node in nodes if isinstance(node, _Defines) and _is_test(node)]
    around = {name for node in tests for decorator in node.decorator_list for name in _loads(decorator)}
    compares = {name for name in loads if COMPARATORS.fullmatch(name)}
    compares |= {name for name in loads - called if TOLERANCES.fullmatch(name)}
    own = loads - known - modules.keys() - around - compares
    if not own and len(called & known) == 1 and not _reaches_more(nodes, called & known):
        own |= called & known
    library = {name: LIBRARY[name] for name in loads & LIBRARY.keys() - own - modules.keys()}
    return {**dict.fromkeys(sorted(own), ""), **modules, **library}


def _free(body: list[ast.stmt]) -> set[str]:
    """The global names that the statements use and do not bind."""
    used: set[str] = set()
    bound: set[str] = set()
    for statement in body:
        tables: list[symtable.SymbolTable] = []
        with contextlib.suppress(SyntaxError):  # one that cannot be compiled fails when it is run
            tables.append(symtable.symtable(ast.unparse(statement), "tests", "exec"))
        for table in tables:
            tables += table.get_children()
            symbols = [symbol for symbol in table.get_symbols() if table is tables[0] or symbol.is_global()]
            used |= {symbol.get_name() for symbol in symbols if symbol.is_referenced()}
            bound |= {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}
        if isinstance(statement, ast.ImportFrom) and statement.module in STARRED and statement.names[0].name == "*":
            module = importlib.import_module(statement.module)
            bound |= {*getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])}
    return used - bound


def _is_test(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    if isinstance(node, ast.ClassDef):
        checks = any(ast.unparse(base).endswith("TestCase") for base in node.bases)
    else:
        checks = any(isinstance(inner, ast.Assert) for inner in ast.walk(node))
    return checks or re.match("test|check|setup|teardown", node.name, re.IGNORECASE) is not None


def _uses_objects(body: list[ast.stmt], prompt: str) -> bool:
    """Whether the tests use objects of classes with names, or the prompt speaks of a class.

    `Mean` of `abs(Mean([1, 2]) - 1.5) < 1e-6` is a function. `Vector` of `Vector(1, 2) == Vector(1, 2)` is a class, and
    `Stack` of `s = Stack()` and `s.push(1)`.
    """
    nodes = [node for statement in body for node in ast.walk(statement)]
    imports = [node for node in nodes if isinstance(node, _Imports) and getattr(node, "module", "") != "solution"]
    imported = {(alias.asname or alias.name).partition(".")[0] for node in imports for alias in node.names}
    outside = {*imported, *sys.stdlib_module_names, *LIBRARY, "pytest"}
    made: set[str] = set()  # variables

    def is_made(node: ast.AST) -> bool:
        if isinstance(node, ast.BinOp):
            return is_made(node.left) or is_made(node.right)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            return name[:1].isupper() and name not in LIBRARY
        return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in made

    def is_outside(node: ast.AST) -> bool:
        text = ast.unparse(node)
        return re.fullmatch(r"self|cls|self\.assert\w+", text) is not None or (
            text.partition(".")[0] in outside and re.fullmatch(r"[\w.]+", text) is not None
        )

    for node in nodes:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if is_made(value):
                made.add(name)
            case ast.ExceptHandler(name=str(name)):
                outside.add(name)
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=value)) if is_outside(value):
                outside.add(name)
            case ast.withitem(context_expr=ast.Call(func=value), optional_vars=ast.Name(id=name)) if is_outside(value):
                outside.add(name)
    for node in nodes:
        match node:
            case ast.Attribute(value=value, attr=name) if name not in METHODS and not is_outside(value):
                return True
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, ast.Name(id=name)]):
                if name[:1].isupper():
                    return True
            case ast.Call(args=[], keywords=[]) if is_made(node):
                return True
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=value))) if is_made(value):
                return True
        if sum(map(is_made, ast.iter_child_nodes(node))) > 1:
            return True
    return re.search(r"(?<![-\w])class(?![-\w])", prompt) is not None


AS_VALUES = re.compile(
    r"abs|round|float|int|complex|bool|sum|min|max|str|repr|format|print|(\w+\.)?(isclose|approx|allclose)|self\.assert\w+"
)
"""Functions that use their arguments as values."""


def _capital_functions(body: list[ast.stmt], prompt: str, checked: set[str]) -> frozenset[str]:
    """The names with a capital letter whose results are all compared or computed with, as in `abs(Mean(x) - 1.5) < 1e-6`,
    and those `checked` by `check(candidate)`.

    Not beside what is another result of the program's, as in `Vector(1, 2) == Vector(1, 2)` and `parse("1") == Num(1)`,
    nor if the prompt calls the name a class.
    """
    nodes = [node for statement in body for node in ast.walk(statement)]
    parents = {child: node for node in nodes for child in ast.iter_child_nodes(node)}
    loads = [node for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    named_by: list[tuple[ast.AST, str]] = [(node, node.id) for node in loads]
    named_by += [
        (node, node.attr) for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "solution"
    ]
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    known = BUILTINS | LIBRARY.keys() | sys.stdlib_module_names | defined | {"pytest"}
    assigned = {
        target.id: node.value
        for node in nodes
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    values: dict[str, bool] = {}  # by variable, whether all its uses are; one that depends on itself is

    def is_value(node: ast.AST) -> bool:
        parent = parents.get(node)
        match parent:
            case ast.Assert() | ast.If() | ast.UnaryOp() | ast.FormattedValue():
                return True
            case ast.Compare() | ast.BinOp() | ast.BoolOp():
                function = None
            case ast.Call(func=function) if node is not function and AS_VALUES.fullmatch(ast.unparse(function)):
                pass
            case ast.Assign(targets=[ast.Name(id=name)]):
                if name not in values:
                    values[name] = True
                    values[name] = all(is_value(load) for load in loads if load.id == name)
                return values[name]
            case _:
                return False
        beside = [
            part for other in ast.iter_child_nodes(parent) if other not in (node, function) for part in ast.walk(other)
        ]
        made = [assigned.get(part.id) if isinstance(part, ast.Name) else part for part in beside]
        called = [value.func for value in made if isinstance(value, ast.Call)]
        return all(ast.unparse(call).partition(".")[0] in known for call in called)

    calls: dict[str, list[ast.AST]] = {}
    for use, name in named_by:
        if name[:1].isupper() and name not in known:
            parent = parents.get(use)
            calls.setdefault(name, []).append(parent if isinstance(parent, ast.Call) and parent.func is use else use)
    named = r"\bclass\b[^.\n]{0,20}\b%s\b|\b%s\b\W{0,3}class\b"
    return frozenset(
        name
        for name in {*calls, *checked}
        if name in checked or all(isinstance(call, ast.Call) and is_value(call) for call in calls[name])
        if not re.search(named % (re.escape(name), re.escape(name)), prompt)
    )


def _reaches_more(nodes: list[ast.AST], names: set[str]) -> bool:
    """Whether tests may call something of the program that is not in `names`: an argument, a variable, an attribute."""
    names = names | {node.name for node in nodes if isinstance(node, _Defines)}
    for node in nodes:
        match node:
            case ast.Import(names=[*aliases]) if any(alias.name == "solution" for alias in aliases):
                return True
            case ast.ImportFrom(module="solution"):
                return True
            case ast.Call(func=ast.Name(id=name)) if name not in names:
                return True
            case ast.Call(func=ast.Attribute() as function):
                if not re.match(r"self\.(assert|fail|subTest)|(pytest|unittest)\.", ast.unparse(function)):
                    return True
    return False


def entry_point(program: str, prompt: str, given: str | None) -> str | None:
    """The function that `check(candidate)` is about: as the prompt's column has it; else the last one that the prompt
    defines, as HumanEval's prompts do; else the last one at the program's top level.
    """
    if given:
        return given
    if named := re.findall(r"^\s*def\s+(\w+)", prompt, re.MULTILINE):
        return str(named[-1])
    try:
        body = ast.parse(program).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    functions = [node.name for node in body if isinstance(node, _Functions) and not node.name.startswith("_")]
    return functions[-1] if functions else None
