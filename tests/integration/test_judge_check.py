"""`iterdpo judge` as a user runs it: real processes, real preference data, a real (random) reward model, Ctrl-C."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from iterdpo.run.rundir import write_jsonl


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "flows.cli", "judge", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def judge(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A random sequence classifier with the tiny checkpoint's tokenizer, whose tokens are bytes."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    directory = tmp_path_factory.mktemp("rm") / "my-rm"
    settings = json.loads((tiny_model / "config.json").read_text())
    kept = {
        k: v for k, v in settings.items() if k not in ("architectures", "model_type", "dtype", "transformers_version")
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlamaForSequenceClassification(
            LlamaConfig(**{**kept, "num_labels": 1, "max_position_embeddings": 1024})
        )
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(directory)
    return directory


@pytest.mark.slow
def test_a_random_reward_model_is_at_chance_on_hh_rlhf_pairs_that_a_coin_labelled(
    tmp_path: Path, hh_rlhf: Path, reward_model: Path
) -> None:
    """On the real labels it need not be at 50 %: a random network has tastes, and so have labels. On a coin's it is."""
    with gzip.open(hh_rlhf, "rt", encoding="utf-8") as file:
        real = [json.loads(line) for line in islice(file, 600)]
    coin = random.Random(0)
    heads = [coin.random() < 0.5 for _ in real]
    tossed = [
        {"chosen": row["rejected"], "rejected": row["chosen"]} if head else row
        for row, head in zip(real, heads, strict=True)
    ]
    write_jsonl(tmp_path / "tossed.jsonl", tossed)

    def check(data: str) -> dict[str, Any]:
        ended = judge(
            tmp_path, "check", "reward_model", "--data", data, "--limit", "600", "--json", "out.json", "--page", "out.html",
            "--args", f"model={reward_model}", "dtype=float32", "device=cpu", "max_length=512",
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        assert "kept 598 of 600 pairs (2 have an empty completion)" in ended.stdout
        return json.loads((tmp_path / "out.json").read_text())

    by_coin, by_people = check("tossed.jsonl"), check(str(hh_rlhf))
    accuracy, coverage = by_coin["figures"]["accuracy"], by_coin["figures"]["coverage"]
    assert accuracy["low"] <= 0.5 <= accuracy["high"]
    assert accuracy["high"] - accuracy["low"] < 0.15  # some 250 pairs: 2 · 1.96 · 0.5 / sqrt(250) = 0.124
    # What does not fit into max_length abstains, with its reason.
    assert 0.3 < coverage["value"] < 1
    assert accuracy["n"] == by_coin["counts"]["judged"] == round(coverage["value"] * 598)
    assert list(by_coin["abstentions"]) == ["more than the 512 tokens that the reward model reads"]
    # The judge saw the same texts both times: its verdicts are the same, up to which of the two is called chosen.
    other = {"chosen": "rejected", "rejected": "chosen", "tie": "tie", None: None}
    for tossed_pair, real_pair in zip(by_coin["pairs"], by_people["pairs"], strict=True):
        said = real_pair["verdict"]
        assert tossed_pair["verdict"] == (other[said] if heads[real_pair["row"] - 1] else said)
    assert "<svg" in (tmp_path / "out.html").read_text()


def test_ctrl_c_prints_what_is_there_so_far(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\n\n"
        "def slow(completion):\n"
        "    with open('calls', 'a') as file:\n"
        "        file.write('.')\n"
        "    time.sleep(0.002)\n"
        "    return len(completion)\n"
    )
    write_jsonl(
        tmp_path / "pairs.jsonl", [{"prompt": f"q {i}", "chosen": "yes", "rejected": "no"} for i in range(20_000)]
    )
    running = subprocess.Popen(
        command("check", "slow.py:slow", "--data", "pairs.jsonl", "--json", "out.json"),
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    calls, deadline = tmp_path / "calls", time.monotonic() + 60
    while not calls.exists() or calls.stat().st_size < 2 * 64 * 2 + 1:  # two blocks of pairs, and a bit
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Stopped early (interrupted)" in out
    assert "Traceback" not in err
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["counts"]["pairs"] % 64 == 0
    assert 128 <= found["counts"]["pairs"] < 20_000
    assert found["figures"]["accuracy"]["value"] == 1.0


def test_a_judge_that_gives_up_reports_what_it_has_said_and_fails(tmp_path: Path) -> None:
    (tmp_path / "mortal.py").write_text(
        "from iterdpo.errors import JudgeError\n\n"
        "class Mortal:\n"
        "    calls = 0\n\n"
        "    def judge(self, groups):\n"
        "        from iterdpo.judging.judge import judgment_from_scores\n"
        "        self.calls += 1\n"
        "        if self.calls > 2:\n"
        "            raise JudgeError('the endpoint is gone; start it again')\n"
        "        return [judgment_from_scores(g, [len(c.text) for c in g.completions]) for g in groups]\n"
    )
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": f"q {i}", "chosen": "yes", "rejected": "no"} for i in range(500)])
    ended = judge(tmp_path, "check", "mortal.py:Mortal", "--data", "pairs.jsonl")
    assert ended.returncode == 2
    assert "Stopped early (the endpoint is gone; start it again)" in ended.stdout
    assert ended.stderr.rstrip().endswith("iterdpo: the endpoint is gone; start it again")


def test_try_and_compare_run_as_commands(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text(
        "def longer(completion):\n    return len(completion)\n\n\n"
        "def shorter(prompt, a, b):\n    return 'a' if len(a) < len(b) else 'b' if len(b) < len(a) else 'tie'\n"
    )
    rows = [{"prompt": f"q {i}", "completions": ["a", "bb", "ccc" + "c" * (i % 2)]} for i in range(40)]
    write_jsonl(tmp_path / "completions.jsonl", rows)
    ended = judge(
        tmp_path, "compare", "my.py:longer", "my.py:shorter", "--data", "completions.jsonl", "--json", "out.json"
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["counts"]["pairs"] == 120
    assert found["figures"]["opposite"]["value"] == 1.0
    assert found["figures"]["kendall"]["value"] == pytest.approx(-1.0)
    assert "A says second, B says first" in ended.stdout

    ended = judge(tmp_path, "try", "my.py:shorter", "Sing!", "la", "la la")
    assert ended.returncode == 0, ended.stderr
    assert "completion 0: score 1   la" in ended.stdout
    ended = judge(tmp_path, "try", "my.py:shorter", "Sing!", "la")
    assert ended.returncode == 2
    assert ended.stderr == "iterdpo: judge 'my.py:shorter' compares completions with each other; give it two or more\n"
