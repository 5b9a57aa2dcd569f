"""The prompts of each round of a run, and the held-out ones: those recorded on disk, else the next unused ones."""

from __future__ import annotations

import os
from pathlib import Path

from iterdpo.config import PromptsConfig
from iterdpo.data.prompts import PromptFile, next_prompts, split_prompts
from iterdpo.run.rundir import RunDir


class RoundPrompts:
    """A run's prompts, by round. Constructing it reads the prompt file, and checks that there are enough for `rounds`.

    Raises:
        DataError: see `split_prompts` and `next_prompts`.
    """

    def __init__(self, section: PromptsConfig, run_dir: RunDir, *, rounds: int, seed: int) -> None:
        self._section, self._run_dir, self._seed = section, run_dir, seed
        # A large file's prompts are kept once a run has begun, so that it is not read again at every start.
        begun = (run_dir.root / "run.json").exists() and os.access(run_dir.root, os.W_OK)
        cache = run_dir.root / "prompts.cache" if begun else None
        self._set = split_prompts(section, seed, pinned=self._pinned(0, section.heldout), cache=cache)
        self._rounds: dict[int, PromptFile] = {}
        self.heldout, self.train = self._set.heldout, self._set.train
        self.of(rounds)

    def of(self, round: int) -> PromptFile:
        """What `round` samples: what it began with, if it has begun, else the next prompts not used before."""
        section = self._section
        for t in range(len(self._rounds) + 1, round + 1):
            pinned = self._pinned(t, section.per_round)
            used = list(self._rounds.values())
            self._rounds[t] = pinned or next_prompts(
                self._set, used, round=t, per_round=section.per_round, seed=self._seed, reuse=section.reuse
            )
        return self._rounds[round]

    def pin(self, round: int) -> None:
        """Write down what the round samples (0: what is held out), so that prompts may be added to the file later."""
        path = self._file(round)
        path.parent.mkdir(parents=True, exist_ok=True)
        (self.of(round) if round else self.heldout).write(path)
        if round:
            self._rounds[round] = PromptFile.open(path)  # read in its order, which is quicker

    def summary(self) -> str:
        """`kept 80 of 105 prompts to train on (5 repeated, 20 held out)`."""
        return self._set.summary()

    def _file(self, round: int) -> Path:
        return self._run_dir.round_dir(round) / "prompts.jsonl" if round else self._run_dir.root / "heldout.jsonl"

    def _pinned(self, round: int, count: int) -> PromptFile | None:
        """What is written down, unless the configuration now asks for another number."""
        path = self._file(round)
        prompts = PromptFile.open(path) if path.exists() else None
        return prompts if prompts is not None and len(prompts) == count else None
