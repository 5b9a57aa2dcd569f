"""What all judges by rule do."""

from __future__ import annotations

from typing import Any

import pytest

from iterdpo.judging.judge import checked_judgments
from iterdpo.testing import make_group
from judges.verify.match import ExactMatch, JSONSchema, NumericMatch, Regex
from tests.unit.judges.verify.harness import reason


@pytest.mark.parametrize("judge", [ExactMatch(), NumericMatch(), Regex(column="gold"), JSONSchema(column="gold")])
def test_a_missing_or_empty_column_abstains_and_is_named(judge: Any) -> None:
    assert reason(judge, "4", answer="4") == "the prompt's column 'gold' is missing"
    assert reason(judge, "4", gold=None) == "the prompt's column 'gold' is empty"
    assert reason(judge, "4", gold=[]) == "the prompt's column 'gold' is empty"


def test_groups_keep_their_order_and_columns() -> None:
    groups = [make_group("a", ["1", "2"], gold="1"), make_group("b", ["2"], gold="2"), make_group("c", ["1"])]
    judgments = checked_judgments(ExactMatch(), groups)
    assert [j.scores for j in judgments] == [[1.0, 0.0], [1.0], [None]]
    assert not ExactMatch.needs_device
