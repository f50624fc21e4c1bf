"""A signal ends what runs, whoever else has a hand in signals."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import pytest

from distgd.signals import Terminated, interruptible


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_both_signals_interrupt_and_the_former_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), interruptible(lambda: False):
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_handlers_of_others_are_replaced() -> None:
    with interruptible(lambda: False) as signals:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signals.listen()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_that_others_swallowed_is_not_forgotten() -> None:
    with interruptible(lambda: False) as signals:
        with suppress(KeyboardInterrupt):  # as a callback does that C code calls
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signals.listen()


def test_who_is_deaf_hears_nothing_and_nothing_is_kept() -> None:
    with interruptible(lambda: True) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        signals.listen()


def test_who_is_patient_looks_for_the_first_one_and_is_interrupted_by_the_second() -> None:
    with interruptible(lambda: False) as signals:
        signals.patient = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert isinstance(signals.heard, Terminated)
        signals.listen()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
