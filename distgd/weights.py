"""A model's weights as a file and as one number.

`fingerprint` is the number by which two runs are compared: it covers names, dtypes, shapes and every bit.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from distgd.errors import BadInput

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over a `state_dict`: by sorted name: name, NUL, dtype as in safetensors, NUL, shape as JSON, NUL, bytes.

    Tied tensors count once, under the first of their names in that order. Bytes are little-endian.

    >>> fingerprint({"w": torch.zeros(2)})[:8]
    '87946466'
    """
    digest = hashlib.sha256()
    for name, tensor in _untied(state):
        shape = json.dumps(list(tensor.shape), separators=(",", ":"))
        digest.update(b"\0".join((name.encode(), _DTYPES[tensor.dtype].encode(), shape.encode(), b"")))
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check(state: Mapping[str, Any]) -> None:
    """Refuse a `state_dict` that can be neither written nor compared, by name, before anything is trained.

    Raises:
        BadInput: an entry is no tensor, or of a dtype that safetensors does not have.
    """
    for name, value in state.items():
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        if found not in _DTYPES:
            do = "keep it out of the state_dict (register_buffer(..., persistent=False), no get_extra_state)"
            raise BadInput.described(f"task.model: {name}", "a tensor of a plain dtype", str(found), do)


def copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy on the CPU with a memory of its own, in which tied tensors stay tied."""
    copies: dict[Any, Tensor] = {}
    return {
        name: copies.setdefault(_place(name, tensor), tensor.detach().cpu().clone()) for name, tensor in state.items()
    }


def _untied(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    seen = set()
    for name in sorted(state):
        place = _place(name, state[name])
        if place not in seen:
            yield name, state[name]
        seen.add(place)


def _place(name: str, tensor: Tensor) -> Any:
    """Equal for two tied tensors; an empty tensor is tied to nothing."""
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else name


def save(state: Mapping[str, Tensor], path: Path) -> Path:
    """Write a `state_dict` as safetensors, every name with a tensor of its own, so that plain torch loads it strictly.

    A file that is there is replaced at once or not at all.

    Raises:
        OSError: the disk refuses it.
    """
    part = path.with_suffix(".part")
    try:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, part)
        part.replace(path)
    except SafetensorError as error:  # it tells the number of what the system refused in its text alone
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error
    finally:
        part.unlink(missing_ok=True)
    return path
