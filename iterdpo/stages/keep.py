"""Which checkpoints a run keeps. The weights of the others are removed; their manifests, logs and figures stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from iterdpo.config import Config
from iterdpo.gate import best_record
from iterdpo.run.rundir import remove_weights
from iterdpo.stages.runs import IterativeRun
from iterdpo.types import RoundRecord


def remove_unneeded(run: IterativeRun, round: int) -> None:
    """Remove the weights of each round up to `round` that neither `keep` nor a round after it needs.

    Rounds after it may have ended before, but be repeated now (`--redo`): they do not say what is needed.
    """
    records = [record for record in run.dir.records() if record.round <= round]
    if run.config.keep == "all" or not records:
        return
    kept = needed(records, run.config, evaluates=run.evaluates)
    for record in records:
        step = run.dir.round_dir(record.round) / "policy"
        if record.round not in kept and step.is_dir():
            remove_weights(step)


def needed(records: Sequence[RoundRecord], config: Config, *, evaluates: Callable[[int], bool]) -> set[int]:
    """Rounds whose policies stay; `records` are those of all rounds so far, round 0 first.

    Always those that the next round starts from or may have as its reference, the best one, which `policy` links to, and the
    one that stood at the last evaluation, to which the gate may go back. Beside them what `config.keep` asks for.
    """
    last = records[-1].round
    kept = {records[-1].policy_round, best_record(records).policy_round}
    kept.add(next(record.policy_round for record in reversed(records) if evaluates(record.round)))
    match config.dpo.reference:
        case "periodic":
            renewed = last - last % config.dpo.reference_every  # the round before the one that renewed the reference
            kept |= {record.policy_round for record in records if record.round == renewed}
        case "ema":
            kept |= {record.policy_round for record in records[-2:]}
    if (other := config.pairing.other_side) is not None and other.round is not None:
        kept |= {record.policy_round for record in records if record.round == min(other.round, last)}
    word, _, number = config.keep.partition(" ")
    match word:
        case "all":
            kept |= {record.round for record in records}
        case "promoted":
            kept |= {record.round for record in records if record.decision == "promote"}
        case "last":
            kept |= {record.round for record in records[-int(number) :]}
    return kept
