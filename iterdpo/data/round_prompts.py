"""Which prompts each round of a run samples, and which are held out: what is written down, else what comes next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from iterdpo.config import PromptsConfig
from iterdpo.data.prompts import next_prompts, split_prompts
from iterdpo.run.rundir import RunDir, digest, read_jsonl, write_jsonl
from iterdpo.types import Prompt


class Prompts:
    def __init__(self, prompts: list[Prompt]) -> None:
        self._prompts = prompts

    def __len__(self) -> int:
        return len(self._prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self._prompts)

    def digest(self) -> str:
        return digest([[p.id, p.content, p.columns] for p in self])

    def columns(self) -> set[str]:
        return {c for p in self for c in p.columns}


class RoundPrompts:
    """A run's prompts, by round. Constructing it reads the prompt file, and checks that there are enough for `rounds`.

    Raises:
        DataError: see `split_prompts` and `next_prompts`.
    """

    def __init__(self, section: PromptsConfig, run_dir: RunDir, *, rounds: int, seed: int) -> None:
        self._section, self._run_dir, self._seed = section, run_dir, seed
        self._set = split_prompts(section, seed, pinned=self._pinned(0, section.heldout))
        self._rounds: dict[int, Prompts] = {}
        self.heldout = Prompts(self._set.heldout)
        self.train = Prompts(self._set.train)
        self.of(rounds)

    def of(self, round: int) -> Prompts:
        """What `round` samples: what it began with, if it has begun, else the next prompts not used before."""
        section = self._section
        for t in range(len(self._rounds) + 1, round + 1):
            pinned = self._pinned(t, section.per_round)
            used = Counter(p.id for prompts in self._rounds.values() for p in prompts)
            self._rounds[t] = Prompts(
                pinned
                or next_prompts(
                    self._set, used, round=t, per_round=section.per_round, seed=self._seed, reuse=section.reuse
                )
            )
        return self._rounds[round]

    def pin(self, round: int) -> None:
        """Write down what the round samples (0: what is held out), so that prompts may be added to the file later."""
        path = self._file(round)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, (asdict(p) for p in (self.of(round) if round else self.heldout)))

    def _file(self, round: int) -> Path:
        return self._run_dir.round_dir(round) / "prompts.jsonl" if round else self._run_dir.root / "heldout.jsonl"

    def _pinned(self, round: int, count: int) -> list[Prompt] | None:
        """What is written down, unless the configuration now asks for another number."""
        path = self._file(round)
        prompts = [Prompt(**row) for row in read_jsonl(path)] if path.exists() else []
        return prompts if len(prompts) == count else None
