"""The folder of a run: made before the start, given back where nothing began, and what its disk refuses, in words."""

from __future__ import annotations

import errno
import secrets
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from distgd.config import Config
from distgd.errors import BadInput

OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


def new_folder(config: Config, name: str) -> Path:
    """The folder of a run that is yet to come, made; one that holds files is `BadInput`."""
    stamp = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    run_dir = Path(config.run.storage) / (config.run.name or stamp)
    made = missing(run_dir)
    try:
        if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
            raise BadInput.at("run.name", "a new run folder", str(run_dir), "choose another with run.name=")
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(made)
        found = f"{config.run.storage} ({error.strerror})"
        do = "set it to a folder that can be written"
        raise BadInput.described("run.storage", "a folder for run folders", found, do) from error
    return run_dir


def missing(folder: Path) -> list[Path]:
    """Those of a folder and the folders above it that are not there, the innermost first."""
    with suppress(OSError):
        return [part for part in (folder, *folder.parents) if not part.exists()]
    return []


def give_back(run_dir: Path, made: Sequence[Path]) -> None:
    """Remove a run folder in which nothing began, and the folders that were `made` for it and hold nothing else."""
    shutil.rmtree(run_dir, ignore_errors=True)
    _remove_empty(made)


def _remove_empty(folders: Sequence[Path]) -> None:
    with suppress(OSError):  # not made, or somebody else's run is in it by now
        for folder in folders:
            folder.rmdir()


def refused_by_disk(error: OSError, run_dir: Path) -> BadInput | None:
    """The message where a disk is full, read-only or broken; None for any other error."""
    if error.errno not in OF_THE_DISK:
        return None
    free = shutil.disk_usage(run_dir).free
    found = f"{error.strerror} ({free / 1e6:,.1f} MB free)"
    do = "free some space, or set run.storage to another disk"
    return BadInput.described("run.storage", f"room for the run's files in {run_dir}", found, do)
