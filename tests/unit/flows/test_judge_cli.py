"""`iterdpo judge check | compare | try`: what it takes, what it prints, and what it says of mistakes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.judge_cli import app
from iterdpo.errors import UserError
from iterdpo.run.rundir import write_jsonl
from iterdpo.testing_http import FakeEndpoint

JUDGES = """
def longer(prompt, completion):
    return len(completion)

def exact(completion, gold):
    return float(completion == gold)

def first(prompt, a, b):
    return "a"

def needs(completion, word):
    return float(word in completion)

def says(completion, word="yes"):
    return float(word in completion)

def broken(prompt, completion):
    raise RuntimeError("\\x1b[31mno\\x1b[0m")
"""
HOSTILE = "<script>window.pwned=1</script> {{ 7 * 7 }} bell \x07 red \x1b[31m [bold]markup[/bold]"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my.py").write_text(JUDGES)
    rows = [
        {
            "prompt": f"Question {i}",
            "chosen": "yes, indeed",
            "rejected": "no" * (i % 9),
            "kind": ("a", "b")[i % 2],
            "gold": 1,
        }
        for i in range(1, 100)
    ]
    rows[4]["rejected"] = HOSTILE
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def judge(*arguments: str) -> int:
    return app(arguments, result_action="return_value")


def test_check_prints_a_table_and_writes_json_and_a_page(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = ("--json", "out.json", "--page", "out.html")
    assert judge("check", "my.py:longer", "--data", "pairs.jsonl", "--subset-column", "kind", *outputs) == 0
    said = capsys.readouterr()
    assert "kept 88 of 99 pairs (11 have an empty completion)" in said.out
    assert "By subset" in said.out
    assert "judged" in said.err  # progress
    found = json.loads((here / "out.json").read_text())
    # "no" repeated 1 to 8 times has 2 to 16 characters, "yes, indeed" 11: longer from 6 times on, in 3 rows of 9 (and
    # the hostile one, row 5).
    wrong = sum(i % 9 >= 6 for i in range(1, 100)) + 1
    assert found["figures"]["accuracy"]["value"] == pytest.approx(1 - wrong / 88)
    assert found["figures"]["longer_wins"]["value"] == 1.0
    assert found["subsets"]["a"]["pairs"] + found["subsets"]["b"]["pairs"] == 88
    assert len(found["pairs"]) == 88
    assert found["judge"]["use"] == "my.py:longer"


def test_what_a_model_wrote_is_escaped_on_the_page_and_visible_on_the_terminal(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judge("check", "my.py:longer", "--data", "pairs.jsonl", "--page", "out.html") == 0
    page = (here / "out.html").read_text()
    assert "&lt;script&gt;window.pwned=1&lt;/script&gt; {{ 7 * 7 }} bell \u2407 red \u241b[31m [bold]markup" in page
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    capsys.readouterr()
    assert judge("compare", "my.py:longer", "my.py:first", "--data", "pairs.jsonl", "--limit", "9") == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\u241b[31m [bold]markup[/bold]" in shown
    assert judge("try", "my.py:broken", "2+2?", "\x1b[31m4") == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "abstained: RuntimeError: \u241b[31mno" in shown


def test_json_alone_goes_to_the_standard_output(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert judge("check", "my.py:longer", "--data", "pairs.jsonl", "--json", "-", "--limit", "20") == 0
    assert json.loads(capsys.readouterr().out)["counts"]["pairs"] == 18


def test_the_same_seed_gives_the_same_report_and_another_another_order(here: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        judge("check", "my.py:longer", "--data", "pairs.jsonl", "--json", f"{name}.json", "--seed", seed)
    a, b, c = (json.loads((here / f"{name}.json").read_text()) for name in "abc")
    for report in (a, b, c):
        del report["cost"]
    assert a == b
    assert [p["chosen_first"] for p in a["pairs"]] != [p["chosen_first"] for p in c["pairs"]]


def test_compare_shows_the_confusion_and_the_pairs_on_which_they_differ(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = ("--json", "out.json", "--page", "out.html")
    arguments = ("--data", "pairs.jsonl", "--args-b", "word=indeed", *outputs)
    assert judge("compare", "my.py:longer", "my.py:says", *arguments) == 0
    said = capsys.readouterr().out
    assert said.count("better by the label") == 10  # the first ten, each once
    found = json.loads((here / "out.json").read_text())
    differ = sum(i % 9 >= 6 for i in range(1, 100)) + 1
    assert found["figures"]["opposite"]["value"] == pytest.approx(differ / 88)
    assert found["figures"]["accuracy_b"]["value"] == 1.0
    assert found["confusion"]["tie"] == {"first": 0, "second": 0, "tie": 0}
    page = (here / "out.html").read_text()
    assert page.count('<article class="card example">') == 12


def test_try_shows_scores_and_reads_columns_as_text_and_arguments_as_yaml(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judge("try", "my.py:exact", "2+2?", "4", "5", "--columns", "gold=4") == 0
    said = capsys.readouterr().out
    assert "completion 0: score 1   4" in said
    assert "completion 1: score 0   5" in said
    assert 'columns: {"gold": "4"}' in said
    assert judge("try", "my.py:needs", "2+2?", "four", "--args", "word=four") == 0
    assert "completion 0: score 1" in capsys.readouterr().out
    assert judge("try", "my.py:says", "2+2?", "four", "--args", "word=four", "--json") == 0
    assert json.loads(capsys.readouterr().out)["scores"] == [1.0]
    assert judge("try", "my.py:first", "2+2?", "4", "5") == 0
    said = capsys.readouterr().out
    assert "completion 0 before completion 1: first" in said
    assert "completion 1 before completion 0: first" in said


def test_try_shows_what_a_language_model_was_asked_and_replied(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeEndpoint(lambda body: "Verdict: A") as server:
        arguments = ("model=fake", f"endpoint.base_url={server.base_url}", "endpoint.cache=off", "constrain=none")
        assert judge("try", "pairwise", "What is the capital of France?", "Paris", "Rome", "--args", *arguments) == 0
    said = capsys.readouterr().out
    assert said.count("What is the capital of France?") >= 2  # one call an order
    assert said.count("reply\nVerdict: A") == 2
    assert "completion 0 before completion 1: first" in said
    assert "completion 1 before completion 0: first" in said
    assert "usage: calls 2" in said


def test_check_says_that_a_server_starts_and_tells_its_own_seconds_from_those_of_the_calls(
    here: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (f"model={tiny_model}", "serve={}", "constrain=none")
    with FakeEndpoint(lambda body: "Verdict: A") as server:
        monkeypatch.setattr("judges.llm.server.Server.start", lambda self: server.base_url)
        assert judge("check", "pairwise", "--data", "pairs.jsonl", "--args", *arguments) == 0
    said = capsys.readouterr()
    assert f"starting a vLLM server for pairwise:{tiny_model.name} first" in said.err
    assert [len(re.findall(rf"(?m)^{name}  ", said.out)) for name in ("seconds", "seconds of calls", "calls")] == [
        1,
        1,
        1,
    ]


def test_a_configurations_judge_is_checked_with_overrides_laid_over_its_args(
    here: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config: dict[str, Any] = {
        "run_dir": "run",
        "model": {"path": str(tiny_model)},
        "prompts": {"path": "pairs.jsonl", "per_round": 8, "heldout": 4},
        "judge": {"use": "my.py:says", "args": {"word": "nothing"}},
        "evaluation": {"judge": {"use": "my.py:longer"}},
    }
    (here / "run.yaml").write_text(yaml.safe_dump(config))

    def accuracy(*more: str) -> float:
        assert judge("check", "run.yaml", "--data", "pairs.jsonl", "--json", "-", *more) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["length_unit"] == "tokens"  # of the run's model
        return found["figures"]["accuracy"]["value"]

    assert accuracy() == 0.5  # says nothing of either: ties
    assert accuracy("--args", "word=indeed") == 1.0
    assert accuracy("--role", "heldout") < 0.9
    config.pop("evaluation")
    (here / "run.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"run\.yaml: has no evaluation\.judge"):
        judge("check", "run.yaml", "--data", "pairs.jsonl", "--role", "heldout")


def test_a_file_with_a_section_judge_alone_is_enough_to_check_compare_and_try(
    here: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "judge.yaml").write_text("judge:\n  use: my.py:says\n  args: {word: indeed}\npairing: {min_margin: 0.1}\n")
    assert judge("check", "judge.yaml", "--data", "pairs.jsonl", "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["figures"]["accuracy"]["value"] == 1.0
    assert found["length_unit"] == "characters"
    assert judge("compare", "judge.yaml", "my.py:says", "--data", "pairs.jsonl", "--limit", "5") == 0
    assert judge("try", "judge.yaml", "Well?", "yes, indeed") == 0
    assert "completion 0: score 1" in capsys.readouterr().out
    more = f"model: {{path: {tiny_model}}}\nevaluation: {{judge: {{use: my.py:longer}}}}\n"
    (here / "both.yaml").write_text((here / "judge.yaml").read_text() + more)
    assert judge("check", "both.yaml", "--role", "heldout", "--data", "pairs.jsonl", "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["judge"]["use"].rpartition("/")[2], found["length_unit"]) == ("my.py:longer", "tokens")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("judg: {use: my.py:says}", r"small\.yaml: missing key 'judge'; unknown key 'judg'; did you mean 'judge'"),
        ("", r"small\.yaml: missing key 'judge'"),
        ("judge: my.py:says", r"small\.yaml: judge = 'my\.py:says': input should be"),
        ("judge: {use: 'my.py:says', arg: {}}", r"unknown key 'judge\.arg'; did you mean 'args'"),
        ("judge: {use: 'my.py:says'}\nrun_dir: here", r"small\.yaml: missing key 'model'; missing key 'prompts'"),
        ("judge: {use: 'my.py:says', args: {api_key: sk-abcdefghijklmnopqrst}}", r"judge\.args\.api_key looks like a secret"),
        ("data: {path: x}\nrun_dir: here", r"small\.yaml: has 'data': this is a configuration of `iterdpo train`"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_small_file_is_named(here: Path, text: str, complaint: str) -> None:
    (here / "small.yaml").write_text(text)
    with pytest.raises(UserError, match=complaint):
        judge("check", "small.yaml", "--data", "pairs.jsonl")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("check", "my.py:longest", "--data", "pairs.jsonl"), r"defines no 'longest'; did you mean 'longer'"),
        (("check", "my.py:exact", "--data", "none.jsonl"), r"none\.jsonl: no such file"),
        (
            ("check", "my.py:says", "--data", "pairs.jsonl", "--args", "wrod=x"),
            r"unknown argument 'wrod'; did you mean",
        ),
        (("check", "my.py:says", "--data", "pairs.jsonl", "--args", "word"), r"'word': write an override as key=value"),
        (
            ("check", "my.py:says", "--data", "pairs.jsonl", "--role", "heldout"),
            r"--role heldout needs a \.yaml configuration, but got",
        ),
        (("check", "none.yaml", "--data", "pairs.jsonl"), r"none\.yaml: no such configuration file"),
        (("check", "my.py:says", "--data", "pairs.jsonl", "--subset-column", "king"), r"row 1: no column 'king'"),
        (("try", "my.py:first", "2+2?", "4"), r"compares completions with each other; give it two or more"),
        (("try", "my.py:exact", "2+2?", "4"), r"asks for a column 'gold'.* --columns NAME=VALUE"),
        (("try", "my.py:exact", "2+2?", "4", "--columns", "gold"), r"'gold': write a column as NAME=VALUE"),
        (("try", "my.py:exact", "2+2?", "4", "--columns", "gold=[4"), r"'gold=\[4': not valid JSON"),
        (("compare", "my.py:says", "my.py:none", "--data", "pairs.jsonl"), r"defines no 'none'"),
        (("check", "person", "--data", "pairs.jsonl"), r"person: .* `iterdpo judge review RUN_DIR`"),
        (
            ("try", "clip", "2+2?", "4", "5", "--args", "judge.use=person", "low=0"),
            r"clip: a person can judge only within",
        ),
    ],
)
def test_a_mistake_is_named_with_its_remedy(here: Path, arguments: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        judge(*arguments)


def test_a_person_is_refused_before_the_other_judge_is_asked(here: Path) -> None:
    (here / "dear.py").write_text("def dear(completion):\n    open('asked', 'w')\n    return 1.0\n")
    with pytest.raises(UserError, match="person: a person can judge only within a run"):
        judge("compare", "dear.py:dear", "person", "--data", "pairs.jsonl")
    assert not (here / "asked").exists()


def test_help_imports_nothing_heavy() -> None:
    import subprocess

    code = (
        "import sys; from flows.judge_cli import app; app.help_print(); "
        "print([m for m in ('numpy', 'pandas', 'torch', 'aiohttp', 'matplotlib', 'prefect') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"
