"""The evaluator reads whole snapshots, one at a time, and answers with means over the whole set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from simulate import config

from distgd import events as ev
from distgd.evaluator import Evaluator, EvaluatorSpec, Scored
from distgd.plan import Plan
from distgd.prepare import prepare

SHARDS, ME = (1, 2), 5


@pytest.fixture(scope="module")
def plan() -> Plan:
    digits = {"name": "digits", "args": {"hidden": 16, "batchnorm": True}}
    return prepare(config(builtin=digits, batch={"size": 32, "slots": 4}, cluster={"servers": 2}))


@pytest.fixture
def evaluator(plan: Plan) -> Evaluator:
    spec = plan.specs(plan.cast())[ME]
    assert isinstance(spec, EvaluatorSpec)
    return spec.build(lambda: 0.0)


def snapshot(plan: Plan, number: int, shard: int, version: int = 3, scale: float = 1.0) -> ev.SnapshotSent:
    part = plan.layout.slices(2)[shard]
    weights = plan.replica.flat[part.start : part.stop].numpy() * np.float32(scale)
    buffers = plan.replica.buffers if shard == 0 else None
    return ev.SnapshotSent(1, number, shard, version, weights, buffers)


def give(evaluator: Evaluator, *events: Any) -> list[Any]:
    return [e for event in events for e in evaluator.handle(1, event)]


def test_it_pulls_every_shards_part_and_waits_for_all(plan: Plan, evaluator: Evaluator) -> None:
    pulls = give(evaluator, ev.Evaluate(1, 7))
    assert [(e.to, e.message.number) for e in pulls] == [(1, 7), (2, 7)]
    assert give(evaluator, snapshot(plan, 7, 1)) == []
    assert give(evaluator, snapshot(plan, 7, 1)) == [], "a part that came twice is one part"
    (compute,) = give(evaluator, snapshot(plan, 7, 0))
    assert isinstance(compute, ev.Compute)


def test_parts_of_another_snapshot_or_timeline_are_ignored(plan: Plan, evaluator: Evaluator) -> None:
    give(evaluator, ev.Evaluate(1, 7), snapshot(plan, 7, 0), ev.Evaluate(1, 8))
    assert give(evaluator, snapshot(plan, 7, 0), snapshot(plan, 7, 1)) == []
    assert give(evaluator, ev.Evaluate(2, 9)) == []
    assert give(evaluator, snapshot(plan, 8, 0)) == []
    assert len(give(evaluator, snapshot(plan, 8, 1))) == 1


def test_the_metrics_are_those_of_the_snapshots_weights(plan: Plan, evaluator: Evaluator) -> None:
    """In bounded and async mode shards may be at different versions; the highest is named."""
    give(evaluator, ev.Evaluate(1, 7))
    (compute,) = give(evaluator, snapshot(plan, 7, 0, version=3), snapshot(plan, 7, 1, version=5))
    scored = evaluator.perform(compute.work, list)
    (sent,) = give(evaluator, scored)
    assert sent.to == ev.DRIVER
    assert (sent.message.number, sent.message.version) == (7, 5)
    x, y = plan.replica.task.eval_data()  # type: ignore[attr-defined]
    model = plan.replica.model.eval()
    plan.replica.buffer_layout.unpack(plan.replica.buffers, model)
    with torch.no_grad():
        logits = model(x)
    assert sent.message.metrics["accuracy"] == pytest.approx(float((logits.argmax(1) == y).float().mean()))
    assert sent.message.metrics["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, y)), rel=1e-5)


def test_other_weights_give_another_loss(plan: Plan, evaluator: Evaluator) -> None:
    losses = []
    for number, scale in ((1, 1.0), (2, 3.0), (3, 1.0)):
        give(evaluator, ev.Evaluate(1, number))
        (compute,) = give(evaluator, *(snapshot(plan, number, shard, scale=scale) for shard in (0, 1)))
        scored = evaluator.perform(compute.work, list)
        assert isinstance(scored, Scored)
        losses.append(scored.metrics["loss"])
    assert losses[0] == losses[2] != losses[1]


def test_it_ends_when_told(evaluator: Evaluator) -> None:
    assert isinstance(give(evaluator, ev.Stop(1))[0], ev.End)
    assert isinstance(give(evaluator, ev.Fenced(1))[0], ev.End)
    assert give(evaluator, ev.Stop(2)) == []


def test_it_says_what_it_does(evaluator: Evaluator) -> None:
    give(evaluator, ev.Evaluate(1, 7))
    (answer,) = evaluator.handle(ev.DRIVER, ev.StatusRequested(1))
    assert answer == ev.Send(ev.DRIVER, ev.StatusSent(1, "evaluates snapshot 7"))
