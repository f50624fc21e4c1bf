"""`char-lm`: a small causal transformer on the characters of one text.

The decoder is pre-norm (Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020, section 3) with
learned positions and an output tied to the embedding (Press and Wolf, 2017). A sample is a window of `context` + 1
characters: the first `context` predict the ones after them. The last tenth of the text is held out.

By default the text is the Python standard library's own source, which every machine has; it is the same for one Python
version only. With another text, `data.path` names a UTF-8 file.
"""

from __future__ import annotations

import sysconfig
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from distgd.errors import BadInput

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class CharLM:
    """Next-character prediction; the loss is the mean in nats a character.

    Args:
        context: characters that a prediction can see.
        stride: characters from one window to the next; None is `context`, windows that do not overlap.
        limit_bytes: how much of the text is read.
        data_path: a UTF-8 text file; None is the standard library's source.
    """

    context: PositiveInt = 64
    stride: PositiveInt | None = None
    width: PositiveInt = 128
    depth: PositiveInt = 2
    heads: PositiveInt = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    limit_bytes: PositiveInt = 1_000_000
    data_path: Path | None = None

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise BadInput.at("task.args.width", f"a multiple of task.args.heads = {self.heads}", self.width)

    def model(self) -> Decoder:
        """Logits over the vocabulary, from characters of shape (samples, at most `context`)."""
        return Decoder(len(self.vocabulary) + 1, self.context, self.width, self.depth, self.heads, self.dropout)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Mean nats a character; windows are of one length, so that is a mean over samples too."""
        windows = batch.long()
        return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def train_data(self) -> Tensor:
        """Windows of shape (samples, context + 1): a view of the first nine tenths of the text, not a copy."""
        return self._windows(self._split[0])

    def eval_data(self) -> Tensor:
        """Windows of the last tenth, which the vocabulary has not seen."""
        return self._windows(self._split[1])

    @cached_property
    def vocabulary(self) -> str:
        """The characters of the training part, sorted. One more class stands for every other character."""
        return "".join(sorted(set(self._parts[0])))

    @cached_property
    def _parts(self) -> tuple[str, str]:
        text = (
            _standard_library(self.limit_bytes) if self.data_path is None else _read(self.data_path, self.limit_bytes)
        )
        cut = len(text) * 9 // 10
        if len(text) - cut <= self.context:
            raise BadInput.at(
                "data.path",
                f"more than {10 * self.context} characters",
                len(text),
                "give a longer text, a higher task.args.limit_bytes or a smaller task.args.context",
            )
        return text[:cut], text[cut:]

    @cached_property
    def _split(self) -> tuple[Tensor, Tensor]:
        train, held_out = (_encode(part, self.vocabulary) for part in self._parts)
        return train, held_out

    def _windows(self, text: Tensor) -> Tensor:
        return text.unfold(0, self.context + 1, self.stride or self.context)


class Decoder(nn.Module):
    """A decoder-only transformer: (samples, characters) int64 to logits (samples, characters, vocabulary)."""

    def __init__(self, vocabulary: int, context: int, width: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        blocks = [Block(width, heads, dropout) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.apply(_small)
        for block in blocks:  # so that the residual stream's variance does not grow with the depth
            for last in (block.mixed, block.shrink):
                nn.init.normal_(last.weight, std=0.02 / sqrt(2 * depth))

    def forward(self, characters: Tensor) -> Tensor:
        """Each place's logits depend on the characters up to it."""
        places = torch.arange(characters.shape[1], device=characters.device)
        x = self.blocks(self.dropout(self.token(characters) + self.position(places)))
        return F.linear(self.norm(x), self.token.weight)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); shapes (samples, characters, width)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.grow, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The shape of `x` stays."""
        attended: Tensor = self.dropout(self.mixed(self._attention(self.norm1(x))))
        x = x + attended
        processed: Tensor = self.dropout(self.shrink(F.gelu(self.grow(self.norm2(x)))))
        return x + processed

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        dropout = self.dropout.p if self.training else 0.0
        mixed: Tensor = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return mixed.transpose(1, 2).flatten(2)


def _small(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def _encode(text: str, vocabulary: str) -> Tensor:
    """Each character's place in the sorted vocabulary, or one past its end; the smallest type that holds it."""
    known, codes = (np.frombuffer(s.encode("utf-32-le"), dtype=np.uint32) for s in (vocabulary, text))
    places = np.searchsorted(known, codes).clip(max=len(known) - 1)
    places = np.where(known[places] == codes, places, len(known))
    return torch.from_numpy(places.astype(np.uint8 if len(known) < 256 else np.int32))


def _read(path: Path, limit: int) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(limit)
    except OSError as error:
        raise BadInput.at("data.path", "a text file that can be read", str(path), error.strerror or "") from error
    return content.decode("utf-8", errors="replace")


def _standard_library(limit: int) -> str:
    """The first `limit` bytes of the standard library's modules, sorted by path, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    content = bytearray()
    for path in sorted(path for path in files if not _LEFT_OUT & set(path.parts)):
        content += (root / path).read_bytes()
        if len(content) >= limit:
            break
    return content[:limit].decode("utf-8", errors="replace")
