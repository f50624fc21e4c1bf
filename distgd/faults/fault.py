"""One fault of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STRIKES = ("kill", "stop", "disk full")
"""What happens to a process, by name; `disk full` to the next write of a server's part of a checkpoint."""
MESSAGES = ("delay", "drop", "duplicate", "reorder")
"""What happens to messages on their way from a process. Each still arrives once and in order: sessions see to that."""
MLFLOW_DOWN = "mlflow down"
KINDS = (*STRIKES, *MESSAGES, MLFLOW_DOWN)
ROLES = ("worker", "server", "evaluator", "driver")
ALONE = ("evaluator", "driver")
"""Roles of one process."""
ANYBODY = ("worker", "server", "evaluator")
"""Whom `any` means: the driver's death ends the command, and is to be asked for by name."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to whom, and when.

    It is due once `step` steps are committed: at once; or, with `message`, at the `number`-th message of that kind that
    a process sends from then on, when it has left if `sent` and before that if not; or, with `rate`, at random.

    Args:
        what: one of `KINDS`.
        role, index: whom; without an index any of the role, without a role any of `ANYBODY`.
        rate: strikes a second on average; of messages, the chance of each.
        seed: of what is left to chance; None for the run's.
        seconds: until a stopped process goes on or MLflow is back, None for never; how late messages are.
        times: how often at most; None for no limit.
        line: of the file.
    """

    what: str
    role: str | None
    index: int | None
    step: int = 0
    message: str | None = None
    number: int = 1
    sent: bool = False
    rate: float | None = None
    seed: int | None = None
    seconds: float | None = None
    times: int | None = 1
    line: int = 0

    @property
    def of_messages(self) -> bool:
        """Whether it is one of `MESSAGES`."""
        return self.what in MESSAGES

    @property
    def coming(self) -> bool:
        """Whether steps or time bring it, and not what a process sends."""
        return not self.of_messages and self.message is None

    def meets(self, role: str, index: int) -> bool:
        """Whether it is meant for a process, or may be."""
        if self.what == MLFLOW_DOWN or (self.role is None and role not in ANYBODY):
            return False
        return self.role in (None, role) and self.index in (None, index)

    def __str__(self) -> str:
        """In words.

        >>> str(Fault("kill", "worker", 1, step=20)), str(Fault("drop", None, None, rate=0.1, times=None))
        ('kill worker 1 at step 20', 'drop messages of any process, each with a chance of 0.1')
        """
        return f"{self._act()}{self._when()}"

    def _act(self) -> str:
        whom = _name(self.role, self.index)
        lasts = f" for {self.seconds:g} s" if self.seconds is not None else ""
        if self.what == MLFLOW_DOWN:
            return f"{self.what}{lasts}"
        if not self.of_messages:
            return f"{self.what} {whom}{lasts}" if self.what != "disk full" else f"disk full at {whom}"
        which = "messages" if self.message is None else f"{self.message} {self.number}"
        which = f"every {self.message}" if self.message is not None and self.rate is not None else which
        return f"{self.what} {which} of {whom}" + (f" by {self.seconds:g} s" if self.seconds is not None else "")

    def _when(self) -> str:
        since = f" from step {self.step} on" if self.step else ""
        often = f", {self.times} times at most" if self.times not in (1, None) else ""
        if self.rate is not None and self.of_messages:
            return f", each with a chance of {self.rate:g}{since}{often}"
        if self.rate is not None:
            return f" at random, {self.rate:g} a second{since}{often or ', once'}"
        if self.message is not None and not self.of_messages:
            return f" {'after' if self.sent else 'before'} its {self.message} {self.number}{since}"
        return since if self.of_messages else f" at step {self.step}{often}"


@dataclass(frozen=True)
class FaultPlan:
    """A whole plan: its file's text and name, and the faults in it."""

    text: str
    where: str
    faults: tuple[Fault, ...]


def _name(role: str | None, index: int | None) -> str:
    if role is None:
        return "any process"
    return role if role in ALONE else f"any {role}" if index is None else f"{role} {index}"


def texts(faults: Sequence[Fault]) -> list[str]:
    """Each in words that no other one of the plan has, by which it is known again."""
    said: list[str] = []
    for fault in faults:
        text, same = str(fault), sum(str(other) == str(fault) for other in faults[: len(said)])
        said.append(f"{text} ({same + 1})" if same else text)
    return said
