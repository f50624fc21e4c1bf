"""MLflow's pages of a local store, in the browser."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from urllib.parse import urlsplit

from distgd.errors import BadInput
from distgd.tracking.store import CLIENT_SETTINGS, absolute, sqlite_file


def check(uri: str, port: int) -> None:
    """Whether `ui` can serve a store at a port.

    Raises:
        BadInput: a store that is not there, which MLflow would create empty, one with a server already, or a port that
            is not free.
    """
    if urlsplit(uri).scheme in ("http", "https"):
        raise BadInput.at("tracking.uri", "a database", uri, "this store has a server: open that address in a browser")
    file = sqlite_file(absolute(uri))
    if file and not file.exists():
        raise BadInput.at("tracking.uri", "an MLflow store", uri, "train first, or go to the folder of the run")
    _check_free(port)


def ui(uri: str, port: int) -> int:
    """Serve MLflow's pages for a local store on 127.0.0.1 until Ctrl-C or SIGTERM; the server's exit code, else 0.

    Raises:
        BadInput: as `check` does.
    """
    check(uri, port)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", absolute(uri)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = {**CLIENT_SETTINGS, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the server goes too
    with subprocess.Popen(command, env=environment) as server:
        try:
            return server.wait()
        except KeyboardInterrupt:
            server.send_signal(signal.SIGINT)
            server.wait(10)
            return 0
        finally:
            server.terminate()
            signal.signal(signal.SIGTERM, before)


def page_of(uri: str, port: int, run: str | None) -> str:
    """The address of a run's curves in the pages that `ui` serves, by its `run_id`; of all runs where there is none.

    MLflow's own first page is about traces of language models, which nobody here looks for.
    """
    from mlflow import MlflowClient

    client, address = MlflowClient(absolute(uri)), f"http://127.0.0.1:{port}"
    experiments = [e.experiment_id for e in client.search_experiments()]
    if run is not None:
        found = client.search_runs(experiments, filter_string=f"tags.run_id = '{run}'", max_results=1)
        if found:
            info = found[0].info
            return f"{address}/#/experiments/{info.experiment_id}/runs/{info.run_id}/model-metrics"
    return f"{address}/#/experiments/{experiments[0]}?workflowType=machine_learning" if experiments else address


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as a server does: old connections do not count
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            do = "choose another, such as --port 5001"
            raise BadInput.described("--port", "a free port", f"{port} ({error.strerror})", do) from error
