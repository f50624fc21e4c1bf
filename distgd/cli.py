"""The command line. It reads arguments, calls what is below, prints, and ends with an exit code.

    0 ok   1 failed   2 bad config or input   3 diverged   75 SIGTERM   130 Ctrl-C

With `--json` everything for people goes to stderr and the last line of stdout is one JSON object, at every exit; where
the run could not be finished it has `status` and `error`. Nothing heavy is imported before it is needed: `--help`
answers at once.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import closing, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from distgd.errors import BadInput, DistgdError

if TYPE_CHECKING:
    from distgd.audit import Audit
    from distgd.compare import Compared
    from distgd.config import Config
    from distgd.progress import Progress

Payload = Mapping[str, Any]
MOST_EPOCHS = 12  # that `audit` shows, beside those with mistakes and the last one
WIDEST = 400  # letters of a table's line, which is not cut where the window is narrower
STARTED = time.time()  # a process may be older: a set-up that ends in `exec` is no part of the run

as_json = click.option(
    "--json", is_flag=True, expose_value=False, help="Print one JSON object as the last line of stdout."
)
overrides_argument = click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    >>> main(["config", "show", "missing.yaml"])
    2
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this process
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process lives
    if "--json" not in given:
        return _outcome(given)[0]
    stdout = sys.stdout
    with redirect_stdout(sys.stderr):
        code, payload = _outcome(given)
    from distgd.records import strict

    try:
        print(json.dumps(strict(payload), allow_nan=False), file=stdout, flush=True)
    except OSError as error:
        _write_off(stdout)
        return code or _told(1, "failed", f"the JSON object could not be written: {error.strerror}")[0]
    return code


def _write_off(stream: TextIO) -> None:
    """Nobody takes what is printed, as in `| head`: no more of it, and no complaint when the process ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _outcome(arguments: list[str]) -> tuple[int, Payload]:
    """The exit code and what `--json` prints; errors have been told to the person."""
    try:
        _check_current_folder()
        returned = commands.main(arguments, prog_name="distgd", standalone_mode=False)
        payload = returned if isinstance(returned, Mapping) else {}
        return DistgdError.exit_code if payload.get("status") == DistgdError.status else 0, payload
    except DistgdError as error:
        result = error.result.as_dict() if error.result is not None else {}
        _show_result(result)
        code, payload = _told(error.exit_code, error.status, str(error))
        return code, {**result, **payload}
    except click.ClickException as error:
        error.show()
        said = error.format_message()
        if isinstance(error, click.NoSuchOption) and "." in error.option_name:
            hint = f"A key of the config is given without dashes: {error.option_name.lstrip('-')}=VALUE"
            click.echo(hint, err=True)
            said = f"{said} {hint}"
        return BadInput.exit_code, {"status": BadInput.status, "error": said}
    except BrokenPipeError:
        _write_off(sys.stdout)
        return 1, {"status": "failed", "error": "nobody reads the output"}
    except (click.Abort, KeyboardInterrupt):
        return _told(130, "interrupted", "interrupted")
    except Exception as error:  # noqa: BLE001  # a mistake of ours: with --json it is told as JSON too
        traceback.print_exc()
        return 1, {"status": "failed", "error": f"{type(error).__name__}: {error}"}


def _check_current_folder() -> None:
    try:
        Path.cwd()
    except FileNotFoundError as error:
        found = "one that was removed"
        raise BadInput.described("the current folder", "a folder that is there", found, "go to another one") from error


def _check_temporary_folder() -> None:
    """Without one, as on a machine that has no room at all, torch and Ray end with a traceback."""
    import tempfile

    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        do = "free some space, or set TMPDIR to another folder"
        raise BadInput.described("TMPDIR", "a temporary folder that can be written", "none", do) from error


def _told(code: int, status: str, message: str) -> tuple[int, Payload]:
    click.echo(f"distgd: {message}", err=True)
    return code, {"status": status, "error": message}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="distgd", message="%(prog)s %(version)s")
def commands() -> None:
    """Train with a parameter server on Ray: sync, bounded or async, on one machine or many."""


@commands.command()
@click.argument("config")
@overrides_argument
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, start nothing.")
@click.option(
    "--resume", default="never", metavar="never|auto|PATH", help="Go on from the newest checkpoint, or from this one."
)
@click.option(
    "--inject", metavar="FILE", help="Rehearse: inject the faults that FILE lists; short for faults.plan=FILE."
)
@as_json
def train(config: str, overrides: tuple[str, ...], dry_run: bool, resume: str, inject: str | None) -> Payload:
    """Train what the file CONFIG says.

    Single keys are changed behind it:

    \b
        distgd train configs/quickstart.yaml cluster.workers=4 optimizer.lr=0.01

    With --resume auto and run.name=NAME the same command begins the run, goes on with it after whatever ended it, and
    says so when it is finished.
    """  # noqa: D301 - click reads the control character
    overrides += (f"faults.plan={json.dumps(inject)}",) if inject is not None else ()
    settings, name = _load(config, overrides), Path(config).stem
    _check_temporary_folder()
    return _plan(settings, name) if dry_run else _train(settings, name, resume)


def _plan(config: Config, name: str) -> Payload:
    from distgd import trainer
    from distgd.forecast import forecast

    plan = trainer.prepare(config, None, name)
    click.echo("\n".join(plan.lines()))
    expected = forecast(plan)
    click.echo("\n".join(expected.lines()))
    return {**plan.as_dict(), "predicted": expected.as_dict()}


def _train(config: Config, name: str, resume: str) -> Payload:
    from distgd import trainer

    with closing(_Line()) as line:
        result: Payload = trainer.launch(config, name, line, began=STARTED, resume=resume).as_dict()
    try:
        _show_result(result)
    except OSError:  # the run is done and recorded, whoever listens
        _write_off(sys.stdout)
    return result


class _Line:
    """The progress line; it begins with the event that says how many steps are planned."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def __call__(self, event: dict[str, Any]) -> None:
        if self._progress is None:
            from distgd.progress import Progress

            self._progress = Progress(sys.stdout, event.get("steps"))
        self._progress(event)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()


def _show_result(result: Payload) -> None:
    """What came out and where it lies; nothing for a run that never began."""
    if not result:
        return
    folder = Path(result["run_dir"])
    click.echo(
        f"{result['status']}: {result['steps']} steps, {result['samples']:,} samples in {result['wall_s']:.1f} s"
    )
    for name, value in sorted(result["metrics"].items()):
        if name.startswith(("train/", "eval/")):
            click.echo(f"  {name:<20} {float(value):.4f}")  # JSON has no NaN: it is text there
    click.echo(f"run folder  {folder}")
    if (folder / "model.safetensors").exists():
        click.echo(f"weights     {folder / 'model.safetensors'}")
    click.echo(f"numbers     {folder / 'metrics.jsonl'}")
    if (folder / "report" / "index.html").exists():
        click.echo(f"report      {folder / 'report' / 'index.html'}")
    if result["mlflow_run_id"]:
        click.echo(f"curves      distgd ui {folder}")


@commands.command()
@click.argument("run")
@as_json
def report(run: str) -> Payload:
    """Write a page about RUN: its result, curves, times and events.

    RUN is a run folder or a name under runs/, of a run in any state. The page, report/index.html in that folder, is one
    file for any browser; its pictures are beside it as well.
    """
    from distgd.report import write_report

    page = write_report(_run_folder(run)).absolute()
    click.echo(page)
    return {"report": str(page)}


@commands.command()
@click.argument("run")
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--best", is_flag=True, help="Those of the best evaluation, where eval.best asked for it.")
@as_json
def export(run: str, out: Path, best: bool) -> Payload:
    """Write the weights of RUN to the file OUT, as safetensors for plain torch.

    RUN is a run folder or a name under runs/, of a run in any state: where it has not ended, they are those of its
    newest checkpoint.
    """
    from distgd.export import export

    which = export(_run_folder(run), out, best=best)
    click.echo(f"{out}: the weights of {run}, {which}")
    return {"weights": str(out.absolute()), "which": which}


@commands.command()
@click.argument("run")
@as_json
def audit(run: str) -> Payload:
    """Count every sample of RUN, epoch by epoch.

    RUN is a run folder or a name under runs/, of a run in any state. Nothing but its ledger.jsonl is read. The exit
    code is 1 where a sample was counted twice or lost.
    """
    from distgd.audit import audit, read

    found = audit(read(_run_folder(run) / "ledger.jsonl"))
    _show_audit(found)
    return found.as_dict()


def _show_audit(found: Audit) -> None:
    names = ("epoch", "granted", "applied", "twice", "lost", "dropped")
    click.echo("".join(f"{name:>12}" for name in names))
    shown = [c for i, c in enumerate(found.epochs) if i < MOST_EPOCHS or c.twice or c.lost or c is found.epochs[-1]]
    for count in shown:
        numbers = "".join(f"{getattr(count, name):>12,}" for name in names)
        share = f"  ({count.dropped / count.granted:.1%} of the epoch's)" if count.dropped else ""
        click.echo(numbers + share)
    if left := len(found.epochs) - len(shown):
        click.echo(f"{'...':>12}  and {left} more epochs, in which nothing was counted twice or lost")
    end = (
        f"the run went through {found.steps:,} steps"
        if found.finished
        else f"not finished: {found.steps:,} steps so far"
    )
    again = f"; {found.rollbacks} rollbacks, whose steps count once" if found.rollbacks else ""
    click.echo(f"{end}{again}")
    if found.bits is not None:
        click.echo(f"bits {found.bits}" + (f": {found.why}" if found.why else ""))
    told = "no sample was counted twice or lost" if found.clean else "samples were counted twice or lost"
    click.echo(told, err=not found.clean)


@commands.command()
@click.argument("run")
@as_json
def replay(run: str) -> Payload:
    """Make every update of RUN again, in one process, and compare bit for bit.

    RUN is a run folder or a name under runs/. What is compared are its last weights or, where it has not ended by
    itself, its newest checkpoint. Nothing is written to the folder. The exit code is 1 where a bit differs, and 2 where
    updates/ or ledger.jsonl do not hold every update. Start it where the run was started: the task is loaded again.
    """
    from distgd.replay import replay

    found = replay(_run_folder(run))
    click.echo(
        f"{found.mode}: {found.updates:,} updates of shards, {found.gradients:,} slots computed, "
        f"{found.timelines} timelines, {found.seconds:.1f} s"
    )
    if found.weights_sha256 is not None:
        click.echo(f"run     {found.expected}")
        click.echo(f"replay  {found.weights_sha256}")
    told = f"the same bits as {found.compared}" if found.same else f"not the same bits; first of all {found.differs}"
    click.echo(told, err=not found.same)
    return found.as_dict()


@commands.command()
@click.argument("config")
@overrides_argument
@click.option("--modes", metavar="MODE,...", help="Modes to compare: sync,bounded,async.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE,...", help="Values of a key to compare; may be repeated."
)
@click.option("--target", metavar="METRIC>=VALUE", help="What the runs are to reach, such as eval/accuracy>=0.95.")
@as_json
def compare(
    config: str, overrides: tuple[str, ...], modes: str | None, settings: tuple[str, ...], target: str | None
) -> Payload:
    """Run CONFIG in several variants and compare them.

    All have the same seed and data, unless one of these is what is compared. They run one after the other:

    \b
        distgd compare configs/quickstart.yaml --modes sync,async --set optimizer.lr=0.003,0.001

    A mode leaves out what the config says for another one, such as consistency.staleness.
    """  # noqa: D301 - click reads the control character
    from distgd.compare import Variant, plan_comparison, run_comparison

    comparison = plan_comparison(
        config, overrides, os.environ, modes=modes, settings=settings, target=target, name=Path(config).stem
    )
    number = iter(range(1, len(comparison.configs) + 1))

    def begin(variant: Variant) -> closing[_Line]:
        click.echo(f"\n{next(number)} of {len(comparison.configs)}: {variant.label}")
        return closing(_Line())

    compared = run_comparison(comparison, begin)
    _show_comparison(compared)
    return compared.as_dict()


def _show_comparison(compared: Compared) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    rows = Table(box=None, pad_edge=False)
    for at, name in enumerate(compared.table.columns):
        rows.add_column(name, justify="right" if at in compared.table.numbers else "left", no_wrap=True)
    for row in compared.table.rows:
        rows.add_row(*map(escape, row))
    click.echo()
    Console(file=sys.stdout, width=WIDEST, highlight=False).print(rows)
    for each in compared.outcomes:
        if each.error is not None:
            click.echo(f"{each.variant.label}: {each.error}", err=True)
    if compared.table.note:
        click.echo(compared.table.note)
    click.echo(f"page    {compared.page}")
    if compared.mlflow_run_id:
        click.echo(f"curves  distgd ui {compared.outcomes[0].result.get('run_dir', '')}")


@commands.group()
def config() -> None:
    """Look at a config, or at every key that one can have."""


@config.command()
@click.argument("config")
@overrides_argument
@as_json
def show(config: str, overrides: tuple[str, ...]) -> Payload:
    """Print CONFIG with every default and override filled in."""
    settings = _load(config, overrides)
    click.echo(settings.to_yaml(), nl=False)
    return settings.model_dump(mode="json")


@config.command()
@as_json
def schema() -> Payload:
    """Print every key of a config.

    With its type, default and meaning; with --json as a JSON schema.
    """
    from distgd.config import json_schema, schema_rows

    for row in schema_rows():
        click.echo(f"{row.key}: {row.type} [{row.default}]\n    {row.description}")
    return json_schema()


@commands.command()
@click.argument("run", required=False)
@click.option(
    "--port", type=click.IntRange(1, 65535), default=5000, show_default=True, help="Where the browser finds it."
)
def ui(run: str | None, port: int) -> None:
    """Open the MLflow page of a run.

    RUN is a run folder or a name under runs/; without it the store in use here is opened.
    """
    from distgd import tracking

    uri = _store(run, os.environ)
    if uri == "none":
        raise BadInput.at("tracking.uri", "an MLflow store", uri, "the run's numbers are in its metrics.jsonl")
    tracking.check(uri, port)
    click.echo(f"curves  {tracking.page_of(uri, port, Path(run).name if run else None)}")
    if code := tracking.ui(uri, port):
        raise DistgdError(f"MLflow's server ended with exit code {code}")


def _store(run: str | None, environ: Mapping[str, str]) -> str:
    """The MLflow store of a run; without one, that of the environment or the default."""
    from distgd.config import Tracking

    if run is None:
        return environ.get("MLFLOW_TRACKING_URI") or Tracking().uri
    return _load(_run_folder(run) / "config.yaml").tracking.uri


def _run_folder(run: str) -> Path:
    from distgd.config import Run

    for folder in (Path(run), Path(Run().storage) / run):
        if (folder / "config.yaml").is_file():
            return folder
    expected = f"a run folder or a name under {Run().storage}/"
    do = f"start from the folder that {Run().storage}/ is in, or give the whole path"
    raise BadInput.described("RUN", expected, f"{run!r} with no config.yaml in it", do)


def _load(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    from distgd.config import load

    return load(source, overrides, os.environ)
