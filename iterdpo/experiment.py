"""What a run works with, checked before anything heavy is loaded: configuration, run directory, prompts, judges, sampler."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from iterdpo.config import Config
from iterdpo.data.prompts import PromptSet, check_lengths, next_prompts, split_prompts
from iterdpo.data.rendering import load_tokenizer, prompt_token_ids
from iterdpo.errors import ConfigError
from iterdpo.judging.judge import JudgeBase, NamedJudge
from iterdpo.judging.shards import EarlyJudge
from iterdpo.run.checkpoints import check_checkpoint, context_length, resolve_checkpoint
from iterdpo.run.devices import reserve, visible_gpus
from iterdpo.run.progress import Progress
from iterdpo.run.rundir import RunDir, directory_digest, read_jsonl, write_jsonl, write_text
from iterdpo.sampling import Sampler, VLLMSampler
from iterdpo.training.launch import check_training
from iterdpo.types import Prompt


@dataclass(frozen=True)
class Policy:
    """A checkpoint of the lineage: `Policy(path, digest="81f0…", round=2)`; round 0 is the initial policy."""

    path: Path
    digest: str
    round: int


class Pending(Exception):
    """Raised in place of work while an experiment is only looked at; names the first step that is not done."""


class Experiment:
    """A run's ingredients. Constructing one reads the prompts and checks the checkpoint; it loads no model.

    Args:
        config: the run's configuration.
        train_judge, heldout_judge: see `NamedJudge`; the second is None where the first evaluates too.
        sampler: another sampler than the vLLM engine, for tests.
        progress: where progress is shown.
        redo: do steps that were made with other settings again, rather than refuse.

    Raises:
        UserError: anything that would fail later and can be seen now.
    """

    def __init__(
        self,
        config: Config,
        *,
        train_judge: NamedJudge,
        heldout_judge: NamedJudge | None = None,
        sampler: Sampler | None = None,
        progress: Progress | None = None,
        redo: bool = False,
    ) -> None:
        self.config = config
        self.run = RunDir(config.run_dir, redo=redo)
        self.progress = progress or Progress()
        self.judges = [train_judge, *([heldout_judge] if heldout_judge else [])]
        check_training(config.dpo)
        self.model_path = resolve_checkpoint(config.model.path, revision=config.model.revision)
        self.model_config = check_checkpoint(self.model_path, trust_remote_code=config.model.trust_remote_code)
        heldout = self._pinned(self._heldout_file, config.prompts.heldout)
        self.prompts: PromptSet = split_prompts(config.prompts, config.seed, pinned=heldout)
        self._rounds: dict[int, list[Prompt]] = {}
        self.round_prompts(config.rounds)  # there are enough of them
        self._sampler = sampler
        self._judges: dict[str, JudgeBase] = {}
        self._used: dict[str, dict[str, float]] = {}
        self.early: dict[int, EarlyJudge] = {}
        """By round, who judges while it is sampled."""
        self.waiting: Callable[[str], AbstractContextManager[Callable[[], None] | None]] = self._say_waiting
        """Opened, with a message, for as long as a judge waits for a person; Prefect pauses the flow run meanwhile."""
        self.looking = False
        """While true, a step that is not done raises `Pending`."""

    @cached_property
    def initial(self) -> Policy:
        return Policy(self.model_path, self._initial_digest(), 0)

    def policy_after(self, round: int) -> Policy:
        """The policy that stood when `round` had ended: where the next round starts."""
        record = self.run.record(round)
        assert record is not None, f"round {round} has not ended"
        if record.policy_round == 0:
            return self.initial
        path = self.run.root / record.policy
        assert directory_digest(path) == record.policy_digest, f"{path} is not the policy that round {round} kept"
        return Policy(path, record.policy_digest, record.policy_round)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.model_path, trust_remote_code=self.config.model.trust_remote_code)

    @cached_property
    def max_model_len(self) -> int:
        """What the engine must hold, in tokens. Tokenizes the run's prompts.

        Raises:
            UserError: a prompt that leaves no room for `max_tokens` in the model's context.
        """
        config = self.config
        needed = [p for t in range(1, config.rounds + 1) for p in self.round_prompts(t)] + self.prompts.heldout
        lengths = [len(self.prompt_ids(p)) for p in needed]
        limit = config.sampling.engine.max_model_len
        context = context_length(self.model_config)
        if limit is not None and context is not None and limit > context:
            raise ConfigError(f"sampling.engine.max_model_len = {limit}: the model's context is {context} tokens")
        available = min(x for x in (limit, context, 1 << 30) if x is not None)
        check_lengths(needed, lengths, available - config.sampling.max_tokens)
        return limit or -(-(max(lengths) + config.sampling.max_tokens) // 64) * 64

    @cached_property
    def reserved(self) -> list[int]:
        """The GPUs that sampling and training take turns on, reserved; waits for those that another run has."""
        count = max(self.config.sampling.engine.tensor_parallel_size, self.config.dpo.processes)

        def waiting(device: str) -> None:
            self.progress.say(f"waiting for GPU {device}, which another run has")

        return reserve(visible_gpus()[:count], on_wait=waiting)

    @cached_property
    def sampler(self) -> Sampler:
        if self._sampler is not None:
            return self._sampler
        engine, adapter = self.config.sampling.engine, self.config.dpo.adapter
        return VLLMSampler(
            max_model_len=self.max_model_len,
            log=self.run.log_path("sampler"),
            trust_remote_code=self.config.model.trust_remote_code,
            adapter_rank=adapter.r if adapter is not None else None,
            reserved=self.reserved,
            say=self.progress.say,
            **engine.model_dump(exclude={"max_model_len"}),
        )

    def warm_up(self) -> None:
        """Begin what takes long to start, without waiting: the sampler's process imports vLLM meanwhile."""
        start = getattr(self.sampler, "warm_up", None)
        if start is not None:
            start()

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        return prompt_token_ids(self.tokenizer, prompt.content)

    def round_prompts(self, round: int) -> list[Prompt]:
        """What `round` samples: what it began with, where it has begun, else the next prompts not used before."""
        section = self.config.prompts
        for t in range(len(self._rounds) + 1, round + 1):
            used = Counter(p.id for prompts in self._rounds.values() for p in prompts)
            begun = self._pinned(self._prompts_file(t), section.per_round)
            self._rounds[t] = begun or next_prompts(
                self.prompts,
                used,
                round=t,
                per_round=section.per_round,
                seed=self.config.seed,
                reuse=section.reuse,
            )
        return self._rounds[round]

    def pin_prompts(self, round: int) -> None:
        """Write down what the round samples (0: what is held out), so that prompts may be added to the file later."""
        path = self._prompts_file(round) if round else self._heldout_file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, (asdict(p) for p in (self.round_prompts(round) if round else self.prompts.heldout)))

    @property
    def _heldout_file(self) -> Path:
        return self.run.root / "heldout.jsonl"

    def _prompts_file(self, round: int) -> Path:
        return self.run.round_dir(round) / "prompts.jsonl"

    @staticmethod
    def _pinned(path: Path, count: int) -> list[Prompt] | None:
        """What is written down, unless the configuration now asks for another number."""
        prompts = [Prompt(**row) for row in read_jsonl(path)] if path.exists() else []
        return prompts if len(prompts) == count else None

    def judge(self, named: NamedJudge) -> JudgeBase:
        """The judge, loaded once and attached to this run. `release_judges` calls its `close`."""
        if named.role not in self._judges:
            judge = named.load()
            judge.attach(self.run.root, self.waiting)
            self._judges[named.role] = judge
        return self._judges[named.role]

    def begin_stage(self, named: NamedJudge) -> None:
        """Tell the judge that another stage begins; what it has used so far was another's."""
        self.used(named)
        self.judge(named).begin_stage()

    def used(self, named: NamedJudge) -> dict[str, float]:
        """What the judge has used since this was last asked: `{"calls": 512, "tokens_in": 140800, …}`; often nothing."""
        totals = self.judge(named).usage()
        before = self._used.get(named.role, {})
        self._used[named.role] = totals
        return {name: total - before.get(name, 0) for name, total in totals.items()}

    @contextmanager
    def _say_waiting(self, message: str) -> Iterator[Callable[[], None] | None]:
        self.progress.say(f"  {'waiting':<9} {message}")
        yield None

    def release_judges(self) -> None:
        """Let judges that hold a device give it back; they load again when they are next asked."""
        for judge in self._judges.values():
            judge.close()

    def close(self) -> None:
        """End the sampler's process, where one was started."""
        if "sampler" in self.__dict__:
            self.sampler.close()
        for early in self.early.values():
            early.cancel()
        try:
            self.release_judges()
        finally:
            for descriptor in self.__dict__.pop("reserved", []):
                os.close(descriptor)

    def __enter__(self) -> Experiment:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _initial_digest(self) -> str:
        """Hashing the initial policy reads all of it; a note in the run directory saves that on the next start."""
        import json

        stamp = [
            [p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(self.model_path.iterdir()) if p.is_file()
        ]
        note = self.run.root / ".initial.json"
        if note.exists():
            known = json.loads(note.read_text())
            if known["path"] == str(self.model_path) and known["stamp"] == stamp:
                return known["digest"]
        value = directory_digest(self.model_path)
        if self.run.root.exists():
            write_text(note, json.dumps({"path": str(self.model_path), "stamp": stamp, "digest": value}))
        return value


def named_prompts(prompts: Sequence[Prompt]) -> list[list[Any]]:
    """What identifies prompts for a step's key: ids and contents, in order; and the columns, which judges read."""
    return [[p.id, p.content, p.columns] for p in prompts]
