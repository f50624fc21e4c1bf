"""A run in MLflow. The only room that imports it, and only on the thread that writes: that takes seconds.

    writer    the tracker: events wait in a bounded list, one thread writes them
    store     one run in MLflow's words and limits
    export    a model that loads back in plain torch
    active    runs that contain others
    pages     MLflow's pages in the browser
    outage    a store that does not answer for a while, on purpose

MLflow can neither stall nor kill training: an unreachable store is one warning, and what could not be written is named
at the end.
"""

from __future__ import annotations

from distgd.tracking.active import ActiveRun, ParentRun, active_run, parent_run
from distgd.tracking.outage import Outage
from distgd.tracking.pages import check, page_of, ui
from distgd.tracking.store import Store, absolute
from distgd.tracking.writer import Mlflow

__all__ = [
    "ActiveRun",
    "Mlflow",
    "Outage",
    "ParentRun",
    "Store",
    "absolute",
    "active_run",
    "check",
    "page_of",
    "parent_run",
    "ui",
]
