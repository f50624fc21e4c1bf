"""An object store, through pyarrow: whole files go there and come back, nothing is renamed, appended or locked.

A file is there whole or not at all, as an object is made when its stream is closed; on a disk behind `file://`, which
is for trials, a kill may leave half of one.
"""

from __future__ import annotations

import hashlib
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from distgd.errors import BadInput

PIECE = 1 << 20  # bytes that are moved at a time


def is_uri(where: str) -> bool:
    """Whether this names an object store, and not a folder.

    >>> is_uri("s3://bucket/runs"), is_uri("/runs")
    (True, False)
    """
    return "://" in where


class Objects:
    """Files under a URI, such as `s3://bucket/folder`; credentials are found as the store's own tools find them.

    Raises:
        BadInput: pyarrow knows no such store.
    """

    def __init__(self, uri: str) -> None:
        from pyarrow import fs

        self.uri = uri.rstrip("/")
        try:
            self._files, self._root = fs.FileSystem.from_uri(self.uri)
        except (ValueError, OSError, NotImplementedError) as error:
            do = "give s3://bucket/folder, gs://bucket/folder or another that pyarrow.fs knows"
            found = f"{uri} ({str(error).splitlines()[0]})"
            raise BadInput.described("checkpoint.storage", "an object store", found, do) from error
        self._folders = self._files.type_name == "local"  # others have none

    def put(self, path: Path, name: str) -> None:
        """Store a file.

        Raises:
            OSError: the store refuses it, or cannot be reached.
        """
        with path.open("rb") as file, self._new(name) as out:
            shutil.copyfileobj(file, out, PIECE)

    def write(self, data: bytes, name: str) -> None:
        """Store bytes.

        Raises:
            OSError: the store refuses them, or cannot be reached.
        """
        with self._new(name) as out:
            out.write(data)

    def get(self, name: str, path: Path) -> None:
        """Bring a file here; what is at `path` is replaced by all of it or stays.

        Raises:
            OSError: it is not there, or the store cannot be reached.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        with self._files.open_input_stream(self._path(name)) as stream, part.open("wb") as file:
            shutil.copyfileobj(stream, file, PIECE)
        part.replace(path)

    def read(self, name: str) -> bytes:
        """A small file.

        Raises:
            OSError: it is not there, or the store cannot be reached.
        """
        with self._files.open_input_stream(self._path(name)) as stream:
            return bytes(stream.read())

    def digest(self, name: str) -> tuple[str, int]:
        """A file's SHA-256 in hexadecimal and its bytes, without keeping it.

        Raises:
            OSError: it is not there, or the store cannot be reached.
        """
        found, size = hashlib.sha256(), 0
        with self._files.open_input_stream(self._path(name)) as stream:
            while piece := stream.read(PIECE):
                found.update(piece)
                size += len(piece)
        return found.hexdigest(), size

    def names(self, under: str = "") -> list[str]:
        """Every file below a folder, by its name from there, in order; none where there is no such folder.

        Raises:
            OSError: the store cannot be reached.
        """
        from pyarrow import fs

        root = self._path(under).rstrip("/")
        found = self._files.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
        return sorted(each.path[len(root) + 1 :] for each in found if each.type == fs.FileType.File)

    def remove(self, names: list[str]) -> None:
        """Delete files, the first ones first; what cannot be deleted stays."""
        for name in names:
            with suppress(OSError):
                self._files.delete_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else str(self._root)

    def _new(self, name: str) -> Any:
        path = self._path(name)
        if self._folders:
            self._files.create_dir(path.rpartition("/")[0], recursive=True)
        return self._files.open_output_stream(path)
