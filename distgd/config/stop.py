"""When a run ends, and which of its evaluations is the best: the section `stop`, and `eval.best`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from distgd.config.strict import Amount, Count, Positive, Section, Text, refuse


class Target(Section):
    """A value of an evaluation metric that is good enough."""

    metric: Text
    """A metric of the evaluations, such as eval/accuracy."""
    at_least: float | None = None
    """Reached at this value or above."""
    at_most: float | None = None
    """Reached at this value or below."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        _check_evaluated("stop.target.metric", self.metric)
        if (self.at_least is None) == (self.at_most is None):
            found = {key: value for key, value in self if value is not None}
            do = "set stop.target.at_least=0.95" if self.at_least is None else "leave one of them out"
            refuse("stop.target", "exactly one of at_least, at_most", found, do)
        return self


class Patience(Section):
    """How long a metric may go without getting better."""

    metric: Text
    """A metric of the evaluations, such as eval/loss."""
    evals: Count
    """Evaluations in a row without a new best value after which the run ends."""
    min_delta: Amount = 0.0
    """A value is better if it is better by more than this."""
    mode: Literal["min", "max"] | None = None
    """What is better; null goes by the name: min for a loss or an error, max for an accuracy, a score or an AUC."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        better("stop.patience", self.metric, self.mode)
        return self


class Best(Section):
    """The evaluation whose weights are kept in best.safetensors."""

    metric: Text
    """A metric of the evaluations, such as eval/accuracy."""
    mode: Literal["min", "max"] | None = None
    """What is better; null goes by the name, as in stop.patience."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        better("eval.best", self.metric, self.mode)
        return self


LOWER, HIGHER = (
    ("loss", "error", "mae", "mse", "rmse", "perplexity"),
    ("accuracy", "auc", "f1", "precision", "recall", "r2", "score"),
)


def better(key: str, metric: str, mode: Literal["min", "max"] | None) -> Literal["min", "max"]:
    """Which values of a metric are better: as `mode` says, else as the last word of its name does."""
    _check_evaluated(f"{key}.metric", metric)
    last = metric.replace("/", "_").replace("-", "_").rsplit("_", 1)[-1].lower()
    if mode is None and last not in (*LOWER, *HIGHER):
        known = ", ".join((*LOWER, *HIGHER))
        refuse(f"{key}.mode", f"min or max, as the name of {metric} does not end in one of {known}", None, "set it")
    return mode or ("min" if last in LOWER else "max")


def _check_evaluated(key: str, metric: str) -> None:
    if not metric.startswith("eval/") or metric == "eval/":
        refuse(key, "a metric of the evaluations, eval/NAME", metric, "such as eval/loss")


class Stop(Section):
    """When the run ends: at least one key is given, and whichever comes first counts.

    With target or patience, and evaluations by steps or epochs, training waits for each evaluation, so that the run
    ends at the same step every time.
    """

    epochs: Count | None = None
    """Passes over the training data."""
    steps: Count | None = None
    """Global batches."""
    seconds: Positive | None = None
    """The first step that is committed so many seconds after the start of training is the last."""
    target: Target | None = None
    """Ends once an evaluation reaches it."""
    patience: Patience | None = None
    """Ends once so many evaluations in a row were no better than the best before."""

    @property
    def judges(self) -> bool:
        """Whether evaluations decide when the run ends."""
        return self.target is not None or self.patience is not None

    @model_validator(mode="after")
    def _some(self) -> Self:
        if all(value is None for _, value in self):
            refuse("stop", "at least one of epochs, steps, seconds, target, patience", {}, "set stop.epochs=10")
        return self
