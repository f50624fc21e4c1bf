"""One config in several variants, with the same seed and data: a table, pictures, and the time to a target.

    variants   what is compared, as overrides
    outcome    what became of a variant
    page       the table and the page

`plan_comparison` checks every variant before anything is started; `run_comparison` runs one after the other, on one
Ray cluster and below one parent run in MLflow. A variant that fails is a row that says so.

    runs/NAME/VARIANT/...              a run folder a variant
    runs/NAME/report/index.html        the page, with its pictures beside it
    runs/NAME/report/comparison.json   the table
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distgd import trainer
from distgd.cluster import shared_cluster
from distgd.compare.outcome import Outcome, outcome
from distgd.compare.page import said, table, write_comparison
from distgd.compare.variants import Variant, variants
from distgd.compare.variants import target as parse_target
from distgd.config import Config, Target, load
from distgd.errors import BadInput, DistgdError, Interrupted
from distgd.records import RunEnd, RunInfo
from distgd.report.page import Table
from distgd.runfolder import refused_by_disk
from distgd.signals import interruptible
from distgd.sources import undisturbed
from distgd.tracking import parent_run

__all__ = ["Compared", "Comparison", "Variant", "plan_comparison", "run_comparison"]

Begin = Callable[[Variant], AbstractContextManager[trainer.Watch]]


@dataclass(frozen=True)
class Comparison:
    """Variants that can run.

    Args:
        configs: by variant, in the order in which they run.
        max_bytes: the largest array in a message of any of them.
    """

    name: str
    configs: Mapping[Variant, Config]
    target: Target | None
    max_bytes: int

    @property
    def first(self) -> Config:
        """The config that says what is the same for all: storage, tracking, backend."""
        return next(iter(self.configs.values()))

    @property
    def clock(self) -> str:
        """The unit of time: in-process clusters live in virtual time."""
        backends = {config.cluster.backend for config in self.configs.values()}
        return "s" if backends == {"ray"} else "virtual s" if backends == {"inprocess"} else "s or virtual s"


@dataclass(frozen=True)
class Compared:
    """What a comparison came to so far."""

    folder: Path
    page: Path
    outcomes: Sequence[Outcome]
    comparison: Comparison
    mlflow_run_id: str | None

    @property
    def table(self) -> Table:
        """A row a variant."""
        return table(self.outcomes, self.comparison.target, self.comparison.clock)

    @property
    def counts(self) -> dict[str, int]:
        """How many variants have run, and how many of them did not come to their end."""
        return {"variants": len(self.outcomes), "failed": sum(not each.good for each in self.outcomes)}

    def as_dict(self) -> dict[str, Any]:
        """The comparison for JSON; its status is failed where a variant's is neither completed nor stopped."""
        target = self.comparison.target
        return {
            "status": _status(self.outcomes),
            "folder": str(self.folder),
            "report": str(self.page),
            "mlflow_run_id": self.mlflow_run_id,
            "target": said(target) if target else None,
            **self.counts,
            "rows": [each.as_dict() for each in self.outcomes],
        }


def plan_comparison(
    source: str | Path | Mapping[str, Any] | Config,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] = {},
    *,
    modes: str | None = None,
    settings: Sequence[str] = (),
    target: str | None = None,
    name: str = "run",
) -> Comparison:
    """Work out every variant and check it as a run is checked; nothing is started or written.

    Args:
        modes, settings: what is compared, see `variants`.
        target: `eval/accuracy>=0.95`; the config's own `stop.target` where it is silent.
        name: begins the folder's name where the config does not give one.

    Raises:
        BadInput: a variant cannot run; the message begins with its name.
    """
    wanted = parse_target(target)
    configs: dict[Variant, Config] = {}
    largest = 0
    for variant in variants(modes, settings):
        try:
            configs[variant] = load(source, [*overrides, *variant.overrides], environ)
            largest = max(largest, _check(configs[variant], wanted, name))
        except BadInput as error:
            raise BadInput(f"variant {variant.label}: {error}") from error
    first = next(iter(configs.values()))
    return Comparison(name, configs, wanted or first.stop.target, largest)


def _check(config: Config, target: Target | None, name: str) -> int:
    """The run's largest message, in bytes; whether the task gives the target's metric is found here too."""
    if target is not None:
        config = config.model_copy(update={"stop": config.stop.model_copy(update={"target": target})})
    with undisturbed():
        return trainer.prepare(config, None, name).largest_message


def run_comparison(comparison: Comparison, begin: Begin) -> Compared:
    """Run the variants one after the other; one that fails does not keep the others from running.

    The page is written after each of them.

    Args:
        begin: is called before each variant, and gives what sees its events.

    Raises:
        Interrupted: what was reached is on the page.
        BadInput, RunFailed: no folder or no cluster is to be had.
    """
    with interruptible(lambda: False) as signals, _cluster(comparison):
        signals.listen()  # Ray has taken the signals
        folder = trainer.new_folder(comparison.first, f"{comparison.name}-compare").absolute()
        with parent_run(_info(comparison, folder)) as parent:
            outcomes: list[Outcome] = []
            waiting = [variant.label for variant in comparison.configs]
            for variant, config in comparison.configs.items():
                outcomes.append(_run(variant, config, folder, comparison.target, begin))
                del waiting[0]
                try:
                    page = write_comparison(folder, outcomes, comparison.target, comparison.clock, waiting)
                except OSError as error:
                    raise refused_by_disk(error, folder) or error from error
                compared = Compared(folder, page, outcomes, comparison, parent.run_id)
                parent.end = RunEnd(_status(outcomes), compared.counts, page.parent)
                if isinstance(outcomes[-1].error, Interrupted):
                    raise outcomes[-1].error
            return compared


def _run(variant: Variant, config: Config, folder: Path, target: Target | None, begin: Begin) -> Outcome:
    """Run one variant to its end, whichever that is."""
    place = config.run.model_copy(update={"storage": str(folder), "name": variant.name})
    error: DistgdError | None = None
    try:
        with begin(variant) as watch:
            result = trainer.launch(config.model_copy(update={"run": place}), variant.name, watch)
    except DistgdError as raised:
        error, result = raised, raised.result
    return outcome(variant, error, result.as_dict() if result is not None else {}, target)


def _cluster(comparison: Comparison) -> AbstractContextManager[None]:
    """Ray, where a variant needs it."""
    configs = [config for config in comparison.configs.values() if config.cluster.backend == "ray"]
    return shared_cluster(configs, comparison.max_bytes) if configs else nullcontext()


def _status(outcomes: Sequence[Outcome]) -> str:
    if isinstance(last := outcomes[-1].error, Interrupted):
        return last.status
    return "completed" if all(each.good for each in outcomes) else "failed"


def _info(comparison: Comparison, folder: Path) -> RunInfo:
    """What MLflow is told of the parent run; a param that differs between variants has all values."""
    flat = [config.flat() for config in comparison.configs.values()]
    params = {key: ", ".join(dict.fromkeys(str(each.get(key)) for each in flat)) for key in flat[0]}
    tracking = comparison.first.tracking
    return RunInfo(
        run_id=folder.name,
        name=folder.name,
        run_dir=folder,
        params=params,
        tags={"mlflow.source.name": "distgd compare"},
        uri=tracking.uri,
        experiment=tracking.experiment,
    )
