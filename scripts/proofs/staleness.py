"""One run of bounded staleness in virtual time, and the worst that it did."""

from __future__ import annotations

from dataclasses import dataclass

from simulate import simulate

from distgd.inprocess import SLOT_SECONDS


@dataclass(frozen=True)
class Setting:
    """A bounded run in virtual time: `counting` over 48 updates, with a worker that is slow or lost on the way."""

    workers: int
    staleness: int
    servers: int

    def worst(self, seed: int, trouble: str) -> int:
        """The largest staleness; raises where the run got stuck or a sample was not applied exactly once."""
        victim = self.servers + 1
        done = simulate(
            builtin={"name": "counting", "args": {"samples": 64}},
            seed=seed,
            pace=lambda who: SLOT_SECONDS * (100 if who == victim and trouble == "slow" else 1),
            lose={victim: SLOT_SECONDS * (1 + seed / 10)} if trouble == "lost" else None,
            batch={"size": 16, "slots": 4},
            stop={"epochs": 3},
            optimizer={"name": "sgd", "lr": 4},
            consistency={"mode": "bounded", "staleness": self.staleness},
            cluster={"workers": self.workers, "servers": self.servers},
        )
        if done.error is not None or bool((done.state["w"] != 3).any()):
            raise RuntimeError(f"{self}, seed {seed}, {trouble}: {done.error or done.state['w'].tolist()}")
        faults = sum(event["event"] == "fault" for event in done.events)
        if faults != (trouble == "lost"):
            raise RuntimeError(f"{self}, seed {seed}: expected the worker to be {trouble}, found {faults} lost")
        return max(done.driver.tally.staleness)
