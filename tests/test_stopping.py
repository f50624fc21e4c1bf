"""When evaluations end a run, and which of them was the best."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgd.config import Best, Patience, Target
from distgd.errors import BadInput
from distgd.stopping import Judge, Leader

VALUES = st.lists(st.floats(-10, 10) | st.just(float("nan")), max_size=40)


@given(VALUES, st.sampled_from(["min", "max"]), st.sampled_from([0.0, 0.5]))
def test_the_leader_is_the_best_value_so_far_by_more_than_the_margin(values: Any, mode: Any, margin: float) -> None:
    leader, best, sign = Leader("m", mode, margin), None, 1 if mode == "max" else -1
    for value in values:
        beats = value == value and (best is None or sign * value > sign * best + margin)
        best = value if beats else best
        assert leader.beaten_by(value) is beats
        assert leader.value == best


@given(VALUES, st.integers(1, 5))
def test_patience_ends_after_so_many_evaluations_in_a_row_without_a_new_best(values: Any, evals: int) -> None:
    judge = Judge(patience=Patience(metric="eval/loss", evals=evals))
    best, since = float("inf"), 0
    for value in values:
        best, since = (value, 0) if value < best else (best, since + 1)
        assert (judge.evaluated({"eval/loss": value}).ends is not None) is (since >= evals)


@pytest.mark.parametrize(
    ("target", "values", "reached"),
    [
        (Target(metric="eval/accuracy", at_least=0.9), [0.1, 0.9, 0.8], [False, True, False]),
        (Target(metric="eval/loss", at_most=0.5), [1.0, float("nan"), 0.5], [False, False, True]),
    ],
)
def test_a_target_is_reached_at_the_value_itself(target: Target, values: list[float], reached: list[bool]) -> None:
    judge = Judge(target)
    assert [judge.evaluated({target.metric: value}).ends is not None for value in values] == reached


def test_the_reason_has_the_key_the_value_and_the_limit() -> None:
    ends = Judge(Target(metric="eval/accuracy", at_least=0.9)).evaluated({"eval/accuracy": 0.95}).ends
    assert ends == "stop.target: eval/accuracy 0.95 >= 0.9"


def test_the_best_evaluation_is_the_first_of_equals() -> None:
    judge = Judge(best=Best(metric="eval/accuracy"))
    assert [judge.evaluated({"eval/accuracy": value}).best for value in (0.5, 0.5, 0.6, 0.1)] == [
        True,
        False,
        True,
        False,
    ]


def test_a_metric_that_no_evaluation_has_is_told_with_those_that_are_there() -> None:
    judge = Judge(patience=Patience(metric="eval/los", evals=2, mode="min"))
    with pytest.raises(BadInput, match=r"stop\.patience\.metric: expected one of eval/accuracy, eval/loss, found"):
        judge.evaluated({"eval/loss": 1.0, "eval/accuracy": 0.5, "time/eval": 3.0})
