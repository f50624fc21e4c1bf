"""Which checkpoints stay."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import pytest
from test_resume import Ragged, clean, config, without_pictures

from distgd.checkpoint import Checkpoints, open_checkpoint, version_of
from distgd.config import load
from distgd.errors import BadInput
from distgd.keeping import Keeping
from distgd.trainer import launch

__all__ = ["without_pictures"]
KEEP = {"every": {"steps": 2}, "keep": 2, "keep_best": True}
EVAL = {"every": {"steps": 2}, "best": {"metric": "eval/worse", "mode": "min"}}


class Early(Ragged):
    """Evaluations get worse behind the weights of a certain step."""

    def evaluate(self, model: Any, batches: Any) -> dict[str, float]:
        return {"worse": float(sum(p.detach().square().sum() for p in model.parameters()))}


def versions(path: Path) -> list[int]:
    return sorted(version_of(folder.name) for folder in (path / "runs/a/checkpoints").iterdir())


@pytest.mark.parametrize("mode", ["sync", "bounded", "async"])
def test_the_best_evaluations_checkpoint_stays_beside_the_newest(tmp_path: Path, mode: str) -> None:
    given = config(tmp_path, mode, eval=EVAL, checkpoint=KEEP)
    result = launch(given, "x", lambda event: None, task=Early())
    assert result.best is not None
    kept = versions(tmp_path)
    assert len(kept) <= 4, "the best, two, and one that may have been the best"
    assert mode != "sync" or result.best["step"] in kept[:-1]
    for folder in (tmp_path / "runs/a/checkpoints").iterdir():
        open_checkpoint(folder, None)


def go(path: Path, steps: int, **more: Any) -> dict[str, Any]:
    given = config(path, eval=EVAL, checkpoint={**KEEP, **more}, stop={"steps": steps})
    result = launch(given, "x", lambda event: None, task=Early(), resume="auto")
    assert result.best is not None
    return result.best


def test_it_stays_over_a_stop_and_can_be_gone_on_from(tmp_path: Path) -> None:
    best = go(tmp_path, 12)
    assert best["step"] < 8, "it is not among the newest"
    assert go(tmp_path, 24) == best
    assert best["step"] in versions(tmp_path)
    folder = next((tmp_path / "runs/a/checkpoints").glob(f"v{best['step']}-*"))
    given = config(tmp_path, eval=EVAL, checkpoint=KEEP)
    result = launch(given, "x", lambda event: None, task=Early(), resume=str(folder))
    assert (result.steps, clean(tmp_path)) == (24, True)


def test_without_the_key_it_goes(tmp_path: Path) -> None:
    best = go(tmp_path, 24, keep_best=False)
    assert best["step"] not in versions(tmp_path)


def test_one_that_is_under_evaluation_stays_until_it_is_known(tmp_path: Path) -> None:
    """An evaluation may take longer than `keep` checkpoints."""
    keeping = kept_by(tmp_path, begins=None)
    made = [keeping.made(version, evaluating=4) for version in (2, 4, 6, 8, 10)]
    assert keeping.there() == [4, 8, 10]
    keeping.found_best(4)
    keeping.made(12, evaluating=12)
    assert keeping.there() == [4, 10, 12]
    keeping.found_best(12)
    keeping.made(14, evaluating=12)
    keeping.made(16, evaluating=12)
    keeping.made(18, evaluating=12)
    assert keeping.there() == [12, 16, 18]
    assert len(made) == 5


def test_without_a_best_evaluation_it_is_bad_input() -> None:
    with pytest.raises(BadInput, match=r"checkpoint.keep_best: expected false without eval.best, found true"):
        load({"task": "digits", "stop": {"steps": 1}, "checkpoint": {"keep_best": True}})


def kept_by(path: Path, begins: Any) -> Any:
    """What decides alone: checkpoints are empty folders with a manifest."""

    class Bare(Keeping):
        def __init__(self) -> None:
            self.place = Checkpoints(str(path))
            self._kept = deque(maxlen=2)
            self._keeps_best, self._best, self.best, self._candidate = True, None, None, None

        def made(self, version: int, evaluating: int) -> None:
            folder = path / f"v{version}-t1"
            folder.mkdir()
            self._made(folder.name, evaluating)

        def there(self) -> list[int]:
            return sorted(version_of(folder.name) for folder in path.iterdir())

    return Bare()
