"""The card of a policy or of a round's pairs, for a model hub: what it was made from, and what was measured.

Everything in it is from the run directory. Of a local path it has the last name alone, and of a judge's arguments
nothing: both may tell of the machine or of a key.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from iterdpo.data.pairs import CARD_DATA_FILES, written_splits
from iterdpo.escape import printable
from iterdpo.report.format import Column, count, nats, number, percent
from iterdpo.report.headline import headline
from iterdpo.run.read import Run
from iterdpo.run.rundir import read_manifest

COLUMNS = (
    Column("held-out judge", "score/heldout_judge", number),
    Column("training judge", "score/train_judge", number),
    Column("wins vs initial", "win_rate/vs_initial", percent),
    Column("KL, nats", "kl/to_initial", nats),
    Column("pairs", "pairs/kept", count),
)


def policy_card(run: Run, round: int, *, adapter: bool, dtype: str) -> str:
    """The README.md of the policy that `round` trained. `adapter`: it is an adapter of the base, in PEFT's format."""
    path = str(run.config["model"]["path"])
    meta: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    if _is_hub_id(path):
        meta["base_model"] = path
    meta["tags"] = ["dpo", "iterdpo", *(["lora"] if adapter else [])]
    loss = run.config["dpo"]["loss"]
    kind = loss if isinstance(loss, str) else loss["type"]
    how = f"trained from {_base(path)} with {'an offline round' if 'data' in run.config else 'iterative DPO'}"
    lines = [
        f"The policy of round {round}, {how} (loss `{kind}`, beta {run.config['dpo']['beta']:g}; {dtype}).",
        "",
        headline(run),
        "",
        *_table(run.metrics[run.metrics.index <= round] if len(run.metrics) else run.metrics),
        *_origin(run, round, "policy"),
    ]
    return _front_matter(meta) + "\n".join(lines) + "\n"


def pairs_card(run: Run, round: int, directory: Path) -> str:
    """The README.md of the pairs of `round` in `directory`; `datasets.load_dataset` reads in it which file is which split."""
    row = run.metrics.loc[round] if round in run.metrics.index else pd.Series(dtype=float)
    kept = f"{row['pairs/kept']:,.0f} " if not pd.isna(row.get("pairs/kept")) else ""
    lines = [
        f"The {kept}preference pairs of round {round}, in TRL's format: `prompt`, `chosen`, `rejected`, or `prompt`, "
        "`completion`, `label`.",
        "",
        *_origin(run, round, "pairs"),
    ]
    files = CARD_DATA_FILES.format(data_files=written_splits(directory))
    return f"---\n{files}tags: [dpo, iterdpo, preference]\n---\n" + "\n".join(lines) + "\n"


def _table(metrics: pd.DataFrame) -> list[str]:
    shown = [c for c in COLUMNS if c.key in metrics and metrics[c.key].notna().any()]
    if not shown:
        return []
    lines = ["| round | " + " | ".join(c.heading for c in shown) + " | gate |", "| --- |" + " --- |" * (len(shown) + 1)]
    for number_, row in metrics.iterrows():
        cells = ["" if pd.isna(row[c.key]) else c.show(float(row[c.key])) for c in shown]
        gate = row.get("gate/decision") if number_ else None
        lines.append(f"| {number_} | " + " | ".join(cells) + f" | {'' if pd.isna(gate) else gate} |")
    return [*lines, ""]


def _origin(run: Run, round: int, step: str) -> list[str]:
    config = run.config
    made = {"base": _base(str(config["model"]["path"]))}
    if "data" in config:
        made["pairs from"] = _last(str(config["data"]["path"]))
    else:
        prompts = config["prompts"]
        made["prompts"] = f"{_last(str(prompts['path']))}, {prompts['per_round']:,} a round"
        made["training judge"] = _last(str(config["judge"]["use"]))
        if held := (config.get("evaluation") or {}).get("judge"):
            made["held-out judge"] = _last(str(held["use"]))
        made["gate"] = f"{config['gate']['metric']}, at least {config['gate']['minimum']:g}"
        made["seed"] = str(config["seed"])
    manifest = read_manifest(run.dir.round_dir(round) / step)
    if manifest is not None:
        made[f"digest of the {step}"] = manifest.digest
        made["versions"] = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    return ["| made from | |", "| --- | --- |", *(f"| {name} | {_cell(text)} |" for name, text in made.items())]


def _front_matter(meta: dict[str, Any]) -> str:
    return "---\n" + "".join(f"{name}: {json.dumps(value)}\n" for name, value in meta.items()) + "---\n"


def _is_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()


def _base(path: str) -> str:
    return path if _is_hub_id(path) else _last(path)


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|").replace("<", "&lt;")
