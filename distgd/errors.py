"""The error tree. A message says what was expected, what was found, and what to do.

DistgdError                 exit 1
├── BadInput                exit 2    a config, a file or a task that cannot be used; no step was computed
├── RunFailed               exit 1    the run began and could not go on
│   ├── DeadlineExceeded    exit 1    a wait ended: who was waited for, in which phase, since when
│   └── ProcessLost         exit 1    a process that the run cannot do without is gone
├── Diverged                exit 3    a loss or a gradient stopped being finite
└── Interrupted             exit 130  Ctrl-C
    └── Preempted           exit 75   SIGTERM
"""

from __future__ import annotations

import importlib
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OURS = {Path(__file__).parent, Path(importlib.__file__).parent}
INSTALLED = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}


class DistgdError(Exception):
    """The root of the tree.

    `exit_code` is what the command line ends with. `result` is the run's `Result` where one exists, else None.
    """

    exit_code = 1
    status = "failed"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.result: Any = None


class BadInput(DistgdError):
    """Something that the user gave cannot be used. No step was computed, and no run folder is left."""

    exit_code = 2
    status = "bad_input"

    @classmethod
    def at(cls, key: str, expected: str, found: object, do: str = "") -> BadInput:
        """The one form of a message about a config key.

        >>> str(BadInput.at("batch.size", "a number >= 1", 0, "set batch.size=64"))
        'batch.size: expected a number >= 1, found 0; set batch.size=64'
        """
        return cls.described(key, expected, repr(found), do)

    @classmethod
    def described(cls, key: str, expected: str, found: str, do: str = "") -> BadInput:
        """The same where what was found is told in words.

        >>> str(BadInput.described("task.loss", "a scalar tensor", "a tensor of shape (4, 1)", "return its mean"))
        'task.loss: expected a scalar tensor, found a tensor of shape (4, 1); return its mean'
        """
        return cls(f"{key}: expected {expected}, found {found}" + (f"; {do}" if do else ""))


class RunFailed(DistgdError):
    """The run began and could not go on. What was committed before stays in the run folder."""


class DeadlineExceeded(RunFailed):
    """A wait ended before what it waited for came."""

    @classmethod
    def waiting(cls, who: str, phase: str, seconds: float, do: str = "") -> DeadlineExceeded:
        """Name who was waited for, in which phase, and for how long."""
        return cls(f"{phase}: waited {seconds:.0f} s for {who}" + (f"; {do}" if do else ""))


class ProcessLost(RunFailed):
    """A process that the run cannot do without is gone."""


class Diverged(DistgdError):
    """A loss or a gradient stopped being finite; the step and the slot are in the message."""

    exit_code = 3
    status = "diverged"


class Interrupted(DistgdError):
    """Ctrl-C: everything was stopped and the processes are gone."""

    exit_code = 130
    status = "interrupted"


class Preempted(Interrupted):
    """SIGTERM, as from a cluster that takes the machine away: the same, and whoever started the run may go on."""

    exit_code = 75
    status = "preempted"


def users_error(error: BaseException) -> str:
    """An error in the user's own code: what it says, then the frames of that code alone.

    Where there is none of it, the frames of installed packages stand in.
    """
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_below(f.filename, OURS)]
    frames = [frame for frame in frames if not frame.filename.startswith("<frozen importlib")]
    own = [frame for frame in frames if not _is_below(frame.filename, INSTALLED)]
    said = traceback.format_exception_only(error)
    return "".join([*said, *traceback.format_list(own or frames)]).rstrip()


def _is_below(file: str, folders: set[Path]) -> bool:
    return any(Path(file).is_relative_to(folder) for folder in folders)


@contextmanager
def blaming(key: str, expected: str, do: str = "") -> Iterator[None]:
    """Turn an error in the user's own code, or its call of `sys.exit`, into a `BadInput` about `key` with its frames.

    >>> with blaming("task.path", "a module that imports"):
    ...     raise ValueError("no such width")
    Traceback (most recent call last):
    distgd.errors.BadInput: task.path: expected a module that imports, found an error in it
    ValueError: no such width
    """
    try:
        yield
    except DistgdError:
        raise
    except (Exception, SystemExit) as error:
        raise BadInput(f"{BadInput.described(key, expected, 'an error in it', do)}\n{users_error(error)}") from error
