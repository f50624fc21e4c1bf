"""The audit finds whatever was counted twice or not at all, and nothing else."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgd.audit import Audit, Count, audit, read
from distgd.errors import BadInput
from distgd.sources import Order

ORDER = Order(samples=10, batch=4, slots=2, seed=0)  # three steps an epoch, the last of two samples
Line = dict[str, Any]


def begin(order: Order = ORDER, mode: str = "sync") -> Line:
    return {"state": "begin", "samples": order.samples, "batch": order.batch, "slots": order.slots, "mode": mode}


def slot(step: int, number: int, state: str = "applied", order: Order = ORDER) -> Line:
    first, stop = order.places(step, number)
    return {
        "state": state,
        "epoch": order.epoch_of(step),
        "step": step,
        "slot": number,
        "first": first,
        "last": stop - 1,
    }


def steps(first: int, stop: int, order: Order = ORDER) -> list[Line]:
    return [slot(step, k, order=order) for step in range(first, stop) for k in range(order.filled(step))]


def rollback(step: int) -> Line:
    return {"state": "rollback", "step": step}


def end(step: int) -> Line:
    return {"state": "end", "step": step}


def test_a_clean_run_counts_every_sample_of_every_epoch_once() -> None:
    found = audit([begin(), *steps(0, 6), end(6)])
    assert found == Audit((Count(0, 10, 10, 0, 0, 0), Count(1, 10, 10, 0, 0, 0)), 6, finished=True, rollbacks=0)
    assert found.clean


def test_a_run_that_ends_within_an_epoch_has_lost_nothing() -> None:
    found = audit([begin(), *steps(0, 4), end(4)])
    assert [count.granted for count in found.epochs] == [10, 4]
    assert found.clean


def test_what_came_twice_or_not_at_all_is_counted_in_samples() -> None:
    lines = [line for line in steps(0, 3) if (line["step"], line["slot"]) != (1, 0)]
    found = audit([begin(), *lines, slot(2, 1), end(3)])
    assert found.epochs == (Count(0, 10, 8, 1, 2, 0),)
    assert not found.clean
    assert found.as_dict()["status"] == "failed"


def test_a_step_that_left_no_line_is_lost() -> None:
    found = audit([begin(), *steps(0, 2), *steps(3, 4), end(5)])
    assert [count.lost for count in found.epochs] == [2, 4]


def test_dropped_samples_are_neither_applied_nor_lost() -> None:
    found = audit([begin(), slot(0, 0), slot(0, 1, "dropped"), end(1)])
    assert found.epochs == (Count(0, 4, 2, 0, 0, 2),)
    assert found.clean


def test_steps_done_again_after_a_rollback_count_once() -> None:
    found = audit([begin(), *steps(0, 5), end(5), rollback(2), *steps(2, 6), end(6)])
    assert found.clean
    assert found.rollbacks == 1
    assert sum(count.applied for count in found.epochs) == 20


def test_what_was_done_again_without_a_rollback_counts_twice_and_what_was_not_done_again_is_lost() -> None:
    assert sum(count.twice for count in audit([begin(), *steps(0, 5), *steps(2, 6), end(6)]).epochs) == 10
    assert sum(count.lost for count in audit([begin(), *steps(0, 5), rollback(2), *steps(3, 6), end(6)]).epochs) == 2


def test_what_a_rollback_leaves_done_is_told_once_more() -> None:
    lines = [begin(mode="async"), *steps(0, 3), rollback(1), slot(2, 0), *steps(1, 2), slot(2, 1), end(3)]
    assert audit(lines).clean
    assert not audit([*lines[:-1], slot(2, 0), end(3)]).clean


def mark(step: int) -> Line:
    return {"state": "bits", "bits": "not promised", "step": step, "why": "another machine"}


def test_what_is_promised_of_the_bits_and_what_broke_it() -> None:
    promised = {**begin(), "bits": "promised"}
    last = {**end(6), "bits": "promised"}
    for lines, bits, why in [
        ([begin(), end(6)], None, None),
        ([promised, last], "promised", None),
        ([promised, mark(2), {**last, "bits": "not promised"}], "not promised", "another machine"),
        ([promised, mark(2), rollback(3)], "not promised", "another machine"),
        ([promised, mark(2), rollback(2)], "promised", None),
        ([promised, mark(2), rollback(2), mark(2)], "not promised", "another machine"),
        ([promised, {**last, "bits": "not promised"}], "not promised", None),
        ([promised, {**last, "bits": "not promised"}, rollback(4)], "promised", None),
    ]:
        found = audit(lines)
        assert (found.bits, found.why) == (bits, why), lines


def test_slots_under_way_in_an_unfinished_run_are_not_lost() -> None:
    found = audit([begin(mode="bounded"), *steps(0, 2), slot(3, 1)])
    assert (found.steps, found.finished, found.clean) == (2, False, True)
    assert [(c.granted, c.applied) for c in found.epochs] == [(8, 8), (0, 2)]
    assert not audit([begin(mode="bounded"), *steps(0, 2), slot(3, 1), end(4)]).clean


@given(
    st.builds(Order, samples=st.integers(1, 40), batch=st.integers(1, 9), slots=st.integers(1, 5), seed=st.just(0)),
    st.integers(1, 12),
    st.data(),
)
def test_the_counts_are_those_of_counting_one_sample_after_the_other(order: Order, through: int, data: Any) -> None:
    lines = [line for line in steps(0, through, order) if line["last"] >= line["first"]]
    copies = [data.draw(st.sampled_from([0, 1, 1, 1, 2])) for _ in lines]
    written = [line for line, n in zip(lines, copies, strict=True) for _ in range(n)]
    counts: dict[int, Counter[int]] = {}
    for line in written:
        counts.setdefault(line["epoch"], Counter()).update(range(line["first"], line["last"] + 1))
    for found in audit([begin(order), *written, end(through)]).epochs:
        places = counts.get(found.epoch, Counter())
        assert found.applied == len(places)
        assert found.twice == sum(places.values()) - len(places)
        assert found.lost == found.granted - len(places)


class TestRead:
    def write(self, path: Path, text: str) -> Path:
        path.write_text(text, encoding="utf-8")
        return path

    def test_a_line_that_a_kill_cut_off_is_left_out(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "ledger.jsonl", json.dumps(begin()) + "\n" + json.dumps(end(1))[:9])
        assert list(read(path)) == [begin()]

    @pytest.mark.parametrize("text", ["nonsense\n", "[]\n", '{"step": 1}\n'])
    def test_any_other_broken_line_is_named(self, tmp_path: Path, text: str) -> None:
        path = self.write(tmp_path / "ledger.jsonl", json.dumps(begin()) + "\n" + text)
        with pytest.raises(BadInput, match="line 2"):
            list(read(path))

    def test_no_ledger(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match=r"ledger\.jsonl"):
            list(read(tmp_path / "ledger.jsonl"))

    @pytest.mark.parametrize(
        "lines", [[], [slot(0, 0)], [begin(), {"state": "applied"}], [begin(), {"state": "odd"}], [{"state": "begin"}]]
    )
    def test_a_ledger_that_is_none(self, lines: list[Line]) -> None:
        with pytest.raises(BadInput, match="ledger"):
            audit(lines)
