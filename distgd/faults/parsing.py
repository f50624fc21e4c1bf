"""From a file to faults. Every mistake is one `BadInput`: the line, the key, what is expected, what was found."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from distgd import events as ev
from distgd.config.text import parse_list
from distgd.errors import BadInput
from distgd.faults.fault import ALONE, KINDS, MESSAGES, MLFLOW_DOWN, ROLES, Fault

KEYS = ("what", "whom", "when", "seconds", "times")
WHEN = ("step", "message", "number", "sent", "rate", "seed")
LASTS = {"stop": "optional", "delay": "needed", "reorder": "optional", MLFLOW_DOWN: "optional"}
"""Kinds of faults that have `seconds`."""
LATE = 0.005  # seconds that a message is late by which others overtake, where nothing is said
EXAMPLE = "- {what: kill, whom: worker 1, when: {step: 20}}"
KNOWN = tuple(sorted(kind.__name__ for kind in ev.MESSAGES if kind is not ev.SlotStats))


def parse(text: str, where: str) -> tuple[Fault, ...]:
    """The faults that a YAML document lists.

    Args:
        where: what the document is called in messages.

    Raises:
        BadInput: about the first mistake; it names the line.

    >>> [str(fault) for fault in parse("- {what: stop, whom: server 0, when: {step: 9}, seconds: 8}", "plan.yaml")]
    ['stop server 0 for 8 s at step 9']
    """
    items = parse_list(text, where)
    if not items:
        found = "an empty list" if items is not None else "something else"
        raise BadInput.described(where, "a list of faults", found, f"write lines such as {EXAMPLE}")
    return tuple(_Item(where, value, lines).fault() for value, lines in items)


def check(faults: Sequence[Fault], counts: Mapping[str, int], where: str) -> None:
    """Refuse faults of processes that a run with so many of each role does not have.

    Raises:
        BadInput: there is no such process.
    """
    for fault in faults:
        there = counts[fault.role] if fault.role is not None else 1
        if fault.what != MLFLOW_DOWN and (fault.index or 0) >= there:
            known = [role if role in ALONE else f"{role} 0 to {count - 1}" for role, count in counts.items() if count]
            named = fault.role if fault.role in ALONE else f"{fault.role} {fault.index}"
            expected = f"a process of this run ({', '.join(known)})"
            raise BadInput.described(f"{where}, line {fault.line}: whom", expected, str(named), "choose one of these")


class _Item:
    """One item of the list."""

    def __init__(self, where: str, value: Any, lines: Mapping[str, int]) -> None:
        self._where, self._lines = where, lines
        if not isinstance(value, dict):
            self._refuse("", f"a fault, such as {EXAMPLE}", repr(value), "write it so")
        self._given: dict[str, Any] = value
        self._only(value, KEYS, "")

    def fault(self) -> Fault:
        """What it says."""
        what = self._one_of("what", KINDS)
        role, index = self._whom(what)
        when = self._when(what)
        seconds = self._seconds(what)
        times = self._times(what, when)
        return Fault(what, role, index, **when, seconds=seconds, times=times, line=self._lines[""])

    # One key after the other.

    def _whom(self, what: str) -> tuple[str | None, int | None]:
        if what == MLFLOW_DOWN:
            self._none("whom", f"no whom with what: {what}")
            return None, None
        expected = "worker N, server N, evaluator, driver, any worker, any server or any"
        said = self._needed("whom", expected)
        words = said.split() if isinstance(said, str) else []
        role, index = self._named(words)
        if role is None and words != ["any"]:
            close = difflib.get_close_matches(words[0] if words else "", ROLES, n=1)
            number = next((word for word in words if word.isdigit()), "0")
            do = f"did you mean {close[0]}{f' {number}' if close[0] not in ALONE else ''}?" if close else "choose one"
            self._refuse("whom", expected, repr(said), do)
        if what == "disk full" and (words == ["any"] or role != "server"):
            do = "write server N or any server"
            self._refuse("whom", f"a server with what: {what}, as these write the checkpoints", repr(said), do)
        return role, index

    def _named(self, words: Sequence[str]) -> tuple[str | None, int | None]:
        """Role and index that words mean; no role where they mean none."""
        match words:
            case [role] if role in ALONE:
                return role, 0
            case ["any", ("worker" | "server") as role]:
                return role, None
            case [("worker" | "server") as role, index] if index.isdecimal() and index.isascii():
                return role, int(index)
        return None, None

    def _when(self, what: str) -> dict[str, Any]:
        expected = "{step: N}, {message: KIND, number: N}, {rate: R}, or step together with one of these"
        when = self._needed("when", expected)
        if not isinstance(when, dict) or not when:
            self._refuse("when", expected, repr(when), "write when: {step: 20}")
        self._only(when, WHEN, "when.")
        self._fits(what, when)
        found: dict[str, Any] = {}
        for name, kind, least in (("step", int, 0), ("number", int, 1), ("seed", int, 0), ("rate", float, None)):
            if name in when:
                found[name] = self._number(f"when.{name}", when[name], kind, least)
        if "rate" in when and what in MESSAGES and found["rate"] >= (1.0 if what == "drop" else math.nextafter(1, 2)):
            expected = "a chance below 1 of each message" if what == "drop" else "a chance of at most 1 of each message"
            self._refuse("when.rate", expected, repr(when["rate"]), "lower it")
        if "message" in when:
            found["message"] = self._one_of("when.message", KNOWN, when["message"])
        if "sent" in when:
            if not isinstance(when["sent"], bool):
                self._refuse("when.sent", "true or false", repr(when["sent"]), "true is after it has left")
            found["sent"] = when["sent"]
        return found

    def _fits(self, what: str, when: Mapping[str, Any]) -> None:
        """Keys that have a meaning beside others alone."""
        strikes = what in ("kill", "stop")
        if "message" in when and not (strikes or what in MESSAGES):
            self._none("when.message", f"no message with what: {what}")
        if what in MESSAGES and what != "delay" and not when.keys() & {"rate", "message"}:
            do = "add rate: 0.1 for each message's chance, or message: KIND for one message"
            self._refuse("when", f"a rate or a message with what: {what}", repr(dict(when)), do)
        if "number" in when and ("message" not in when or "rate" in when):
            self._none("when.number", "number only beside message, and without rate")
        if "sent" in when and not ("message" in when and strikes):
            self._none("when.sent", "sent only beside message, with what: kill or stop")
        if "message" in when and "rate" in when and strikes:
            self._none("when.rate", f"either message or rate with what: {what}")
        if "message" in when and strikes and "any" in str(self._given["whom"]):
            do = "name one, such as worker 0"
            self._refuse("whom", "one process beside message, as each counts its own", repr(self._given["whom"]), do)
        if "seed" in when and "rate" not in when and "any" not in str(self._given.get("whom")):
            self._none("when.seed", "seed only where something is left to chance: beside rate, or with any")

    def _seconds(self, what: str) -> float | None:
        if what not in LASTS:
            self._none("seconds", f"no seconds with what: {what}")
            return None
        if "seconds" not in self._given:
            if LASTS[what] == "needed" or (what == "stop" and self._given["whom"] == "driver"):
                self._refuse("", f"seconds with what: {what}", "nothing", "add seconds: 0.1")
            return LATE if what == "reorder" else None
        return float(self._number("seconds", self._given["seconds"], float, None))

    def _times(self, what: str, when: Mapping[str, Any]) -> int | None:
        repeats = "rate" in when or what == "disk full"
        if "times" not in self._given:
            return None if what in MESSAGES and ("rate" in when or "message" not in when) else 1
        if not repeats:
            self._none("times", "times only beside when.rate, or with what: disk full")
        return int(self._number("times", self._given["times"], int, 1))

    # Values.

    def _needed(self, key: str, expected: str) -> Any:
        if key not in self._given:
            self._refuse("", f"the key {key} ({expected})", "none", f"such as {EXAMPLE}")
        return self._given[key]

    def _one_of(self, key: str, known: Sequence[str], value: Any = None) -> str:
        said = self._needed(key, f"one of {', '.join(known)}") if value is None else value
        if said not in known:
            close = difflib.get_close_matches(str(said), known, n=1)
            do = f"did you mean {close[0]}?" if close else "choose one"
            self._refuse(key, f"one of {', '.join(known)}", repr(said), do)
        return str(said)

    def _number(self, key: str, value: Any, kind: type, least: int | None) -> Any:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if least is not None and not (whole and value >= least):
            self._refuse(key, f"an integer >= {least}", repr(value), "correct it")
        if least is None and not ((whole or isinstance(value, float)) and math.isfinite(value) and value > 0):
            self._refuse(key, "a number > 0", repr(value), "correct it")
        return kind(value)

    def _only(self, given: Mapping[str, Any], known: Sequence[str], prefix: str) -> None:
        for key in given:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                do = f"did you mean {close[0]}?" if close else "remove it"
                self._refuse(f"{prefix}{key}", f"one of the keys {', '.join(known)}", "another one", do)

    def _none(self, key: str, expected: str) -> None:
        """Refuse a key that is given and means nothing here."""
        inner: Any = self._given
        for part in key.split("."):
            inner = inner.get(part) if isinstance(inner, dict) else None
        if inner is not None:
            self._refuse(key, expected, repr(inner), "remove it")

    def _refuse(self, key: str, expected: str, found: str, do: str) -> NoReturn:
        line = self._lines.get(key, self._lines[""])
        raise BadInput.described(f"{self._where}, line {line}" + (f": {key}" if key else ""), expected, found, do)
