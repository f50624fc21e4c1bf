"""Learning-rate schedules and gradient clipping: factors, pure functions of their arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from distgd.config import sections
from distgd.errors import BadInput


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule: `factor(step)` multiplies the base learning rate at a step counted from 0.

    A warm-up of w steps rises linearly, (step + 1) / w of the value it leads to; the named schedule then runs over the
    remaining n = steps - w with k = step - w, and past the last step its last value holds:

    - `constant`: 1.
    - `step`: gamma^(k // step_size).
    - `exponential`: gamma^k.
    - `linear`: from 1 at k = 0 to `final` at k = n.
    - `cosine`: from 1 at k = 0 to `final` at k = n along half a cosine (Loshchilov & Hutter 2017, "SGDR", eq. 5,
      without restarts).
    - `inverse-sqrt`: sqrt(w) / sqrt(step + 1), w at least 1, so the warm-up ends at 1 and it falls from there (Vaswani
      et al. 2017, "Attention Is All You Need", section 5.3, scaled to a peak of 1).
    - `one-cycle`: from 1 / div_factor up to 1 at k = pct_start * n - 1, then down to `final` at k = n - 1, both along
      half a cosine (Smith & Topin 2018, "Super-Convergence"; annealed as in `torch.optim.lr_scheduler.OneCycleLR`).

    >>> [Schedule("linear", warmup=2, steps=6).factor(step) for step in range(7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    name: str
    warmup: int = 0
    steps: int = 0
    gamma: float = 1.0
    step_size: int = 1
    final: float = 0.0
    pct_start: float = 0.3
    div_factor: float = 25.0

    def factor(self, step: int) -> float:
        """The factor at `step` >= 0; it depends on nothing else."""
        shape = SHAPES[self.name]
        if step >= self.warmup:
            return shape(self, step - self.warmup)
        top = 1.0 if self.name == "inverse-sqrt" else shape(self, 0)
        return top * ((step + 1) / self.warmup)


def resolve_schedule(section: sections.Schedule, total_steps: int | None) -> Schedule:
    """Check that the config's `schedule` has what its name needs and nothing that it would ignore.

    Args:
        section: the config's `schedule`; its `steps`, where set, go before `total_steps`.
        total_steps: the length of the run in steps, None where nothing says it.

    Raises:
        BadInput: a missing or an unused key, or a warm-up that leaves no step.
    """
    used = USED_KEYS[section.name]
    for key, field in sections.Schedule.model_fields.items():
        value = getattr(section, key)
        if key not in ("name", "warmup", *used) and value != field.default:
            raise BadInput.at(f"schedule.{key}", f"no such key with schedule.name={section.name}", value, "remove it")
    chosen = {key: getattr(section, key) for key in used}
    if "steps" in used and section.steps is None:
        chosen["steps"] = total_steps
    for key, value in chosen.items():
        if value is None:
            raise BadInput.described(f"schedule.{key}", f"a value with schedule.name={section.name}", "null", "set it")
    if "steps" in used and section.warmup >= chosen["steps"]:
        do = "lower it, or set schedule.steps"
        raise BadInput.at("schedule.warmup", f"less than the schedule's {chosen['steps']} steps", section.warmup, do)
    return Schedule(section.name, section.warmup, **chosen)


def _constant(s: Schedule, k: int) -> float:
    return 1.0


def _step(s: Schedule, k: int) -> float:
    return s.gamma ** (k // s.step_size)


def _exponential(s: Schedule, k: int) -> float:
    return s.gamma**k


def _linear(s: Schedule, k: int) -> float:
    return _between(1.0, s.final, min(1.0, k / (s.steps - s.warmup)))


def _cosine(s: Schedule, k: int) -> float:
    return _between(1.0, s.final, _half_cosine(min(1.0, k / (s.steps - s.warmup))))


def _inverse_sqrt(s: Schedule, k: int) -> float:
    return math.sqrt(max(1, s.warmup) / (s.warmup + k + 1))


def _one_cycle(s: Schedule, k: int) -> float:
    last = s.steps - s.warmup - 1
    peak = max(0.0, s.pct_start * (last + 1) - 1)
    if k < peak:
        return _between(1 / s.div_factor, 1.0, _half_cosine(k / peak))
    return _between(1.0, s.final, _half_cosine((min(k, last) - peak) / ((last - peak) or 1)))


def _between(start: float, end: float, fraction: float) -> float:
    return (1 - fraction) * start + fraction * end  # exact at both ends


def _half_cosine(fraction: float) -> float:
    return (1 - math.cos(math.pi * fraction)) / 2


SHAPES: dict[str, Callable[[Schedule, int], float]] = {
    "constant": _constant,
    "step": _step,
    "exponential": _exponential,
    "linear": _linear,
    "cosine": _cosine,
    "inverse-sqrt": _inverse_sqrt,
    "one-cycle": _one_cycle,
}

USED_KEYS: dict[str, tuple[str, ...]] = {
    "constant": (),
    "step": ("gamma", "step_size"),
    "exponential": ("gamma",),
    "linear": ("steps", "final"),
    "cosine": ("steps", "final"),
    "inverse-sqrt": (),
    "one-cycle": ("steps", "final", "pct_start", "div_factor"),
}


def clip_scale(squared_norm: float, limit: float | None) -> float:
    """The factor that brings a gradient's norm down to `limit`: min(1, limit / norm), exactly 1.0 within the limit.

    `torch.nn.utils.clip_grad_norm_` divides by norm + 1e-6 against a norm of zero; that branch is not reached here, so
    a clipped gradient has the norm `limit` itself. The two differ by the factor 1 + 1e-6 / norm. A norm that is NaN
    gives NaN: whether a step is finite is decided before.

    >>> clip_scale(25.0, 1.0)
    0.2
    """
    norm = math.sqrt(squared_norm)
    return 1.0 if limit is None or norm <= limit else limit / norm
