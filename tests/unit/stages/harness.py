"""A real run in a directory of its own: real prompts, steps and files; a sampler without an engine; a judge of lengths.

No training process is started: `without_training` seals a checkpoint with other random weights in its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any

from flows.loop import PLAIN, run_loop, run_round
from iterdpo.config import Config
from iterdpo.judging.judge import JudgeBase, NamedJudge
from iterdpo.run.artifacts import Pairs, PolicyCheckpoint
from iterdpo.run.progress import Progress
from iterdpo.run.rundir import write_jsonl
from iterdpo.sampling import SamplingParameters
from iterdpo.stages.runs import IterativeRun
from iterdpo.stages.train import inputs as train_inputs
from iterdpo.testing import FakeSampler, build_tiny_checkpoint
from iterdpo.training.launch import TRAIN_LOG
from iterdpo.types import Completion, CompletionGroup, Judgment, RoundRecord

PER_ROUND, HELDOUT, K, SHARD_SIZE = 6, 4, 2, 4


class NotingSampler(FakeSampler):
    """Completion k is k + 1 times "ab". `asked` lists how many prompts were in each request, `seeds` all seeds."""

    def __init__(self) -> None:
        super().__init__(lambda ids, k: "ab" * (k + 1))
        self.asked: list[int] = []
        self.seeds: list[int] = []

    def sample(
        self, prompt_ids: Sequence[list[int]], seeds: Sequence[int], parameters: SamplingParameters
    ) -> list[list[Completion]]:
        self.asked.append(len(prompt_ids))
        self.seeds += seeds
        return super().sample(prompt_ids, seeds, parameters)


class Lengths(JudgeBase):
    """Scores are lengths, or the constant `score`. `asked` lists the groups that it was asked about, shard by shard."""

    name = "lengths"

    def __init__(self, *, score: float | None = None, comparative: bool = False, needs_device: bool = True) -> None:
        self.score, self.comparative, self.needs_device = score, comparative, needs_device
        self.asked: list[list[CompletionGroup]] = []

    def judge(self, groups: Sequence[CompletionGroup]) -> list[Judgment]:
        self.asked.append(list(groups))
        return [
            Judgment(
                g.prompt.id,
                [float(len(c.text)) if self.score is None else self.score for c in g.completions],
                [None] * len(g.completions),
            )
            for g in groups
        ]


class Room:
    """Where runs of one directory are opened, one after the other, as often as a test likes."""

    def __init__(self, root: Path, model: Path, stack: ExitStack) -> None:
        self.root, self._stack = root, stack
        prompts = root / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": f"Tale {i}"}) + "\n" for i in range(40)))
        self.sections: dict[str, dict[str, Any]] = {
            "model": {"path": str(model)},
            "prompts": {"path": str(prompts), "per_round": PER_ROUND, "heldout": HELDOUT},
            "sampling": {"n": K, "max_tokens": 16, "shard_size": SHARD_SIZE},
            "judge": {"use": "lengths"},
            "pairing": {},
            "dpo": {"precision": "fp32"},
            "evaluation": {"max_logp_gap": 100, "bootstrap_samples": 100},  # the sampler is no engine
            "gate": {"minimum": 0.0},
            "supervision": {},
        }
        self.sampler, self.judge = NotingSampler(), Lengths()

    def open(
        self,
        *,
        redo: bool = False,
        rounds: int = 2,
        seed: int = 0,
        version: str = "1",
        stream: bool | None = None,
        heldout_judge: JudgeBase | None = None,
        progress: Progress | None = None,
        share_gpus: bool = False,
        **sections: dict[str, Any],
    ) -> IterativeRun:
        """The run, with other values in some sections: `open(sampling={"n": 3})`."""
        changed = {name: {**section, **sections.get(name, {})} for name, section in self.sections.items()}
        own = {"run_dir": str(self.root / "run"), "rounds": rounds, "seed": seed, "share_gpus": share_gpus}
        config = Config.model_validate({**own, **changed})
        heldout = NamedJudge("heldout_judge", "other", "1", lambda: heldout_judge) if heldout_judge else None
        run = IterativeRun(
            config,
            train_judge=NamedJudge("train_judge", "lengths", version, lambda: self.judge, stream=stream),
            heldout_judge=heldout,
            sampler=self.sampler,
            progress=progress,
            redo=redo,
        )
        return self._stack.enter_context(run)


def without_training(
    run: IterativeRun, round: int, pairs: Pairs, policy: PolicyCheckpoint, reference: PolicyCheckpoint
) -> PolicyCheckpoint:
    """What the stage `train` would seal, with random weights."""
    step = run.dir.step(round, "policy", train_inputs(run, round, pairs, policy, reference))
    if (manifest := step.manifest()) is None:
        directory = build_tiny_checkpoint(step.begin(), seed=round)
        write_jsonl(directory / TRAIN_LOG, [{"step": 1, "loss": 0.5}])
        manifest = step.finish(counts={"pairs": pairs.kept}, logs=[TRAIN_LOG])
    return PolicyCheckpoint(step.path, manifest.digest, round)


STAGES = PLAIN._replace(train=without_training)


def finish(run: IterativeRun) -> list[RoundRecord]:
    """All rounds of the run, without training."""
    with run.dir.lock():
        run.dir.write_config(run.config.model_dump())
        return list(run_loop(run, lambda t: run_round(run, t, STAGES)))


def tree(directory: Path) -> Mapping[str, tuple[int, str]]:
    """Everything below `directory`: when it was changed, and its content."""
    return {
        str(path.relative_to(directory)): (
            path.lstat().st_mtime_ns,
            sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted(directory.rglob("*"))
    }
