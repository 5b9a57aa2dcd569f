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

from iterdpo.errors import DamagedError, UserError
from iterdpo.run.artifacts import read_groups, read_judgments
from iterdpo.run.rundir import RunDir, read_json, read_jsonl, removed

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = ("prompt_id", "prompt", "k", "text", "tokens", "finish_reason")
EVALUATION_JUDGES = ("train_judge", "heldout_judge")
SCORES = (f"{name}{end}" for name in ("score", *EVALUATION_JUDGES) for end in ("", "_abstention"))
OWN = {*COLUMNS, "abstention", *SCORES}
"""Names that a column of the prompt file cannot have among ours."""
OF_THOUGHTS = ("reasoning", "reasoning_tokens")
"""Further names if the policy is a thinking model."""


def read_run(path: str | Path) -> Run:
    """The run in `path`; a UserError if no run is there."""
    return Run(path)


class Run:
    """A run, read from its directory. Only finished steps are read; nothing is written.

    A round or step that does not exist raises a UserError that lists the existing ones.
    """

    def __init__(self, path: str | Path) -> None:
        self.dir = RunDir(path)
        self.root = self.dir.root
        self.config: dict[str, Any] = self.dir.read_config()

    @property
    def versions(self) -> dict[str, str]:
        """The packages that the run started with: `{"torch": "2.13.0", …}`."""
        return dict(read_json(self.root / "run.json")["versions"])

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """A row for each finished round, indexed by round; round 0 is the initial policy. Empty before the first."""
        path = self.root / "metrics.jsonl"
        try:
            rows = read_jsonl(path) if path.exists() else []
        except DamagedError:  # the next start writes it again
            rows = [record.metrics for record in self.dir.records()]
        return pd.DataFrame(rows, columns=None if rows else ["round"]).set_index("round")

    def train_log(self, round: int | None = None) -> pd.DataFrame:
        """A row for each optimizer step of `round`, or of all trained rounds, with a `round` column."""
        name = "train_log.jsonl"
        trained = [r for r in self.dir.rounds() if (self.dir.round_dir(r) / "policy" / name).exists()]
        rounds = trained if round is None else [round]
        rows = [{"round": r, **row} for r in rounds for row in read_jsonl(self._step(r, f"policy/{name}"))]
        return pd.DataFrame(rows, columns=None if rows else ["round", "step"])

    def completions(self, round: int) -> pd.DataFrame:
        """A row for each sampled completion: prompt_id, prompt, k, text, tokens (how many), finish_reason, score, abstention,
        and the columns of the prompt file. Of a thinking model also reasoning and reasoning_tokens; text and tokens are the
        answer's.

        `score` is null if the judge abstained, for the reason in `abstention`; both are if it has not judged yet. A
        column of the prompt file that has one of these names is called `column/<name>`.
        """
        return _frame(self.completion_rows(round), ["score", "abstention"])

    def completion_rows(self, round: int) -> Iterator[dict[str, Any]]:
        """The rows of `completions`, one at a time."""
        judges = {"score": self.dir.round_dir(round) / "judgments"}
        for row in _rows(self._step(round, "completions"), judges):
            row["abstention"] = row.pop("score_abstention")
            yield row

    def evaluation(self, round: int) -> pd.DataFrame:
        """A row for each completion of a held-out prompt, by the policy that `round` trained.

        As `completions`, with the scores in `train_judge` and `heldout_judge` (null throughout without that judge)
        and the reasons in `train_judge_abstention` and `heldout_judge_abstention`.
        """
        names = [f"{judge}{end}" for judge in EVALUATION_JUDGES for end in ("", "_abstention")]
        return _frame(self.evaluation_rows(round), names)

    def evaluation_rows(self, round: int) -> Iterator[dict[str, Any]]:
        """The rows of `evaluation`, one at a time."""
        step = self._step(round, "evaluation")
        yield from _rows(step / "completions", {name: step / "judgments" / name for name in EVALUATION_JUDGES})

    def abstentions(self, round: int) -> dict[str, int]:
        """Why the training judge left completions of `round` without a score, and how often: the commonest first."""
        judgments = read_judgments(self._step(round, "judgments"))
        return dict(Counter(reason for j in judgments for reason in j.abstentions if reason is not None).most_common())

    def pairs(self, round: int) -> Dataset:
        """The preference pairs that `round` trained on."""
        import pyarrow.parquet as pq
        from datasets import Dataset

        return Dataset(pq.read_table(self._step(round, "pairs/train.parquet")))  # no copy in the user's cache

    def policy(self, round: int | None = None) -> Path:
        """The checkpoint that `round` trained; 0 is the initial policy, None that of the best promoted round.

        The initial policy may be a hub id, and is then given as it was configured.
        """
        if round is None:
            link = self.root / "policy"
            if not link.is_symlink():
                raise UserError(f"{self.root}: no policy yet, because no round is finished; {self._what_there_is()}")
            return self.root / link.readlink()
        if round == 0:
            return Path(self.config["model"]["path"])
        path = self._step(round, "policy")
        if removed(path):
            raise UserError(f"{path}: its weights were removed, as `keep` asked; {self.policy()} is there")
        return path

    def _step(self, round: int, name: str) -> Path:
        path = self.dir.round_dir(round) / name
        if not path.exists():
            raise UserError(f"{self.root}: round {round} has no {name}; {self._what_there_is()}")
        return path

    def _what_there_is(self) -> str:
        found = []
        for r in self.dir.rounds():
            steps = [p.name for p in sorted(self.dir.round_dir(r).iterdir()) if p.is_dir() and p.suffix != ".partial"]
            found.append(f"round {r} has {', '.join(steps) or 'nothing finished'}")
        return "; ".join(found) or "no round is there"


def _rows(groups: Path, judges: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """A row for each completion in `groups`, with `<judge>` and `<judge>_abstention`; a shard is in memory at a time."""
    judged = {name: read_judgments(path) for name, path in judges.items()}
    for group in read_groups(groups):
        judgments = {name: next(rows, None) for name, rows in judged.items()}
        this = (group.prompt.id, len(group.completions))
        for name, judgment in judgments.items():
            if judgment is not None and (judgment.prompt_id, len(judgment.scores)) != this:
                others = f"made for other completions than those in {groups}"
                raise UserError(f"{judges[name]}: {others}; run again with --redo")
        thinking = any(completion.reasoning is not None for completion in group.completions)
        own = {*OWN, *OF_THOUGHTS} if thinking else OWN
        columns = {f"column/{name}" if name in own else name: value for name, value in group.prompt.columns.items()}
        for k, completion in enumerate(group.completions):
            sampled = (completion.text, len(completion.answer_ids), completion.finish_reason)
            row: dict[str, Any] = dict(zip(COLUMNS, (group.prompt.id, group.prompt.text, k, *sampled), strict=True))
            if thinking:
                row |= zip(OF_THOUGHTS, (completion.reasoning, completion.reasoning_tokens), strict=True)
            for name, judgment in judgments.items():
                row[name] = None if judgment is None else judgment.scores[k]
                row[f"{name}_abstention"] = None if judgment is None else judgment.abstentions[k]
            yield row | columns


def _frame(rows: Iterator[dict[str, Any]], judged: list[str]) -> pd.DataFrame:
    found = list(rows)
    frame = pd.DataFrame(found, columns=None if found else [*COLUMNS, *judged])
    return frame.astype({name: float for name in judged if not name.endswith("abstention")})
