"""Workers: they compute the gradients of slots and push them.

`actor` is the state machine as its host sees it, and what it is made of; `sync` and `leased` say whose turn it is, by a
table of slots or by leases; `work` is what is computed and what has been read.
"""

from distgd.worker.actor import TaskSource, Worker, WorkerSpec
from distgd.worker.work import Computed, SlotWork

__all__ = ["Computed", "SlotWork", "TaskSource", "Worker", "WorkerSpec"]
