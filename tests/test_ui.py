"""MLflow's pages of a run as a person finds them: `distgd ui`, in a real browser without a window."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

import distgd

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore"),  # MLflow's own, on import
]

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NAME = "seen-by-a-person"
PATIENCE = 60.0


def wait_until(true: Callable[[], Any], what: Callable[[], str]) -> Any:
    """The first answer that is true; after PATIENCE seconds without one, an error that says `what`."""
    until = time.monotonic() + PATIENCE
    while not (found := true()):
        if time.monotonic() > until:
            raise AssertionError(what())
        time.sleep(0.05)
    return found


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process and of all that it started in its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Browser:
    """A browser's DevTools protocol over a pipe: no port, no client library, and a closed pipe ends the browser."""

    def __init__(self, pipe: socket.socket) -> None:
        self._pipe, self._received, self._numbers = pipe, b"", itertools.count(1)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and return its result, empty where the browser refuses it."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        self._pipe.sendall(json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != number:
            pass  # an event
        return dict(answer.get("result", {}))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            more = self._pipe.recv(1 << 16)
            assert more, "the browser has ended"
            self._received += more
        message, _, self._received = self._received.partition(b"\0")
        return dict(json.loads(message))


class Page:
    """A page in a tab of its own, so that nothing is left on it of another one."""

    def __init__(self, browser: Browser, url: str) -> None:
        self._browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        size = {"width": 1400, "height": 1400, "deviceScaleFactor": 1, "mobile": False}
        browser.call("Emulation.setDeviceMetricsOverride", self._session, **size)
        browser.call("Page.navigate", self._session, url=url)

    def now(self, expression: str) -> Any:
        """The value of a JavaScript expression; None where it has none, or fails, as while the page loads."""
        answer = self._browser.call("Runtime.evaluate", self._session, expression=expression, returnByValue=True)
        return answer.get("result", {}).get("value")

    def text(self) -> str:
        return str(self.now("document.body.innerText"))

    def find(self, expression: str) -> Any:
        """The expression's value once it is true; the error otherwise shows what a person would read."""
        return wait_until(lambda: self.now(expression), lambda: f"not found: {expression}\non the page:\n{self.text()}")

    def type_into(self, placeholder: str, text: str) -> None:
        field = f"document.querySelector('input[placeholder={json.dumps(placeholder)}]')"
        self.find(f"{field} && ({field}.focus(), document.activeElement === {field})")
        self._browser.call("Input.insertText", self._session, text=text)

    def lines(self, *expected: str) -> list[str]:
        """The text that a person reads, once it has all the expected lines."""
        self.find(f"{json.dumps(expected)}.every(line => document.body.innerText.split('\\n').includes(line))")
        return self.text().splitlines()


@pytest.fixture(scope="module")
def program() -> str:
    for found in filter(None, map(shutil.which, BROWSERS)):
        # Ubuntu has a chromium-browser that only says what to install.
        if subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0:
            return found
    pytest.skip(f"needs a browser: install one of {', '.join(BROWSERS)} (Debian: apt install chromium)")


@pytest.fixture(scope="module")
def browser(program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("browser")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command = [program, *options, "--remote-debugging-pipe", f"--user-data-dir={folder}"]
    ours, theirs = socket.socketpair()
    ours.settimeout(PATIENCE)
    with ours, (folder / "log").open("wb") as log:
        with theirs:  # the browser reads commands from 3 and answers on 4
            process = subprocess.Popen(
                ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >&2', "sh", *command],
                stdin=theirs, stdout=theirs, stderr=log, env={**os.environ, "HOME": str(folder)},
                start_new_session=True,
            )  # fmt: skip
        try:
            yield Browser(ours)
            ours.close()
            process.wait(PATIENCE)
        finally:
            end(process)


@pytest.fixture(scope="module")
def result(program: str, tmp_path_factory: pytest.TempPathFactory) -> distgd.Result:
    folder = tmp_path_factory.mktemp("trained")
    return distgd.train(
        QUICKSTART, "cluster.backend=inprocess", "stop.epochs=null", "stop.steps=40", "eval.every={steps: 10}",
        f"run.name={NAME}", f"run.storage={folder}/runs", f"tracking.uri=sqlite:///{folder}/mlflow.db",
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(result: distgd.Result, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The run's page, as `distgd ui` prints it. In the end it gets Ctrl-C, and nothing of it may be left."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # The background job of a shell ignores Ctrl-C, and so would all that it starts.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "distgd"]
    log = tmp_path_factory.mktemp("ui") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "ui", str(result.run_dir), "--port", str(port)],
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        wait_until(lambda: process.poll() is not None or answers(port), log.read_text)
        assert process.poll() is None, log.read_text()
        printed = re.search(r"^curves  (\S+)/model-metrics$", log.read_text(), re.MULTILINE)
        assert printed, log.read_text()
        yield printed[1]
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(PATIENCE) == 0, log.read_text()
        wait_until(lambda: not left_of(process.pid), lambda: f"left: {left_of(process.pid)}\n{log.read_text()}")
    finally:
        end(process)


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def left_of(group: int) -> list[str]:
    """The names of a process group's processes; one that has ended and is not waited for yet does not count."""
    names = []
    for process in psutil.process_iter(["name", "status"]):
        with suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                names.append(process.info["name"])
    return names


def curve(result: distgd.Result, name: str) -> dict[int, float]:
    """A metric's values by step, as the run folder has them."""
    lines = Path(result.run_dir, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [event for event in map(json.loads, lines) if name in event["metrics"]]
    return {event["step"]: event["metrics"][name] for event in events}


def test_the_experiment_lists_the_run(browser: Browser, run: str, result: distgd.Result) -> None:
    page = Page(browser, run.rpartition("/")[0])
    link = page.find(f"[...document.querySelectorAll('a')].find(link => link.innerText === '{NAME}')?.href")
    assert link.endswith(f"/runs/{result.mlflow_run_id}")


def test_the_run_shows_its_numbers_and_its_config(browser: Browser, run: str, result: distgd.Result) -> None:
    lines = Page(browser, run).lines(NAME, "Finished", "train/loss", "eval/accuracy", "optimizer.lr")
    for name in ("train/loss", "eval/accuracy", "eval/loss"):
        assert float(lines[lines.index(name) + 1]) == result.metrics[name]
    assert lines[lines.index("optimizer.lr") + 1] == "0.003"


CHART = """(() => {
    const title = document.querySelector('h4[title="NAME"]')
    const card = title?.closest('[data-testid="experiment-view-compare-runs-card"]')
    const drawn = card?.querySelector('svg path.js-line')?.getBoundingClientRect()
    const data = card?.querySelector('.js-plotly-plot')?.data[0]
    return drawn?.width > 50 && drawn.height > 50 && data && [Array.from(data.x), Array.from(data.y)]
})()"""


def test_the_curves_are_drawn_and_have_every_value(browser: Browser, run: str, result: distgd.Result) -> None:
    page = Page(browser, f"{run}/model-metrics")
    page.type_into("Search metric charts", "loss|accuracy")  # MLflow draws a chart only where it can be seen
    for name in ("train/loss", "eval/loss", "eval/accuracy"):
        steps, values = page.find(CHART.replace("NAME", name))
        assert dict(zip(steps, values, strict=True)) == curve(result, name)
    assert len(curve(result, "train/loss")) == 40 and len(curve(result, "eval/loss")) == 4


def test_the_report_is_shown(browser: Browser, run: str) -> None:
    page = Page(browser, f"{run}/artifacts/report/convergence.png")
    assert page.find("document.querySelector('img[alt=\"report/convergence.png\"]')?.naturalWidth") > 500
