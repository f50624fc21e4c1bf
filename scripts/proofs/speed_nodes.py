"""The rows of `scripts/prove speed` about two nodes: network namespaces with a wire between them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from proofs import contest, nodes
from proofs.contest import BYTES, Times
from proofs.nodes import WIRE, Node
from proofs.rows import Bench, Measured, Proof

proof = Proof()

Pair = tuple[Node, Node]
EVEN = {2: "1 servers, 1 workers", 4: "1 servers, 2 workers"}
"""What each node must hold, by workers in all; another placement measures something else."""
GIGABIT = "1gbit"


def ours(pair: Pair, head: str, name: str, workers: int, steps: int, **sections: Any) -> dict[str, Any]:
    """A run over both nodes, seen from its driver on the first: `result` and `bytes_per_step`.

    Raises:
        RuntimeError: the run failed, or servers and workers were not spread evenly.
    """
    home = pair[0].folder
    sections = {"cluster": {"address": head, "servers": 2, "workers": workers}, **sections}
    contest.config(name, workers, steps, home, **sections)
    process = pair[0].start(contest.python("proofs.counted", "/tmp/run.yaml", WIRE))
    seen = set()
    while process.poll() is None:
        seen.add(nodes.roles(pair))
        time.sleep(0.5)
    printed = nodes.finished(process)
    contest.clear(home)
    if (EVEN[workers],) * 2 not in seen:
        raise RuntimeError(f"expected {EVEN[workers]} on each node, found {sorted(seen)}")
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def ddp(pair: Pair, name: str, steps: int, buckets: Sequence[float]) -> list[contest.DDPTimes]:
    """DDP with one worker on each node."""
    command = contest.python("proofs.ddp", name, 2, steps + contest.WARM, *buckets)
    where = {"MASTER_ADDR": pair[0].address, "GLOO_SOCKET_IFNAME": WIRE, "OMP_NUM_THREADS": "1"}
    ranks = [node.start(command, RANK=str(rank), **where) for rank, node in enumerate(pair)]
    printed = [nodes.finished(rank) for rank in ranks]
    return contest.read_ddp(printed[0])


def step_ms(found: dict[str, Any]) -> float:
    """The median step of a run."""
    return float(found["result"]["step_ms"]["p50"])


def against_ddp(pair: Pair, head: str, parameters: int, steps: int, bench: Bench) -> tuple[Times, Times, float]:
    """Ours and DDP in turns; DDP's best bucket size in MB."""
    name, buckets = f"synthetic:{parameters}", contest.BUCKETS[2:3] if bench.quick else contest.BUCKETS
    bucket = min(ddp(pair, name, steps, buckets), key=lambda found: found.step).bucket_mb
    runs = {
        "ours": lambda: step_ms(ours(pair, head, name, 2, steps)),
        "DDP": lambda: ddp(pair, name, steps, [bucket])[0].step,
    }
    times = contest.take_turns(runs, 1 if bench.quick else 2)
    return times["ours"], times["DDP"], bucket


@proof.row("DDP's / ours >= 1.2 for each (aim: 1.6)")
def two_nodes(bench: Bench) -> Measured:
    """Two network namespaces as nodes, no limit, a worker and a shard on each: DDP's time over ours."""
    settings = []
    with nodes.two_nodes(bench.folder) as pair, nodes.ray_on(pair, 2) as head:
        for parameters, steps in ((1_000_000, 100), *(() if bench.quick else ((10_000_000, 25),))):
            mine, theirs, bucket = against_ddp(pair, head, parameters, steps, bench)
            settings.append(_setting(parameters, mine, theirs, bucket))
    ratios = [setting["DDP / ours"] for setting in settings]
    found = ", ".join(f"P={s['P'] / 1e6:g}M {s['DDP / ours']:.2f}" for s in settings)
    return Measured(found, min(ratios) >= 1.2, "veth; a Ray node in each", settings=settings)


def _setting(parameters: int, mine: Times, theirs: Times, bucket: float) -> dict[str, Any]:
    return {
        "P": parameters,
        "ours ms": mine.median,
        "least-most": mine.spread,
        "DDP ms": theirs.median,
        "DDP least-most": theirs.spread,
        "bucket MB": bucket,
        "DDP / ours": theirs.median / mine.median,
    }


@proof.row("<= 1.25 x (4P bytes / measured TCP bandwidth) and <= 1.05 x DDP's (aim: 1.1 x; 0.6 x with bfloat16)")
def one_gigabit(bench: Bench) -> Measured:
    """The same with 1 Gbit/s both ways, 10 million parameters: the time of a step."""
    parameters, steps = (1_000_000, 20) if bench.quick else (10_000_000, 20)
    with nodes.two_nodes(bench.folder) as pair:
        nodes.limit(pair, GIGABIT)
        rate = nodes.bandwidth(pair, 50 if bench.quick else 250)
        with nodes.ray_on(pair, 2) as head:
            mine, theirs, bucket = against_ddp(pair, head, parameters, steps, bench)
            half = _half(pair, head, parameters, steps)
    limit = 1e3 * BYTES * parameters / rate
    of_limit, of_ddp = mine.median / limit, mine.median / theirs.median
    found = f"{of_limit:.2f} x the limit of {limit:.0f} ms, {of_ddp:.2f} x DDP's; bfloat16: "
    found += half if isinstance(half, str) else f"{half / limit:.2f} x the limit"
    settings = [{**_setting(parameters, mine, theirs, bucket), "limit ms": limit, "ours / limit": of_limit}]
    holds = of_limit <= 1.25 and of_ddp <= 1.05
    return Measured(found, holds, f"tc tbf; one TCP connection has {rate / 1e6:.0f} MB/s", settings=settings)


def _half(pair: Pair, head: str, parameters: int, steps: int) -> float | str:
    """Milliseconds of a step with bfloat16 between nodes, or why not."""
    try:
        return step_ms(ours(pair, head, f"synthetic:{parameters}", 2, steps, transport={"dtype": "bfloat16"}))
    except RuntimeError as error:
        contest.clear(pair[0].folder)
        if "transport" in str(error):
            return "no such key"
        raise


@proof.row("<= 2 x 4P bytes + 5 %")
def bytes_between(bench: Bench) -> Measured:
    """4 workers on two nodes: bytes that go between the nodes in a step, both ways together."""
    parameters = 100_000 if bench.quick else 1_000_000
    with nodes.two_nodes(bench.folder) as pair, nodes.ray_on(pair, 3) as head:
        found = ours(pair, head, f"synthetic:{parameters}", 4, 100)
    moved = found["bytes_per_step"] / (BYTES * parameters)
    text = f"{moved:.2f} x 4P bytes a step, {step_ms(found):.1f} ms"
    return Measured(text, moved <= 2 * 1.05, f"P={parameters / 1e6:g}M; /sys/class/net of one side, frames included")
