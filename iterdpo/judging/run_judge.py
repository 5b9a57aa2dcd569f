"""A judge within a run: loaded when it is first needed, notified when a stage begins, released between stages."""

from __future__ import annotations

from pathlib import Path

from iterdpo.judging.judge import JudgeBase, NamedJudge, Waiting


class RunJudge:
    """One of a run's judges. Constructing one loads nothing.

    Args:
        named: which judge, with its limits.
        run_dir: the run's directory, passed on to the judge.
        waiting: the context that the judge enters while it waits for a person.
    """

    def __init__(self, named: NamedJudge, run_dir: Path, waiting: Waiting) -> None:
        self.named = named
        self._run_dir, self._waiting = run_dir, waiting
        self._judge: JudgeBase | None = None
        self._used: dict[str, float] = {}

    @property
    def role(self) -> str:
        return self.named.role

    @property
    def key(self) -> dict[str, str]:
        """What identifies the judge in the key of its results."""
        return {"use": self.named.use.rpartition("/")[2], "version": self.named.version}

    def load(self) -> JudgeBase:
        """The judge itself, loaded once."""
        if self._judge is None:
            self._judge = self.named.load()
            self._judge.attach(self._run_dir, self._waiting)
        return self._judge

    def begin_stage(self) -> None:
        """Budgets and deadlines of the judge begin anew; what it has used so far belongs to another stage."""
        self.used()
        self.load().begin_stage()

    def used(self) -> dict[str, float]:
        """What the judge has used since the last call: `{"calls": 512, "tokens_in": 140800, …}`; often nothing."""
        before, self._used = self._used, self.load().usage()
        return {name: total - before.get(name, 0) for name, total in self._used.items()}

    def release(self) -> None:
        """Give a device back that the judge holds. It loads again when it is next asked."""
        if self._judge is not None:
            self._judge.close()
