"""A plan of faults as data: what, whom, when. How a process dies, and how time passes, is somebody else's business.

fault     one fault, and whom it is meant for
parsing   from a file to faults, with every mistake named
due       which faults are due now: by steps and time (`Coming`), by what a process sends (`Own`, `Fates`)
"""

from __future__ import annotations

from distgd.faults.due import Coming, Fates, Own
from distgd.faults.fault import MLFLOW_DOWN, Fault, FaultPlan, texts
from distgd.faults.parsing import check, parse

__all__ = ["MLFLOW_DOWN", "Coming", "Fates", "Fault", "FaultPlan", "Own", "check", "parse", "texts"]
