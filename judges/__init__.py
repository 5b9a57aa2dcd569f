"""Judges: those that come with iterdpo, and `load_judge`, which turns what people write into one."""

from judges.load import check_judge, judge_version, load_judge

__all__ = ["check_judge", "judge_version", "load_judge"]
