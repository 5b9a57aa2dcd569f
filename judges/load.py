"""Finds the judge that a configuration names: one that comes with iterdpo, `path/to/file.py:name`,
`package.module:name`, or a name that an installed package declares as an entry point of the group `iterdpo.judges`.

A judge that comes with iterdpo is a class that derives from `JudgeBase`. An argument that is a mapping with a `use` of
its own is a judge within a judge.

`check_judge` and `judge_version` read source code without running it, so that a configuration is validated, and the
key of its results known, without loading a model or importing torch. `probe_judge` runs it, before a run begins.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import traceback
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from iterdpo.errors import JudgeError
from iterdpo.escape import printable
from iterdpo.judging.judge import JudgeBase
from iterdpo.run.rundir import digest, directory_digest
from iterdpo.run.sums import sha256_file
from judges.adapter import METHODS, OPTIONAL_PARAMETERS, adapt, check_object, check_signature, kind_of
from judges.base import nearest

BUILT_IN = {
    "pairwise": "judges.llm.judges:PairwiseJudge",
    "rubric": "judges.llm.judges:RubricJudge",
    "listwise": "judges.llm.judges:ListwiseJudge",
    "checklist": "judges.llm.checklist:ChecklistJudge",
    "reward_model": "judges.models.reward_model:RewardModelJudge",
    "pair_ranker": "judges.models.pair_ranker:PairRanker",
    "implicit_reward": "judges.models.implicit_reward:ImplicitReward",
    "exact_match": "judges.verify.match:ExactMatch",
    "numeric_match": "judges.verify.match:NumericMatch",
    "math": "judges.verify.maths:Math",
    "json_schema": "judges.verify.match:JSONSchema",
    "regex": "judges.verify.match:Regex",
    "code_tests": "judges.verify.code:CodeTests",
    "instructions": "judges.verify.ifeval:Instructions",
    "ensemble": "judges.combine:Ensemble",
    "by_task": "judges.combine:ByTask",
    "length_penalty": "judges.combine:LengthPenalty",
    "length_regressed": "judges.combine:LengthRegressed",
    "clip": "judges.combine:Clip",
    "tie_band": "judges.combine:TieBand",
    "z_score": "judges.combine:ZScore",
    "flipped": "judges.combine:Flipped",
    "cached": "judges.combine:Cached",
    "remote": "judges.remote:Remote",
    "person": "judges.person.judge:Person",
}
ENTRY_POINTS = "iterdpo.judges"


def load_judge(use: str, args: dict[str, Any]) -> JudgeBase:
    """The judge that `use` names, made with `args`. What loads a model does so at its first judgment.

    Raises:
        JudgeError: what `check_judge` finds, an import that fails, or an object that is no judge.
    """
    check_judge(use, args)
    version = judge_version(use, args)
    if use in BUILT_IN:
        judge = _built_in(use)(**args)
        judge.version = version
        return judge
    return adapt(_imported(use), name=_label(use), version=version, args=args)


def check_judge(use: str, args: dict[str, Any]) -> None:
    """Find what is wrong with a judge's section of a configuration, running none of the user's code.

    Raises:
        JudgeError: no such file, module, name or checkpoint, a file that does not parse, a function whose parameters
            make it no judge, an argument that is missing or unknown.
    """
    if use in BUILT_IN:
        made = _built_in(use)
        check_signature(inspect.signature(made), args, use, constructor=True)
        for nested in nested_judges(args):
            check_judge(nested["use"], nested.get("args") or {})
        made.check(**args)
        return
    source = _locate(use)
    if source.file is None:
        return
    try:
        defined = dict(_definitions(ast.parse(source.file.read_bytes(), filename=str(source.file)).body))
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise JudgeError(f"judge {use!r}: {source.file}{line}: not valid Python: {error}") from None
    if source.name in defined:
        _check_definition(defined[source.name], args, _label(use))
    elif not {"*", "__getattr__"} & defined.keys():
        hint = nearest(source.name, [n for n in defined if not n.startswith("_")], "it defines")
        raise JudgeError(f"judge {use!r}: {source.file} defines no {source.name!r}; {hint}")


def probe_judge(use: str, args: dict[str, Any]) -> None:
    """Find what is wrong outside the configuration: import the user's code, ask an endpoint once. Loads no model.

    Raises:
        JudgeError: an import that fails, a name that is no judge, an endpoint that does not answer, or refuses the key or
            the model; a device that is not there.
    """
    if use in BUILT_IN:
        for nested in nested_judges(args):
            probe_judge(nested["use"], nested.get("args") or {})
        _built_in(use).probe(**args)
        return
    made = _imported(use)
    check_object(made, args, _label(use))
    if inspect.isclass(made) and issubclass(made, JudgeBase):
        made.probe(**args)


def compares(use: str, args: dict[str, Any]) -> bool:
    """Whether it is known that the judge compares, and so gives a completion no score of its own. Runs no user's code."""
    if use in BUILT_IN:
        within = set(_uses(use, args)) <= BUILT_IN.keys()
        return _built_in(use)(**args).comparative if within else _built_in(use).comparative
    source = _locate(use)
    if source.file is None:
        return False
    node = dict(_definitions(ast.parse(source.file.read_bytes()).body)).get(source.name)
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    return kind_of(p.arg for p in [*node.args.args, *node.args.kwonlyargs]) == "compare"


def key_variables(args: Any) -> Iterator[str]:
    """The names of the environment variables that hold keys of a judge, or of those within it."""
    if isinstance(args, dict):
        if isinstance(name := args.get("api_key_env"), str):
            yield name
        args = list(args.values())
    for value in args if isinstance(args, list | tuple) else []:
        yield from key_variables(value)


def expected_abstentions(use: str, args: dict[str, Any]) -> tuple[str, ...]:
    """Reasons of abstentions that are part of how this judge, or one within it, works."""
    judges = (name for name in _uses(use, args) if name in BUILT_IN)
    return tuple(reason for name in judges for reason in _built_in(name).EXPECTED_ABSTENTIONS)


def asks_a_person(use: str, args: dict[str, Any]) -> bool:
    """Whether this judge, or one within it, is a person. Such a judge works within a run only."""
    return "person" in _uses(use, args)


def check_columns(use: str, columns: Iterable[str], args: Iterable[str] = ()) -> None:
    """Refuse a judge whose function or method asks, by a parameter, for a column that the prompts do not have.

    `args` go to a function, and not to the method of a class. A judge whose source does not show it is accepted.

    Raises:
        JudgeError: naming the column, and the nearest that there is.
    """
    columns = list(columns)
    if isinstance(args, dict):
        for inner in nested_judges(args):
            check_columns(inner["use"], columns, inner.get("args") or {})
        if use == "by_task" and (column := args.get("column", "task")) not in columns:
            known = nearest(str(column), columns, "they have")
            raise JudgeError(f"judge 'by_task': asks for a column {column!r} that the prompts do not have; {known}")
    source = None if use in BUILT_IN else _locate(use)
    if source is None or source.file is None:
        return
    node = dict(_definitions(ast.parse(source.file.read_bytes()).body)).get(source.name)
    itself = isinstance(node, ast.ClassDef)
    if isinstance(node, ast.ClassDef):
        if node.bases:  # which may have the method that judges
            return
        methods = dict(_definitions(node.body))
        node = next((methods[name] for name in (*METHODS, "__call__") if name in methods), None)
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.decorator_list:
        return
    parameters = list(_signature(node.args).parameters.values())[itself:]
    if kind_of(p.name for p in parameters) not in ("score", "compare"):
        return
    given = {"prompt", "completion", "a", "b", *OPTIONAL_PARAMETERS, *columns, *(() if itself else args)}
    for p in parameters:
        if p.name not in given and p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
            wrong = f"asks for a column {p.name!r} that the prompts do not have"
            raise JudgeError(f"judge {_label(use)!r}: {wrong}; {nearest(p.name, columns, 'they have')}")


def judge_version(use: str, args: dict[str, Any]) -> str:
    """A hash of what decides this judge's scores: its source file, its arguments, and the files that they name.

    The same in every process and wherever the files lie. What the source imports is not part of it, nor is a hub
    model's content: pin its `revision`.

    Raises:
        JudgeError: no such file or module.
    """
    if use in BUILT_IN:
        return digest([use, _content(_built_in(use).key(**args))])
    source = _locate(use)
    code = use if source.file is None else _content(str(source.file.absolute()))
    return digest([code, source.name, _content(args)])


def built_in(use: str) -> type[JudgeBase] | None:
    """The class of a judge that comes with iterdpo; None of another."""
    return _built_in(use) if use in BUILT_IN else None


def nested_judges(value: Any) -> Iterator[dict[str, Any]]:
    """The judges within a judge's arguments: `{"use": "exact_match", "args": {"column": "gold"}}`, at any depth.

    Not those within the judges that it yields.
    """
    if isinstance(value, dict) and isinstance(value.get("use"), str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from nested_judges(item)


def _built_in(use: str) -> type[JudgeBase]:
    found: type[JudgeBase] = pkgutil.resolve_name(BUILT_IN[use])
    return found


def _uses(use: str, args: Any) -> Iterator[str]:
    yield use
    for inner in nested_judges(args):
        yield from _uses(inner["use"], inner.get("args") or {})


class _Source(NamedTuple):
    file: Path | None  # None for a module without Python source
    module: str | None  # None for a file
    name: str


@functools.cache
def _declared() -> dict[str, str]:
    """Judges of installed packages, by name. Read once: there is a file to open for each package that is installed."""
    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


def _locate(use: str) -> _Source:
    declared = _declared()
    place, _, name = declared.get(use, use).rpartition(":")
    if not place or not name.isidentifier():
        forms = "a judge is named `path/to/file.py:name`, `package.module:name`, or by a name that is known"
        raise JudgeError(f"judge {use!r}: {forms}; {nearest(use, [*BUILT_IN, *declared], 'these are')}")
    if place.endswith(".py"):
        file = Path(place).expanduser()
        if not file.is_file():
            beside = sorted(p.name for p in file.parent.glob("*.py"))
            raise JudgeError(f"judge {use!r}: no such file {file}; {nearest(file.name, beside, 'Python files there')}")
        return _Source(file, None, name)
    spec = _find_module(place)
    if spec is None:
        remedy = "install it into this environment, or name its file: path/to/file.py:name"
        raise JudgeError(f"judge {use!r}: no module {place!r} can be imported here; {remedy}")
    readable = spec.origin is not None and spec.origin.endswith(".py")
    return _Source(Path(str(spec.origin)) if readable else None, place, name)


def _find_module(dotted: str) -> ModuleSpec | None:
    """Like `importlib.util.find_spec`, which would import the parent packages (TRL's, and with it torch)."""
    top, *parts = dotted.split(".")
    try:
        spec = importlib.util.find_spec(top) if all(map(str.isidentifier, (top, *parts))) else None
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    for end in range(len(parts)):
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(".".join((top, *parts[: end + 1])), list(spec.submodule_search_locations))
    return spec


def _imported(use: str) -> Any:
    """What `use` names, imported once in a process, and again if its file has changed."""
    source = _locate(use)
    module = _import(source, use)
    if not hasattr(module, source.name):
        defined = [name for name, value in vars(module).items() if callable(value)]
        raise JudgeError(f"judge {use!r}: no {source.name!r} there; {nearest(source.name, defined, 'it defines')}")
    return getattr(module, source.name)


def _import(source: _Source, use: str) -> ModuleType:
    try:
        if source.module is not None:
            return importlib.import_module(source.module)
        assert source.file is not None
        file = source.file.absolute()
        if str(file.parent) not in sys.path:
            sys.path.append(str(file.parent))  # last, so that its neighbours can be imported but shadow nothing
        module_name = f"iterdpo_judge_{digest([str(file), sha256_file(file)])}"
        if module_name in sys.modules:  # `probe_judge` has imported it
            return sys.modules[module_name]
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # dataclasses and pickle look their module up there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
        return module
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if source.file is not None and frame.filename == str(source.file.absolute())]
        # sys.exit may be a library's own by now, and says nothing of where it was called.
        where = own[-1] if own and isinstance(error, SystemExit) else frames[-1]
        remedy = ""
        if isinstance(error, ModuleNotFoundError):
            remedy = f"; install {error.name} into this environment" if error.name else ""
        elif isinstance(error, ImportError) and "relative import" in str(error):
            remedy = (
                "; import its neighbours by their names alone (from words import count), since its folder is searched"
            )
        raise JudgeError(
            f"judge {use!r}: importing it raised {type(error).__name__}: {printable(str(error))} ({where.filename}, line "
            f"{where.lineno}){remedy}"
        ) from error


def _definitions(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """The names that a module's statements bind at its top level; `*` if a star import hides some."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node
            case ast.Import() | ast.ImportFrom():
                for alias in node.names:
                    yield alias.asname or alias.name.partition(".")[0], node
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    for leaf in ast.walk(target):
                        if isinstance(leaf, ast.Name):
                            yield leaf.id, node
            case _:
                for block in ("body", "orelse", "finalbody"):
                    yield from _definitions(getattr(node, block, []))
                for handler in getattr(node, "handlers", []):
                    yield from _definitions(handler.body)


def _check_definition(node: ast.stmt, args: dict[str, Any], label: str) -> None:
    match node:
        case ast.FunctionDef(decorator_list=[]) | ast.AsyncFunctionDef(decorator_list=[]):
            check_signature(_signature(node.args), args, label, constructor=False)
        case ast.ClassDef(decorator_list=[], keywords=[]):
            makers = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name in ("__init__", "__new__")]
            if makers and not makers[-1].decorator_list:
                check_signature(_signature(makers[-1].args, skip=1), args, label, constructor=True)
            elif not makers and not node.bases:
                check_signature(inspect.Signature(), args, label, constructor=True)


def _signature(arguments: ast.arguments, skip: int = 0) -> inspect.Signature:
    """The signature that a definition will have, without its first `skip` parameters."""
    P = inspect.Parameter
    named: list[tuple[ast.arg | None, Any]] = [
        *[(a, P.POSITIONAL_ONLY) for a in arguments.posonlyargs],
        *[(a, P.POSITIONAL_OR_KEYWORD) for a in arguments.args],
        (arguments.vararg, P.VAR_POSITIONAL),
        *[(a, P.KEYWORD_ONLY) for a in arguments.kwonlyargs],
        (arguments.kwarg, P.VAR_KEYWORD),
    ]
    optional = [*arguments.posonlyargs, *arguments.args][::-1][: len(arguments.defaults)]
    optional += [a for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is not None]
    given = [P(a.arg, kind, default=None if a in optional else P.empty) for a, kind in named if a]
    return inspect.Signature(given[skip:])


def _label(use: str) -> str:
    """How reports call the judge: `my_judge.py:score`, without the directories before it."""
    place, _, name = use.rpartition(":")
    return f"{Path(place).name}:{name}" if place.endswith(".py") else use


def _content(value: Any) -> Any:
    """`value` with every path of an existing file or directory replaced by a hash of what is there."""
    match value:
        case {"use": str(use)}:
            rest = {k: v for k, v in value.items() if k not in ("use", "args")}
            return {"judge": judge_version(use, value.get("args") or {}), **_content(rest)}
        case dict():
            return {str(k): _content(v) for k, v in value.items()}
        case list() | tuple():
            return [_content(v) for v in value]
        case str() | Path() if os.path.isfile(value) or (os.sep in str(value) and os.path.isdir(value)):
            path = Path(value).absolute()
            files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
            return _path_digest(path, tuple((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files))
        case None | bool() | int() | float() | str():
            return value
        case _:
            return str(value)


@functools.lru_cache(maxsize=64)
def _path_digest(path: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    """Cached by names, sizes and times, so that a checkpoint of many GB is read once a process."""
    return directory_digest(path) if path.is_dir() else sha256_file(path)
