"""Two network namespaces as two machines: a wire between them, and memory, files and a Ray node of its own for each.

Only root can make them. They are gone, with all their processes, when the `with` block ends.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from proofs import contest, outside
from proofs.rows import Skipped

TOOLS = ("ip", "tc", "unshare", "nsenter", "mount")
PORT, GATE = 6379, 7001  # of Ray's head, and of the one who measures the wire
START = 60.0  # seconds that a Ray node may take
WIRE = "wire"  # the device's name on both sides


@dataclass(frozen=True)
class Node:
    """One namespace. `folder` is its /tmp, seen from outside; `holder` the process that keeps its mounts."""

    name: str
    address: str
    folder: Path
    holder: int

    def inside(self, *command: str) -> list[str]:
        """The command line that runs a command in here, in the folder /tmp."""
        return ["nsenter", "-t", str(self.holder), "-m", "-n", "-u", "--wd=/tmp", *command]

    def check(self, *command: str) -> str:
        """Run a command in here to its end; what it printed."""
        return _check(*self.inside(*command))

    def start(self, command: Sequence[str], **more: str) -> subprocess.Popen[str]:
        """Start a command in here; its output goes to a pipe."""
        env = contest.environment(RAY_AUTH_MODE="disabled", **more)
        pipe = subprocess.PIPE
        return subprocess.Popen(self.inside(*command), env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def _check(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


def finished(process: subprocess.Popen[str]) -> str:
    """What a process printed; an error where it failed."""
    out, _ = process.communicate(timeout=300)
    if process.returncode:
        raise RuntimeError(f"ended with {process.returncode}: {out.strip()[-400:]}")
    return out


@contextmanager
def two_nodes(folder: Path) -> Iterator[tuple[Node, Node]]:
    """Two namespaces with a veth pair between them.

    Raises:
        Skipped: not root, or a tool is missing.
    """
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        raise Skipped(f"network namespaces need root and {', '.join(TOOLS)}" + (f"; no {missing}" if missing else ""))
    run, subnet = secrets.token_hex(2), secrets.randbelow(250) + 1
    names = [f"prove-{run}-{side}" for side in "ab"]
    with ExitStack() as stack:
        for name in names:
            _check("ip", "netns", "add", name)
            stack.callback(_remove, name)
        ends = [f"pv{run}{side}" for side in "ab"]
        _check("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        nodes = []
        for name, end, host in zip(names, ends, (1, 2), strict=True):
            _check("ip", "link", "set", end, "netns", name, "name", WIRE)
            address = f"10.77.{subnet}.{host}"
            _check("ip", "-n", name, "addr", "add", f"{address}/24", "dev", WIRE)
            for device in ("lo", WIRE):
                _check("ip", "-n", name, "link", "set", device, "up")
            nodes.append(_hold(name, address, folder / name[-1]))
        yield nodes[0], nodes[1]


def _hold(name: str, address: str, folder: Path) -> Node:
    """A process that keeps a /tmp, a /dev/shm and a host name of its own for all that enter."""
    folder.mkdir()
    script = f"mount --bind {folder} /tmp && mount -t tmpfs tmpfs /dev/shm && hostname {name} && echo ready && exec cat"
    command = ["ip", "netns", "exec", name, "unshare", "-m", "-u", "sh", "-c", script]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    if holder.stdout.readline() != "ready\n":
        raise Skipped(f"this system does not let {' '.join(command[:4])} mount and name")
    return Node(name, address, folder, holder.pid)


def _remove(name: str) -> None:
    """End whatever runs in a namespace, and the namespace."""
    for _ in range(50):
        alive = _check("ip", "netns", "pids", name).split()
        for pid in alive:
            with suppress(OSError):
                os.kill(int(pid), signal.SIGKILL)
        if not alive:
            break
        time.sleep(0.1)
    _check("ip", "netns", "del", name)


def limit(nodes: Sequence[Node], rate: str) -> None:
    """Let each side send at most so much, such as 1gbit."""
    for node in nodes:
        tbf = ("rate", rate, "burst", "256kb", "latency", "50ms")
        _check("tc", "-n", node.name, "qdisc", "replace", "dev", WIRE, "root", "tbf", *tbf)


@contextmanager
def ray_on(nodes: Sequence[Node], cpus: int) -> Iterator[str]:
    """A Ray node in each, spread evenly rather than packed; the cluster's address."""
    head = f"{nodes[0].address}:{PORT}"
    ray = shutil.which("ray", path=str(Path(contest.python("")[0]).parent)) or "ray"
    with ExitStack() as stack:
        for node in nodes:
            where = ["--head", f"--port={PORT}", "--include-dashboard=false"]
            where = where if node is nodes[0] else [f"--address={head}"]
            common = [f"--node-ip-address={node.address}", f"--num-cpus={cpus}", "--object-store-memory=1000000000"]
            start = [ray, "start", "--block", "--disable-usage-stats", *common, *where]
            process = node.start(start, RAY_scheduler_spread_threshold="0")
            stack.callback(process.wait)
            stack.callback(process.terminate)
            _await_node(process, head if node is nodes[0] else None, nodes[0])
        yield head


def _await_node(process: subprocess.Popen[str], head: str | None, first: Node) -> None:
    assert process.stdout is not None
    until = time.monotonic() + START
    for line in process.stdout:
        if "Ray runtime started" in line:
            return
        if time.monotonic() > until:
            break
    raise RuntimeError(f"Ray did not start at {head or first.address}")


def roles(nodes: Sequence[Node]) -> tuple[str, ...]:
    """The servers and workers of a run that are in each node now, as text such as `1 servers, 2 workers`."""
    found = []
    for node in nodes:
        pids = _check("ip", "netns", "pids", node.name).split()
        lines = [outside.content(pid, "cmdline") for pid in pids]
        count = {kind: sum(line.startswith(f"ray::{kind}".encode()) for line in lines) for kind in ("Server", "Worker")}
        found.append(f"{count['Server']} servers, {count['Worker']} workers")
    return tuple(found)


def bandwidth(nodes: Sequence[Node], megabytes: int) -> float:
    """Bytes a second that one TCP connection gets from the first to the second."""
    receive = nodes[1].start(contest.python("proofs.nodes", "receive", nodes[1].address))
    assert receive.stdout is not None
    receive.stdout.readline()
    finished(nodes[0].start(contest.python("proofs.nodes", "send", nodes[1].address, megabytes)))
    return float(finished(receive).split()[-1])


def send(address: str, megabytes: int) -> None:
    """Send so much to whoever listens at the address."""
    chunk = bytes(1 << 20)
    with socket.create_connection((address, GATE)) as connection:
        for _ in range(megabytes):
            connection.sendall(chunk)


def receive(address: str) -> None:
    """Take what one connection brings, and print bytes a second, from the first byte to the last."""
    with socket.create_server((address, GATE)) as server:
        print("listens", flush=True)
        connection, _ = server.accept()
        memory, total = bytearray(1 << 20), connection.recv_into(bytearray(1))
        began = time.perf_counter()
        while count := connection.recv_into(memory):
            total += count
        print(total / (time.perf_counter() - began))


if __name__ == "__main__":
    import sys

    if sys.argv[1] == "send":
        send(sys.argv[2], int(sys.argv[3]))
    else:
        receive(sys.argv[2])
