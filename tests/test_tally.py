"""Counts, rates and the metrics of a step; time is an argument."""

from __future__ import annotations

import pytest

from distgd.events import SlotStats
from distgd.optim import OptimizerSpec, Schedule
from distgd.tally import WINDOW, Tally


def tally(**more: object) -> Tally:
    optimizer = OptimizerSpec("SGD", {"lr": 0.5}, (("*.bias", {"lr": 2.0}),))
    return Tally(optimizer, Schedule("exponential", gamma=0.5), began=100.0, **more)  # type: ignore[arg-type]


def stats(slot: int, weight: float = 4.0, loss: float = 1.0) -> SlotStats:
    return SlotStats(slot, int(weight), weight, loss, 1.0, 0.1)


def step(one: Tally, now: float, samples: int = 8) -> dict[str, float]:
    one.samples += samples
    one.versions += 1
    metrics: dict[str, float] = one.stepped([stats(0), stats(1)], {}, {}, now)["metrics"]
    return metrics


def test_the_loss_is_the_mean_over_weights_and_empty_slots_have_none() -> None:
    event = tally().stepped([stats(0, 1.0, 5.0), stats(1, 3.0, 1.0), stats(2, 0.0, 0.0)], {}, {}, 101.0)
    assert event["metrics"]["train/loss"] == 2.0
    assert "train/loss" not in tally().stepped([stats(0, 0.0, 0.0)], {}, {}, 101.0)["metrics"]


def test_an_event_names_its_place_in_the_run() -> None:
    one = tally()
    one.versions, one.samples = 4, 32
    event = one.stepped([stats(0)], {}, {"extra": 7.0}, 103.0)
    assert (event["event"], event["step"], event["version"], event["samples"], event["seconds"]) == (
        "step",
        1,
        4,
        32,
        3,
    )
    assert event["metrics"]["extra"] == 7.0
    fault = one.event("fault", 104.0, {}, message="gone")
    assert (fault["event"], fault["step"], fault["message"], fault["metrics"]) == ("fault", 1, "gone", {})


def test_the_last_value_of_each_metric_is_kept() -> None:
    one = tally()
    one.event("eval", 101.0, {"eval/loss": 3.0, "a": 1.0})
    one.event("eval", 102.0, {"eval/loss": 2.0})
    assert one.metrics == {"eval/loss": 2.0, "a": 1.0}


def test_learning_rates_are_those_that_the_step_was_made_with() -> None:
    one = tally()
    rates = [{k: v for k, v in step(one, 101.0 + i).items() if k.startswith("lr")} for i in range(2)]
    assert rates == [{"lr": 0.5, "lr/*.bias": 2.0}, {"lr": 0.25, "lr/*.bias": 1.0}]


def test_times_are_milliseconds_by_phase_and_worker() -> None:
    metrics = tally().stepped([stats(0)], {0: {"compute": 0.1, "wait": 0.5}, 1: {"compute": 0.3}}, {}, 101.0)["metrics"]
    assert metrics["time/compute"] == pytest.approx(200.0)
    assert metrics["time/wait"] == pytest.approx(500.0)
    assert metrics["time/compute/worker_1"] == pytest.approx(300.0)


class TestRates:
    def test_steady_work_has_a_steady_rate_from_the_first_step_on(self) -> None:
        one = tally()
        rates = [step(one, 100.0 + 0.5 * (i + 1))["throughput/samples_per_s"] for i in range(3 * WINDOW)]
        assert rates == pytest.approx([16.0] * 3 * WINDOW)
        assert one.samples_per_s() == pytest.approx(16.0)

    def test_a_slow_start_is_forgotten_after_the_window(self) -> None:
        one = tally()
        rates = [step(one, 1000.0 + i)["throughput/samples_per_s"] for i in range(2 * WINDOW)]
        assert rates[0] < 0.1
        assert rates[-1] == pytest.approx(8.0)
        assert one.samples_per_s() == pytest.approx(8.0), "from the first commit on"

    def test_reports_that_come_at_once_are_no_burst_of_speed(self) -> None:
        one = tally()
        rates = [step(one, 101.0 + second)["throughput/samples_per_s"] for second in range(6) for _ in range(30)]
        assert max(rates[60:]) <= 2 * 30 * 8.0

    def test_two_commits_at_one_time_are_no_error(self) -> None:
        one = tally()
        assert "throughput/samples_per_s" not in step(one, 100.0)
        step(one, 100.0)
        assert one.samples_per_s() is None

    def test_step_times_are_between_commits(self) -> None:
        one = tally()
        for now in (110.0, 111.0, 112.0, 122.0):
            step(one, now)
        assert list(one.step_seconds) == [1.0, 1.0, 10.0]
        assert one.step_ms() == {"p50": 1000.0, "p95": 10000.0}

    def test_before_anything_happened_there_is_nothing_to_say(self) -> None:
        one = tally()
        assert one.samples_per_s() is None
        assert one.step_ms() == {"p50": None, "p95": None}
        assert one.staleness_quantiles() == {"p50": None, "p95": None, "max": None}


def test_staleness_quantiles_are_values_that_occurred() -> None:
    one = tally()
    one.staleness.extend([0] * 90 + [2] * 9 + [7])
    assert one.staleness_quantiles() == {"p50": 0.0, "p95": 2.0, "max": 7.0}
