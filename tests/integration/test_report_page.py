"""The report in a real browser: every plot drawn, nothing executed, nothing fetched, nothing wider than the window."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from iterdpo.report.page import write_report
from iterdpo.report.plots import BLUE, GREEN, ORANGE, PURPLE, SKY, as_png, figures
from iterdpo.run.artifacts import write_completion_shard
from iterdpo.run.read import read_run
from iterdpo.run.rundir import Manifest, RunDir, write_json, write_jsonl
from iterdpo.types import Completion, CompletionGroup, Judgment, Prompt, RoundRecord

HOSTILE = (
    "<script>window.pwned=1</script><img src=x onerror='window.pwned=1'>",
    "</svg></div></main>&lt;b&gt; {{ 7 * 7 }} {% raw %}",
    "w" * 5_000,
    "مرحبا بالعالم \u202eevil\u202c שלום",
    "🎬🍿👩‍👩‍👧‍👦 quite a film",
    "nul \x00 bell \x07 escape \x1b[31m c1 \x85 end",
    "a line\r\nand\n\n\nmore lines\n" * 40,
)
PLAIN = (
    "The film begins slowly, but the last hour is among the finest things that the director has made.",
    "I wanted to like it, and could not: the jokes are old, and nobody seems to care how it ends.",
    "A warm, generous picture with two performances to remember.",
    "What a waste of an evening.",
)
CONFIG = {
    "run_dir": "runs/films",
    "rounds": 4,
    "seed": 7,
    "model": {"path": "models/small-instruct"},
    "prompts": {"path": "data/films.jsonl", "per_round": 128, "heldout": 24},
    "sampling": {"n": 4, "temperature": 1.0, "max_tokens": 48},
    "judge": {"use": "judges_of_mine.py:sentiment"},
    "pairing": {"strategy": "best_worst", "min_margin": 0.05},
    "dpo": {"beta": 0.1, "reference": "previous", "learning_rate": 5e-5, "pairs_per_step": 8, "epochs": 1},
    "evaluation": {"judge": {"use": "judges_of_mine.py:lexicon"}, "confidence": 0.95},
    "gate": {"metric": "win_rate/vs_previous", "minimum": 0.5, "otherwise": "keep"},
}
ONLINE_PLOTS = {"scores", "win_rate", "reward_kl", "kl", "length", "pairs", "rewards", "logps", "time"}


def build_run(root: Path, *, rounds: int = 4, hostile: bool = True) -> Path:
    """A run of `rounds` rounds after the initial evaluation, of which the last is not promoted."""
    rng, run = random.Random(0), RunDir(root)
    root.mkdir()
    run.write_config(CONFIG)
    for r in range(rounds + 1):
        here = run.round_dir(r)
        metrics = round_metrics(r, last=r == rounds, rng=rng)
        write_groups(here / "evaluation", r, rng, n=1, hostile=hostile, judges=("train_judge", "heldout_judge"))
        if r:
            write_groups(here, r, rng, n=4, hostile=hostile, judges=("",))
            (here / "policy").mkdir()
            write_jsonl(here / "policy" / "train_log.jsonl", train_log(rng))
        run.write_record(
            RoundRecord(
                r, metrics["gate/decision"], metrics["gate/reason"], f"round-{r:03d}/policy", r, "0" * 16, {}, metrics
            )
        )
    return root


def write_groups(step: Path, r: int, rng: random.Random, *, n: int, hostile: bool, judges: tuple[str, ...]) -> None:
    texts = [*HOSTILE, *PLAIN] if hostile else PLAIN
    groups: list[CompletionGroup] = []
    verdicts: dict[str, list[dict[str, Any]]] = {judge: [] for judge in judges}
    for i in range(24):
        prompt = Prompt(
            f"p-{i:04d}", [{"role": "user", "content": texts[i % len(texts)] if hostile else f"{PLAIN[i % 4][:30]}"}]
        )
        picked = [texts[(i + k + r) % len(texts)] for k in range(n)]
        completions = [Completion(t, [1] * 40, [-1.0] * 40, "length" if i % 5 == 0 else "stop") for t in picked]
        groups.append(CompletionGroup(prompt, [1, 2], completions))
        for judge in judges:
            abstains = i % 7 == 3
            scores = [None if abstains else round(min(1.0, 0.3 + 0.12 * r + 0.2 * rng.random()), 3) for _ in picked]
            reasons = ["timed out after 30 s <script>window.pwned=1</script>" if abstains else None for _ in picked]
            verdicts[judge].append(Judgment(prompt.id, scores, reasons).to_json())
    (step / "completions").mkdir(parents=True)
    write_completion_shard(step / "completions" / "shard-000000.parquet", groups)
    for judge, rows in verdicts.items():
        (step / "judgments" / judge).mkdir(parents=True)
        write_jsonl(step / "judgments" / judge / "shard-000000.jsonl", rows)
        reasons = Counter(reason for row in rows for reason in row["abstentions"] if reason)
        manifest = Manifest("judgments", {}, {"abstentions": dict(reasons)}, {}, {}, {})
        write_json(step / "judgments" / judge / "MANIFEST.json", asdict(manifest))


def round_metrics(r: int, *, last: bool, rng: random.Random) -> dict[str, Any]:
    heldout, train = 0.29 + 0.17 * r - 0.2 * (last and r > 3), 0.59 + 0.085 * r
    rate = 0.5 + 0.09 * r - 0.1 * (last and r > 3)
    metrics: dict[str, Any] = {
        "round": r,
        "score/heldout_judge": heldout, "score/heldout_judge_low": heldout - 0.07, "score/heldout_judge_high": heldout + 0.07,
        "score/train_judge": train, "score/train_judge_low": train - 0.04, "score/train_judge_high": train + 0.04,
        "length/mean_tokens": 44 + r, "length/truncated": 0.81 + 0.02 * r, "distinct/1": 0.34 - 0.03 * r, "distinct/2": 0.8 - 0.04 * r,
        "evaluation/prompts": 24, "evaluation/completions": 24, "evaluation/unjudged": 0, "win_rate/judge": "heldout",
        "time/evaluate_s": 21.0, "time/round_s": 21.0, "gate/decision": "promote", "gate/reason": "the initial policy",
        "win_rate/vs_initial": None, "kl/to_initial": None,
    }  # fmt: skip
    if r:
        keep = last and r > 3
        metrics |= {
            "win_rate/vs_initial": rate, "win_rate/vs_initial_low": rate - 0.06, "win_rate/vs_initial_high": rate + 0.06,
            "win_rate/vs_previous": 0.56 - 0.14 * keep, "win_rate/vs_previous_low": 0.5 - 0.14 * keep, "win_rate/vs_previous_high": 0.62 - 0.14 * keep,
            "kl/to_initial": 4.1 * r**1.2, "kl/to_initial_low": 3.7 * r**1.2, "kl/to_initial_high": 4.5 * r**1.2,
            "prompts/sampled": 128, "completions/sampled": 512, "pairs/kept": 112 - 5 * r, "pairs/tied": 6 + 2 * r, "pairs/unjudged": 4 + r,
            "pairs/identical": r, "pairs/truncated": 6 + r, "rewards/accuracies": 0.71, "rewards/margins": 0.4, "loss": 0.6,
            "rewards/chosen": 0.1, "rewards/rejected": -0.3, "logps/chosen": -130.0, "logps/rejected": -150.0,
            "time/sample_s": 24.0 + rng.random(), "time/judge_s": 3.1, "time/pair_s": 0.4, "time/train_s": 41.0, "time/round_s": 90.0,
            "gate/decision": "keep" if keep else "promote",
            "gate/reason": f"win_rate/vs_previous {0.56 - 0.14 * keep:.2f} {'<' if keep else '>='} 0.5",
        }  # fmt: skip
    return metrics


def train_log(rng: random.Random, steps: int = 14) -> list[dict[str, Any]]:
    return [
        {
            "step": s, "epoch": 0, "loss": 0.69 - 0.01 * s + rng.gauss(0, 0.01), "learning_rate": 5e-5, "grad_norm": 3.0,
            "rewards/chosen": 0.02 * s, "rewards/rejected": -0.03 * s, "rewards/accuracies": min(1, 0.5 + 0.02 * s + rng.gauss(0, 0.08)),
            "rewards/margins": 0.05 * s + rng.gauss(0, 0.06), "logps/chosen": -132 + 4 * rng.gauss(0, 1), "logps/rejected": -148 - s + 4 * rng.gauss(0, 1),
            "pairs_per_second": 1.9, "tokens_per_second": 230.0,
        }
        for s in range(1, steps + 1)
    ]  # fmt: skip


def build_offline_run(root: Path) -> Path:
    run = RunDir(root)
    root.mkdir()
    data = {"path": "data/hh.jsonl.gz", "format": "hh", "heldout": 200}
    run.write_config({k: CONFIG[k] for k in ("run_dir", "seed", "model", "dpo")} | {"data": data})
    (run.round_dir(1) / "policy").mkdir(parents=True)
    write_jsonl(run.round_dir(1) / "policy" / "train_log.jsonl", train_log(random.Random(1), steps=200))
    metrics = {
        "round": 1, "pairs/kept": 1600, "rewards/accuracies": 0.66, "rewards/margins": 0.31, "loss": 0.62, "eval_loss": 0.65,
        "eval_rewards/accuracies": 0.63, "eval_rewards/margins": 0.2, "time/pair_s": 31.0, "time/train_s": 820.0, "time/round_s": 871.0,
        "gate/decision": "promote", "gate/reason": "the only round",
    }  # fmt: skip
    run.write_record(RoundRecord(1, "promote", "the only round", "round-001/policy", 1, "0" * 16, {}, metrics))
    return root


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(build_run(tmp_path_factory.mktemp("online") / "films"))


class Opened:
    """A page opened offline, with what it complained of and what it asked for."""

    def __init__(self, browser: Any, path: Path, width: int, **context: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **context)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = path.absolute().as_uri()
        self.page.goto(self.url)

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_draws_every_plot_fits_the_window_and_runs_nothing(browser: Any, online: Path, width: int) -> None:
    with Opened(browser, online, width) as opened:
        page = opened.page
        assert opened.complaints == []
        assert [u for u in opened.requests if not u.startswith("data:")] == [opened.url]
        assert page.evaluate("window.pwned") is None
        assert page.locator("script, img").count() == 0

        plots = page.evaluate(
            """colors => Object.fromEntries([...document.querySelectorAll("figure")].map(f => {
                 const svg = f.querySelector("svg"), box = svg.getBoundingClientRect();
                 const drawn = [...svg.querySelectorAll("path")].filter(p => colors.some(c => (p.getAttribute("style") || "").includes(c)));
                 const sizes = drawn.map(p => p.getBoundingClientRect()).map(b => Math.max(b.width, b.height));
                 return [f.id, {width: box.width, height: box.height, largest: Math.max(...sizes)}]; }))""",
            [BLUE, ORANGE, GREEN, PURPLE, SKY],
        )
        assert set(plots) == {f"plot-{name}" for name in ONLINE_PLOTS}
        assert all(p["width"] > 250 and p["height"] > 150 and p["largest"] > 40 for p in plots.values()), plots

        assert page.locator("#verdict").is_visible()
        assert page.locator("#verdict").inner_text().startswith("Four rounds, three of them promoted, moved")
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width


def test_hostile_text_is_shown_with_its_hidden_marks(browser: Any, online: Path) -> None:
    with Opened(browser, online, 1280) as opened:
        shown = "\n".join(opened.page.locator("#examples .text").all_text_contents())
    assert HOSTILE[0] in shown
    assert HOSTILE[1] in shown
    assert "مرحبا بالعالم ‹U+202E›evil‹U+202C› שלום" in shown
    assert HOSTILE[4] in shown
    assert "nul ␀ bell ␇ escape ␛[31m c1 \ufffd end" in shown
    assert "(1,000 more characters)" in shown  # 5,000 are clipped to 4,000
    reasons = online.read_text().partition("Why the training judge abstained")[2].partition("</ul>")[0]
    assert "48 × timed out after 30 s &lt;script&gt;" in reasons  # 3 prompts of 24 with 4 completions, in 4 rounds


def test_no_two_elements_share_an_id(browser: Any, online: Path) -> None:
    with Opened(browser, online, 1280) as opened:
        ids = opened.page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


def test_an_offline_run_has_a_page_of_its_own(browser: Any, tmp_path: Path) -> None:
    path = write_report(build_offline_run(tmp_path / "hh"))
    with Opened(browser, path, 360) as opened:
        assert {f.get_attribute("id") for f in opened.page.locator("figure").all()} == {
            "plot-rewards",
            "plot-logps",
            "plot-time",
        }
        assert "1,600 pairs" in opened.page.locator("#verdict").inner_text()
        assert opened.page.evaluate("document.scrollingElement.scrollWidth") <= 360
        assert opened.complaints == []


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_run_that_is_not_finished_has_a_page(browser: Any, tmp_path: Path, rounds: int) -> None:
    path = write_report(build_run(tmp_path / "films", rounds=rounds))
    with Opened(browser, path, 360) as opened:
        assert "done" in opened.page.locator("#verdict").inner_text()
        assert opened.page.locator("figure").count() >= 3
        assert opened.complaints == []


def test_a_run_that_failed_before_anything_was_measured_has_a_page(tmp_path: Path) -> None:
    RunDir(tmp_path).write_config(CONFIG)
    assert "There are no measurements yet" in write_report(tmp_path).read_text()


def test_every_plot_fits_a_prefect_artifact_as_a_data_uri(online: Path) -> None:
    pngs = {name: as_png(figure) for name, figure in figures(read_run(online.parent)).items()}
    assert set(pngs) == ONLINE_PLOTS
    assert all(png.startswith(b"\x89PNG") and len(png) * 4 / 3 < 200_000 for png in pngs.values())


def test_many_steps_make_no_larger_a_plot(tmp_path: Path) -> None:
    root = build_offline_run(tmp_path / "hh")
    write_jsonl(root / "round-001" / "policy" / "train_log.jsonl", train_log(random.Random(1), steps=20_000))
    assert write_report(root).stat().st_size < 300_000
