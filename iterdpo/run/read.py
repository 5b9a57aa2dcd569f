"""A finished, running or failed run, read back from its directory alone.

run = read_run("runs/imdb")
run.metrics["win_rate/vs_initial"]      # by round; round 0 is the initial policy
run.completions(2).nlargest(5, "score")
run.pairs(2)                            # datasets.Dataset
AutoModelForCausalLM.from_pretrained(run.policy())
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from iterdpo.errors import UserError
from iterdpo.run.rundir import RunDir, read_json, read_jsonl
from iterdpo.types import CompletionGroup, Judgment

if TYPE_CHECKING:
    from datasets import Dataset


def read_run(path: str | Path) -> Run:
    """The run in `path`.

    Raises:
        UserError: no run is there.
    """
    return Run(path)


class Run:
    """What a run's directory holds. Only finished steps are read; nothing is written.

    Where a method is asked for a round or a step that is not there, it raises a UserError that names what is.
    """

    def __init__(self, path: str | Path) -> None:
        self.dir = RunDir(path)
        self.config: dict[str, Any] = self.dir.read_config()

    @property
    def root(self) -> Path:
        return self.dir.root

    @property
    def versions(self) -> dict[str, str]:
        """The packages that the run started with: `{"torch": "2.13.0", …}`."""
        return read_json(self.root / "run.json")["versions"]

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """A row for each finished round, indexed by round; round 0 is the initial policy. Empty before the first."""
        path = self.root / "metrics.jsonl"
        rows = read_jsonl(path) if path.exists() else []
        return pd.DataFrame(rows, columns=None if rows else ["round"]).set_index("round")

    def train_log(self, round: int | None = None) -> pd.DataFrame:
        """A row for each optimizer step of `round`, or of all trained rounds, with a `round` column."""
        name = "train_log.jsonl"
        rounds = [r for r in self.dir.rounds() if (self.dir.round_dir(r) / "policy" / name).exists()]
        if round is not None:
            rounds = [round]
        rows = [{"round": r, **row} for r in rounds for row in read_jsonl(self._step(r, f"policy/{name}"))]
        return pd.DataFrame(rows, columns=None if rows else ["round", "step"])

    def completions(self, round: int) -> pd.DataFrame:
        """A row for each sampled completion: prompt_id, prompt, k, text, tokens (how many), finish_reason, score, abstention.

        `score` is null where the judge abstained, for the reason in `abstention`; both are where it has not judged yet.
        """
        groups = self._step(round, "completions")
        judges = {"score": self.dir.round_dir(round) / "judgments"}
        return _table(groups, judges).rename(columns={"score_abstention": "abstention"})

    def evaluation(self, round: int) -> pd.DataFrame:
        """A row for each completion of a held-out prompt, by the policy that `round` trained.

        As `completions`, with the scores in `train_judge` and `heldout_judge` (null throughout without that judge)
        and the reasons in `train_judge_abstention` and `heldout_judge_abstention`.
        """
        step = self._step(round, "evaluation")
        judges = {name: step / "judgments" / name for name in ("train_judge", "heldout_judge")}
        return _table(step / "completions", judges)

    def abstentions(self, round: int) -> dict[str, int]:
        """Why the training judge left completions of `round` without a score, and how often: the commonest first."""
        judgments = (Judgment.from_json(row) for row in _shards(self._step(round, "judgments")))
        return dict(Counter(reason for j in judgments for reason in j.abstentions if reason is not None).most_common())

    def pairs(self, round: int) -> Dataset:
        """The preference pairs that `round` trained on."""
        import pyarrow.parquet as pq
        from datasets import Dataset

        return Dataset(pq.read_table(self._step(round, "pairs/train.parquet")))  # no copy in the user's cache

    def policy(self, round: int | None = None) -> Path:
        """The checkpoint that `round` trained; 0 is the initial policy, None the one promoted last.

        The initial policy may be a hub id, and is then given as it was configured.
        """
        if round is None:
            link = self.root / "policy"
            if not link.is_symlink():
                raise UserError(f"{self.root}: no policy yet, since no round has ended; {self._what_there_is()}")
            return self.root / link.readlink()
        if round == 0:
            return Path(self.config["model"]["path"])
        return self._step(round, "policy")

    def _step(self, round: int, name: str) -> Path:
        path = self.dir.round_dir(round) / name
        if not path.exists():
            raise UserError(f"{self.root}: round {round} has no {name}; {self._what_there_is()}")
        return path

    def _what_there_is(self) -> str:
        found = {
            r: [p.name for p in sorted(self.dir.round_dir(r).iterdir()) if p.is_dir() and p.suffix != ".partial"]
            for r in self.dir.rounds()
        }
        return (
            "; ".join(f"round {r} has {', '.join(s) or 'nothing finished'}" for r, s in found.items())
            or "no round is there"
        )


def _table(groups: Path, judges: dict[str, Path]) -> pd.DataFrame:
    """A row for each completion in `groups`, with `<judge>` and `<judge>_abstention` columns."""
    judged = {
        name: {j.prompt_id: j for j in map(Judgment.from_json, _shards(path))} if path.exists() else {}
        for name, path in judges.items()
    }
    rows = []
    for group in map(CompletionGroup.from_json, _shards(groups)):
        for k, completion in enumerate(group.completions):
            row = {
                "prompt_id": group.prompt.id,
                "prompt": group.prompt.text,
                "k": k,
                "text": completion.text,
                "tokens": len(completion.token_ids),
                "finish_reason": completion.finish_reason,
            }
            for name, by_prompt in judged.items():
                judgment = by_prompt.get(group.prompt.id)
                row[name] = None if judgment is None else judgment.scores[k]
                row[f"{name}_abstention"] = None if judgment is None else judgment.abstentions[k]
            rows.append(row)
    names = ["prompt_id", "prompt", "k", "text", "tokens", "finish_reason"]
    names += [column for name in judges for column in (name, f"{name}_abstention")]
    return pd.DataFrame(rows, columns=names).astype(dict.fromkeys(judges, float))


def _shards(step: Path) -> Iterator[dict[str, Any]]:
    for shard in sorted(step.glob("shard-*.jsonl")):
        yield from read_jsonl(shard)
