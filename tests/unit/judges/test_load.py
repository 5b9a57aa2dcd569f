"""A judge is found by its name, or its absence is explained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from iterdpo.errors import JudgeError
from iterdpo.testing import make_group
from judges import check_judge, judge_version, load_judge
from judges.load import check_columns, compares, key_variables, probe_judge

SOURCE = """
import math
from dataclasses import dataclass
from os.path import join as joined

limit: int = 3
first, second = 1, 2
shorter = lambda completion: -len(completion)

def longer(prompt, completion, *, factor=1.0):
    return factor * len(completion)

if limit > 2:
    async def later(completion):
        return 1.0
else:
    def never(completion):
        return 0.0

class Scorer:
    def __init__(self, factor, offset=0):
        self.factor, self.offset = factor, offset

    def score(self, completion):
        return self.factor * len(completion) + self.offset

class Bare:
    def compare(self, a, b):
        return "tie"

@dataclass
class Data:
    factor: float = 1.0

    def score(self, completion):
        return self.factor
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_judge.py"
    path.write_text(SOURCE)
    return path


@pytest.mark.parametrize(
    ("name", "args", "scores"),
    [
        ("longer", {}, [1.0, 2.0]),
        ("longer", {"factor": 2}, [2.0, 4.0]),
        ("shorter", {}, [-1.0, -2.0]),
        ("later", {}, [1.0, 1.0]),
        ("Scorer", {"factor": 3, "offset": 1}, [4.0, 7.0]),
        ("Bare", {}, [0.5, 0.5]),
        ("Data", {"factor": 2.0}, [2.0, 2.0]),
    ],
)
def test_a_name_in_a_file_becomes_a_judge(file: Path, name: str, args: dict[str, Any], scores: list[float]) -> None:
    judge = load_judge(f"{file}:{name}", args)
    assert judge.name == f"my_judge.py:{name}"
    assert judge.version == judge_version(f"{file}:{name}", args)
    assert judge.judge([make_group("x", ["a", "bb"])])[0].scores == scores


def test_a_name_in_a_module_becomes_a_judge() -> None:
    judge = load_judge("trl.rewards:get_repetition_penalty_reward", {"ngram_size": 2})
    assert judge.judge([make_group("x", ["abcd", "aaaaa"])])[0].scores == [0.0, -0.75]


def test_a_file_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "words_beside_the_judge.py").write_text("GOOD = {'joy'}\n")
    (tmp_path / "j.py").write_text(
        "def judge(completion):\n    from words_beside_the_judge import GOOD\n    return len(GOOD & {completion})\n"
    )
    assert load_judge(f"{tmp_path / 'j.py'}:judge", {}).judge([make_group("x", ["joy", "no"])])[0].scores == [1.0, 0.0]


@pytest.mark.parametrize(
    ("use", "args", "complaint"),
    [
        ("{dir}/my_juge.py:longer", {}, "no such file .*my_juge.py; did you mean 'my_judge.py'?"),
        ("{file}:long", {}, "my_judge.py defines no 'long'; did you mean 'longer'?"),
        ("{file}:zzz", {}, "defines no 'zzz'; it defines: math, dataclass, joined, limit, first, second"),
        ("{file}:longer", {"facto": 1}, "unknown argument 'facto'; did you mean 'factor'?"),
        ("{file}:Scorer", {}, "missing argument 'factor'; give it under `args`"),
        ("{file}:Scorer", {"factor": 1, "ofset": 2}, "unknown argument 'ofset'; did you mean 'offset'?"),
        ("{file}:Bare", {"x": 1}, "unknown argument 'x'; it accepts: nothing"),
        ("no_such_package_at_all.judge:score", {}, "no module 'no_such_package_at_all.judge' can be imported here"),
        ("iterdpo.no_such_module:score", {}, "no module 'iterdpo.no_such_module'"),
        ("json..tool:score", {}, "no module 'json..tool'"),
        ("judges.sentiment:LinearSentimant", {}, "did you mean 'LinearSentiment'"),
        ("judges.sentiment:LinearSentiment", {"pth": "x"}, "missing argument 'path'"),
        ("trl.rewards:accuracy_rewards", {}, "did you mean 'accuracy_reward'"),
        ("reward-model", {}, "did you mean 'reward_model'"),
        ("my_judge.py:", {}, "a judge is named"),
    ],
)
def test_a_mistake_is_found_without_running_the_code(
    file: Path, use: str, args: dict[str, Any], complaint: str
) -> None:
    file.write_text(SOURCE + "\nraise SystemExit('the judge was run')\n")
    with pytest.raises(JudgeError, match=complaint):
        check_judge(use.format(file=file, dir=file.parent), args)


def test_a_sound_judge_passes_without_running_the_code(file: Path) -> None:
    file.write_text(SOURCE + "\nraise SystemExit('the judge was run')\n")
    for name, args in [("longer", {"factor": 2}), ("Scorer", {"factor": 1}), ("Data", {"anything": 1}), ("second", {})]:
        check_judge(f"{file}:{name}", args)


def test_a_function_with_other_parameters_is_refused(tmp_path: Path) -> None:
    (tmp_path / "j.py").write_text("def judge(prompt, response):\n    return 1\n")
    with pytest.raises(
        JudgeError, match=r"judge 'j.py:judge': its parameters \(prompt, response\) fit no form of judge"
    ):
        check_judge(f"{tmp_path / 'j.py'}:judge", {})


def test_a_syntax_error_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "j.py").write_text("x = 1\ndef judge(:\n")
    with pytest.raises(JudgeError, match=r"j.py, line 2: not valid Python"):
        check_judge(f"{tmp_path / 'j.py'}:judge", {})


def test_an_import_that_fails_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "j.py").write_text("import no_such_package_at_all\ndef judge(completion):\n    return 1\n")
    with pytest.raises(JudgeError, match=r"raised ModuleNotFoundError: No module named .* \(.*j.py, line 1\)"):
        load_judge(f"{tmp_path / 'j.py'}:judge", {})


def test_a_name_behind_a_star_import_is_left_to_the_import(tmp_path: Path) -> None:
    (tmp_path / "j.py").write_text("from math import *\n")
    check_judge(f"{tmp_path / 'j.py'}:judge", {})
    with pytest.raises(JudgeError, match="no 'sqr' there; did you mean 'sqrt'"):
        load_judge(f"{tmp_path / 'j.py'}:sqr", {})


class TestVersion:
    def test_it_follows_the_source_the_name_and_the_arguments(self, file: Path) -> None:
        versions = {
            judge_version(f"{file}:longer", {}),
            judge_version(f"{file}:shorter", {}),
            judge_version(f"{file}:longer", {"factor": 2}),
        }
        file.write_text(SOURCE + "# changed\n")
        versions.add(judge_version(f"{file}:longer", {}))
        assert len(versions) == 4

    def test_it_does_not_follow_the_place_of_the_files(self, tmp_path: Path) -> None:
        versions = set()
        for folder in (tmp_path / "a", tmp_path / "b"):
            (folder / "weights").mkdir(parents=True)
            (folder / "j.py").write_text(SOURCE)
            (folder / "weights" / "w.bin").write_bytes(b"123")
            versions.add(judge_version(f"{folder / 'j.py'}:Scorer", {"factor": str(folder / "weights")}))
        assert len(versions) == 1

    def test_it_follows_the_content_of_files_and_directories_among_the_arguments(
        self, file: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "weights").mkdir()
        (tmp_path / "weights" / "w.bin").write_bytes(b"123")
        (tmp_path / "words.txt").write_text("good")

        def version() -> str:
            args = {"nested": [{"file": str(tmp_path / "words.txt")}], "directory": str(tmp_path / "weights")}
            return judge_version(f"{file}:longer", args)

        before = version()
        (tmp_path / "words.txt").write_text("better")
        between = version()
        (tmp_path / "weights" / "w.bin").write_bytes(b"1234")
        assert len({before, between, version()}) == 3

    def test_a_long_text_is_no_path(self, file: Path) -> None:
        judge_version(f"{file}:longer", {"template": "x" * 100_000, "when": Path("no/such")})

    def test_another_process_agrees_and_imports_no_torch(self, file: Path) -> None:
        code = (
            "import json, sys\n"
            "from judges import check_judge, judge_version\n"
            "use, args = json.loads(sys.argv[1])\n"
            "check_judge(use, args)\n"
            "print(judge_version(use, args), 'torch' in sys.modules)\n"
        )
        request = json.dumps([f"{file}:longer", {"factor": 2}])
        process = subprocess.run(
            [sys.executable, "-c", code, request],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": "1"},
        )
        assert process.stdout.split() == [judge_version(f"{file}:longer", {"factor": 2}), "False"]


def test_a_column_is_not_looked_for_in_a_method_that_a_base_class_may_answer_before(tmp_path: Path) -> None:
    source = "class Mine({}):\n    def score(self, completion, gold):\n        return gold in completion\n"
    for bases, refused in (("", True), ("Base", False)):
        (tmp_path / "mine.py").write_text(source.format(bases))
        with pytest.raises(JudgeError, match="asks for a column 'gold'") if refused else nullcontext():
            check_columns(f"{tmp_path / 'mine.py'}:Mine", ["topic"], ["gold"])  # args go to the constructor


IMPORTS = [
    ("import no_such_package", r"ModuleNotFoundError: .*line 1\); install no_such_package into this environment"),
    ("from .words import words", r"ImportError: .*; import its neighbours by their names alone"),
    ("from math import no_such_name", r"ImportError: cannot import name 'no_such_name'"),
    ("1 / 0", r"ZeroDivisionError: division by zero \(.*judge\.py, line 1\)"),
    ("raise SystemExit(2)", r"SystemExit: 2"),
    ("import argparse; argparse.ArgumentParser().parse_args(['--x'])", r"SystemExit: 2"),
]


@pytest.mark.parametrize(("line", "complaint"), IMPORTS)
def test_probing_a_judge_imports_it_and_says_what_fails(tmp_path: Path, line: str, complaint: str) -> None:
    file = tmp_path / "judge.py"
    file.write_text(f"{line}\ndef score(completion):\n    return 1.0\n")
    check_judge(f"{file}:score", {})  # reads it only
    with pytest.raises(JudgeError, match=complaint):
        probe_judge(f"{file}:score", {})
    with pytest.raises(JudgeError, match=complaint):
        probe_judge("clip", {"judge": {"use": f"{file}:score"}, "low": 0})


def test_a_judge_is_imported_once_and_again_if_its_file_has_changed(tmp_path: Path) -> None:
    file, log = tmp_path / "judge.py", tmp_path / "log"
    source = f"with open({str(log)!r}, 'a') as log: log.write('x')\ndef score(completion): return 1.0\n"
    file.write_text(source)
    probe_judge(f"{file}:score", {})
    load_judge(f"{file}:score", {})
    assert log.read_text() == "x"
    file.write_text(source.replace("1.0", "2.0"))
    assert load_judge(f"{file}:score", {}).judge([make_group("p", ["c"])])[0].scores == [2.0]


def test_probing_a_judge_makes_none(tmp_path: Path) -> None:
    file = tmp_path / "heavy.py"
    file.write_text("class Heavy:\n    def __init__(self): 1 / 0\n    def score(self, completion): ...\n")
    probe_judge(f"{file}:Heavy", {})
    file.write_text("def make(size):\n    1 / 0\n")
    probe_judge(f"{file}:make", {"size": 3})


COMPARING = "def a(prompt, a, b): ...\ndef s(completion): ...\nclass C:\n    def compare(self, a, b): ...\n"


@pytest.mark.parametrize(
    ("use", "args", "known"),
    [
        ("{file}:a", {}, True),
        ("{file}:s", {}, False),
        ("{file}:C", {}, False),  # not known without making it
        ("pairwise", {"model": "m", "endpoint": {"base_url": "http://localhost:1/v1"}}, True),
        ("rubric", {"model": "m", "endpoint": {"base_url": "http://localhost:1/v1"}}, False),
        ("exact_match", {"column": "gold"}, False),
        ("z_score", {"judge": {"use": "exact_match", "args": {"column": "gold"}}}, True),
        ("ensemble", {"judges": [{"use": "exact_match", "args": {"column": "gold"}}], "standardize": "group"}, True),
        ("ensemble", {"judges": [{"use": "exact_match", "args": {"column": "gold"}}]}, False),
    ],
)
def test_whether_a_judge_gives_scores_only_against_others(
    tmp_path: Path, use: str, args: dict[str, Any], known: bool
) -> None:
    (tmp_path / "judge.py").write_text(COMPARING)
    assert compares(use.format(file=tmp_path / "judge.py"), args) is known


def test_the_variables_with_keys_are_found_at_any_depth() -> None:
    inner = {"use": "remote", "args": {"url": "http://x/y", "api_key_env": "INNER"}}
    args = {
        "judges": [inner, {"use": "pairwise", "args": {"endpoint": {"api_key_env": "OTHER"}}}],
        "api_key_env": "OUTER",
    }
    assert set(key_variables(args)) == {"INNER", "OTHER", "OUTER"}
    assert list(key_variables({"api_key_env": None, "model": "m"})) == []
