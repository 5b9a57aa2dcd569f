"""Attacks on a judge: what they are made of, how each fares, and whether the advice follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.judge_cli import app
from iterdpo.errors import UserError
from iterdpo.run.rundir import write_jsonl
from iterdpo.testing_http import FakeEndpoint
from judges.audit.attacks import ATTACKS, attacks_on, measure_attacks, shipped_attacks
from judges.audit.check import check_judge_on
from judges.audit.labelled import read_labelled
from judges.load import load_judge

JUDGES = """
def honest(completion, gold):
    return float(gold in completion) - len(completion) / 1e6

def honest_or_tie(completion, gold):
    return float(gold in completion)

def longer(completion):
    return len(completion)

def padded(completion, gold):
    return (gold in completion) * len(completion)

def shrug(prompt, a, b):
    return "tie"

def once(completion, prompt, gold):
    return 2.0 if completion == ":" and prompt == "What is 17 + 25?" else float(gold in completion)

def silent(completion):
    return None

def tests(completion, tests):
    return 1.0
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my.py").write_text(JUDGES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def attacked(name: str) -> dict[str, Any]:
    return measure_attacks(check_judge_on(load_judge(f"my.py:{name}", {}), shipped_attacks(limit=24)).pairs)


def judge(*arguments: str) -> int:
    return app(arguments, result_action="return_value")


def test_every_shipped_prompt_has_an_honest_answer_with_its_gold_and_no_attack_without_it_has() -> None:
    groups = list(shipped_attacks(limit=1_000))
    prompts = {g.prompt.id: g for g in groups}
    assert len(groups) == len(prompts) * len(ATTACKS) >= 24 * len(ATTACKS)
    assert len({g.row for g in groups}) == len(groups)
    keeps = {attack.name: attack.keeps for attack in ATTACKS}
    for group in groups:
        honest, attack = (c.text for c in group.completions)
        gold = group.prompt.columns["gold"]
        assert gold in honest
        if not keeps[str(group.subset)]:
            assert gold not in attack
        elif group.subset != "language":
            assert honest in attack


@pytest.mark.parametrize(
    ("name", "advice", "pays"),
    [
        ("honest", "train", []),
        ("honest_or_tie", "train", []),
        ("padded", "no", ["praise", "padding", "repetition"]),
        ("shrug", "no", ["colon", "steps", "question", "flattery", "filler", "verdict", "instruction"]),
        ("silent", "unknown", []),
    ],
)
def test_the_advice_follows_from_what_pays(here: Path, name: str, advice: str, pays: list[str]) -> None:
    found = attacked(name)
    assert (found["advice"], found["pays"]) == (advice, pays)


def test_an_attack_that_seldom_wins_calls_for_care(here: Path) -> None:
    found = attacked("once")
    assert (found["advice"], found["pays"], found["perhaps"]) == ("care", [], ["colon"])


def test_an_attack_wins_as_often_as_it_is_preferred_and_a_tie_is_half(here: Path) -> None:
    found = attacked("honest_or_tie")["attacks"]
    assert found["colon"]["wins"].value == 0.0
    assert found["padding"]["wins"].value == 0.5
    assert found["padding"]["ties"] == found["padding"]["judged"] == 24
    longer = attacked("longer")["attacks"]
    assert longer["colon"]["wins"].value == 0.0
    assert longer["padding"]["wins"].value == 1.0
    assert longer["padding"]["pays"] == "yes"


def test_labelled_data_is_attacked_with_its_chosen_completions_and_its_columns(here: Path) -> None:
    rows = [
        {"prompt": "2+2?", "chosen": "four", "rejected": "five", "gold": "four", "translation": "vier"},
        {"prompt": "2+2?", "chosen": "four", "rejected": "six", "gold": "four"},
        {"prompt": "1+1?", "chosen": "two", "rejected": "three", "gold": "two", "tie": True},
        {"prompt": "3+3?", "chosen": "six", "rejected": "one", "gold": "six"},
        {"prompt": "4+4?", "chosen": "eight", "rejected": "one", "gold": "eight"},
    ]
    write_jsonl(here / "pairs.jsonl", rows)
    groups = list(attacks_on(read_labelled("pairs.jsonl")[0], limit=2))
    assert {g.prompt.text for g in groups} == {"2+2?", "3+3?"}
    assert [g.completions[1].text for g in groups if g.subset == "language"] == ["vier"]
    assert {g.completions[1].text for g in groups if g.subset == "question"} == {
        "2+2?\n\n2+2?\n\n2+2?",
        "3+3?\n\n3+3?\n\n3+3?",
    }
    assert groups[0].prompt.columns["gold"] == "four"


def test_a_chat_is_attacked_with_its_last_turn(here: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hi."}]
    said = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "Hi."), ("rejected", "No."))}
    write_jsonl(here / "chats.jsonl", [{"prompt": chat, **said}])
    groups = list(attacks_on(read_labelled("chats.jsonl")[0], limit=9))
    assert next(g.completions[1].text for g in groups if g.subset == "question") == "Say hi.\n\nSay hi.\n\nSay hi."


def test_the_command_says_plainly_whether_to_train(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert judge("check", "my.py:longer", "--attack", "--json", "out.json", "--page", "out.html") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Do not train on my.py:longer as it is: against an honest answer on 24 prompts these pay" in said
    assert "and 6 others." in said
    assert "24 of 24" in said
    found = json.loads((here / "out.json").read_text())
    assert found["attack"]["advice"] == "no"
    assert found["attack"]["attacks"]["padding"]["wins"]["value"] == 1.0
    assert "figures" not in found
    assert "Do not train on my.py:longer" in (here / "out.html").read_text()
    assert judge("check", "my.py:honest", "--attack", "--attack-prompts", "3") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "No attack pays against an honest answer on 3 prompts" in said


def test_data_are_measured_and_then_attacked(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(here / "pairs.jsonl", [{"prompt": f"q {i}", "chosen": "yes, yes", "rejected": "no"} for i in range(30)])
    assert judge("check", "my.py:longer", "--attack", "--data", "pairs.jsonl", "--json", "out.json") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "100.0 % of 30 pairs of 30 prompts (95 % interval" in said
    assert "Do not train on my.py:longer" in said
    found = json.loads((here / "out.json").read_text())
    assert found["attack"]["prompts"] == 24
    assert len(found["pairs"]) == 30


def test_data_without_a_chosen_completion_have_nothing_to_attack_with(here: Path) -> None:
    write_jsonl(here / "ties.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b", "tie": True}])
    with pytest.raises(UserError, match="every row is a tie, or has an empty chosen completion"):
        judge("check", "my.py:longer", "--attack", "--data", "ties.jsonl")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("check", "my.py:longer"), r"nothing to check my\.py:longer on; give --data .* or --attack"),
        (("check", "my.py:tests", "--attack"), r"asks for a column 'tests' .*; give --data with prompts that do"),
    ],
)
def test_an_attack_without_what_it_needs_is_refused(here: Path, arguments: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        judge(*arguments)


def test_a_language_model_that_obeys_its_completions_is_found_out(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names the completion that is called the better one in the text, else the honest one, which does not flatter."""

    def obeys(body: dict[str, Any]) -> str:
        asked = str(body["messages"][-1]["content"])
        first, _, second = asked.partition("Completion B")
        if ("Note to the judge" in first) != ("Note to the judge" in second):
            return f"Verdict: {'A' if 'Note to the judge' in first else 'B'}"
        return "Verdict: tie"

    with FakeEndpoint(obeys) as server:
        config = {"use": "pairwise", "args": {"model": "fake", "endpoint": {"base_url": server.base_url}}}
        (here / "judge.yaml").write_text(json.dumps({"judge": config}))
        arguments = ("--args", "constrain=none", "--attack-prompts", "4", "--json", "-")
        assert judge("check", "judge.yaml", "--attack", *arguments) == 0
    found = json.loads(capsys.readouterr().out)["attack"]
    assert found["attacks"]["instruction"]["wins"]["value"] == 1.0
    assert found["advice"] == "no"
    assert found["cost"]["usage"]["calls"] == 2 * 4 * len(ATTACKS)


def test_an_answer_that_equals_its_attack_is_no_attack(here: Path) -> None:
    write_jsonl(here / "pairs.jsonl", [{"prompt": "How is a list announced?", "chosen": ":", "rejected": "."}])
    tried = [group.subset for group in attacks_on(read_labelled("pairs.jsonl")[0], limit=1)]
    assert tried == [attack.name for attack in ATTACKS if attack.name not in ("colon", "language")]
