"""Models as people have them: from transformers, compiled, tied, frozen, sparse; each trains right or is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from simulate import simulate
from torch import Tensor, nn

from distgd.errors import BadInput
from distgd.sources import Order
from distgd.tasks import Pieces

PARTS = {"batch": {"size": 16, "slots": 4}, "cluster": {"workers": 3, "servers": 2}}
PAD = -100  # a label that does not count, in transformers' models


def tiny_gpt() -> nn.Module:
    """A causal transformer of two layers from `transformers`, with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"vocab_size": 32, "n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 2}
    quiet = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **quiet, bos_token_id=0, eos_token_id=0, use_cache=False))


def sentences(samples: int = 64) -> dict[str, Tensor]:
    """Sequences of 2 to 12 tokens, padded on the right; what is padding has no label."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(2, 13, (samples, 1), generator=generator)
    real = torch.arange(12) < lengths
    tokens = torch.randint(1, 32, (samples, 12), generator=generator) * real
    return {"input_ids": tokens, "attention_mask": real.long(), "labels": tokens.masked_fill(~real, PAD)}


def keyword_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The model's own mean over the tokens that have a label, and how many these are."""
    return model(**batch).loss, (batch["labels"][:, 1:] != PAD).sum()


def plain_loop(steps: int, size: int) -> dict[str, Tensor]:
    """What a person writes: whole batches, the model's own loss, torch's optimizer."""
    torch.manual_seed(0)
    model = tiny_gpt().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data, order = sentences(), Order(64, size, 1, seed=0)
    for step in range(steps):
        rows = torch.from_numpy(order.indices(step, 0))
        optimizer.zero_grad()
        model(**{name: column[rows] for name, column in data.items()}).loss.backward()
        optimizer.step()
    return model.state_dict()


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Norm of the difference over norm, all tensors together."""
    off = sum(float((found[name].double() - value.double()).square().sum()) for name, value in expected.items())
    return float((off / sum(float(value.double().square().sum()) for value in expected.values())) ** 0.5)


def transformer_distance(steps: int) -> float:
    """How far a run over padded slots is from the plain loop over whole batches."""
    task = Pieces(model=tiny_gpt, loss=keyword_loss, train_data=sentences)
    adamw = {"name": "adamw", "lr": 1e-3}
    done = simulate(task, stop={"steps": steps}, optimizer=adamw, **PARTS)
    assert done.error is None
    return distance(done.state, plain_loop(steps, PARTS["batch"]["size"]))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_padded_transformer_trains_as_in_a_plain_loop() -> None:
    assert transformer_distance(steps=50) <= 1e-5


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def compiled() -> nn.Module:
    return torch.compile(net(), backend="eager")  # type: ignore[return-value]


def inner_compiled() -> nn.Module:
    model = net()
    return nn.Sequential(torch.compile(model[:2], backend="eager"), model[2])  # type: ignore[index,arg-type]


def points() -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    return x, x[:, :2] * 2


def square(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def trained(model: Any, loss: Any = square, **sections: Any) -> Any:
    done = simulate(Pieces(model=model, loss=loss, train_data=points), **{**PARTS, **sections})
    if done.error is not None:
        raise done.error
    return done


def test_a_compiled_model_has_the_names_of_the_plain_one_and_its_bits() -> None:
    plain, fast = trained(net), trained(compiled)
    assert list(fast.state) == list(plain.state)
    assert fast.sha256 == plain.sha256


def test_names_are_plain_too_where_a_part_is_compiled() -> None:
    assert list(trained(inner_compiled).state) == ["0.0.weight", "0.0.bias", "1.weight", "1.bias"]


def test_a_module_a_class_and_a_function_are_one_model() -> None:
    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(*net())

    torch.manual_seed(0)
    assert len({trained(model).sha256 for model in (net, Net, net())}) == 1


class Tied(nn.Module):
    """One matrix for both ends, and a parameter that no step uses."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.out.weight = self.into.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.fixed = nn.Parameter(torch.ones(6), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.out(torch.tanh(self.into(x))) * self.fixed)[:, :2]


def test_tied_frozen_and_unused_parameters_stay_what_they_are() -> None:
    state = trained(Tied, optimizer={"name": "sgd", "lr": 0.1}).state
    assert torch.equal(state["into.weight"], state["out.weight"])
    assert torch.equal(state["unused"], torch.ones(3))
    assert torch.equal(state["fixed"], torch.ones(6))


def test_bf16_autocast_leaves_float32_parameters() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return square(model, batch)

    done = trained(net, loss)
    assert {tensor.dtype for tensor in done.state.values()} == {torch.float32}
    assert done.sha256 != trained(net).sha256


class Words(nn.Module):
    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 2, sparse=sparse)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x[:, 0].abs().long().clamp(max=4))


def test_sparse_gradients_are_refused_by_name() -> None:
    with pytest.raises(BadInput, match=r"embed\.weight: expected a dense gradient, found .*sparse"):
        trained(lambda: Words(sparse=True))
    assert trained(lambda: Words(sparse=False)).error is None


def test_complex_parameters_are_refused_by_name() -> None:
    with pytest.raises(BadInput, match=r"task\.model: 0\.weight: expected float32 or float64, found .*complex64"):
        trained(lambda: nn.Sequential(nn.Linear(6, 2, dtype=torch.complex64)))
