"""`torch.optim` on the pieces of one shard.

Each piece of a tensor that lies in a shard is one torch parameter, so every piece is stepped as torch would step the
whole tensor: where pieces begin at multiples of 64 elements of the flat vector, the weights are the same bits for any
number of shards. Only optimizers that treat every element by itself can be cut this way; the others are refused with
the reason. Rprop takes the learning rate for its first step only, so a schedule does nothing to it after that.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from distgd.config import sections
from distgd.errors import BadInput
from distgd.optim.kernels import Step, prepared

Label = Literal["elementwise", "scalar"]
State = dict[Label, dict[str, dict[str, Tensor]]]
"""Label -> parameter name -> entry -> tensor: shape (n,) as the piece where elementwise, () where scalar."""
StateParts = dict[Label, dict[str, dict[str, list[Tensor]]]]
"""The same with each elementwise entry as consecutive parts, which nobody has joined."""

ELEMENTWISE = ("SGD", "Adam", "AdamW", "Adadelta", "Adagrad", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "ASGD")
"""What runs here: the tests prove the bits of each, so one that torch adds later is not taken before it is proved."""

REFUSED = {
    "LBFGS": "it evaluates the loss again within a step, and a shard has gradients only",
    "SparseAdam": "it refuses dense gradients, and a shard receives nothing else",
    "Adafactor": "it factors whole matrices, so on a cut tensor it is another optimizer",
    "Muon": "it orthogonalizes whole matrices, and a shard holds pieces of them",
}

REFUSED_ARGUMENTS = {
    "params": "the task's model gives the parameters",
    "foreach": "it does not change the result; set optimizer.fused=false to leave the fused kernel",
    "capturable": "it serves CUDA graphs, and a shard steps outside any graph",
    "differentiable": "no gradient flows through a shard's update",
}

NOT_PER_GROUP = {
    "fused": "torch checks it once for the whole optimizer",
    "initial_accumulator_value": "torch reads it once for the whole optimizer and ignores a group's own",
}


@dataclass(frozen=True)
class OptimizerSpec:
    """A validated choice of optimizer: a class of `torch.optim`, its arguments, and groups by name pattern.

    `arguments` always hold `lr`; what is not in them has torch's default. Both they and the groups' are JSON values.
    A parameter belongs to the first group whose pattern (`fnmatch`, case-sensitive) matches its name, and to the
    default group, reported as `*`, where none does.
    """

    name: str
    arguments: Mapping[str, Any]
    groups: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    def group_of(self, parameter: str) -> int:
        """The place of the parameter's group in `groups`; `len(groups)` is the default group.

        >>> OptimizerSpec("SGD", {"lr": 0.1}, (("*.bias", {"lr": 0.2}),)).group_of("head.bias")
        0
        """
        matching = (place for place, (pattern, _) in enumerate(self.groups) if fnmatchcase(parameter, pattern))
        return next(matching, len(self.groups))

    def lrs(self, scale: float) -> dict[str, float]:
        """The learning rate of each group by its pattern, at a schedule's factor `scale`."""
        patterns = (*self.groups, ("*", self.arguments))
        return {pattern: arguments.get("lr", self.arguments["lr"]) * scale for pattern, arguments in reversed(patterns)}


def resolve_optimizer(section: sections.Optimizer) -> OptimizerSpec:
    """Check the config's `optimizer` against torch's own signature and limits.

    Raises:
        BadInput: an unknown or refused optimizer or argument, a value of another type, or one that torch refuses.
    """
    name = _class_name(section.name)
    given = dict(section.arguments) if section.lr is None else {**section.arguments, "lr": section.lr}
    arguments = _typed(name, "optimizer", given)
    arguments.setdefault("lr", _defaults(name)["lr"])
    _check_values(name, "optimizer", arguments, {})
    groups = []
    for place, group in enumerate(section.groups):
        where = f"optimizer.groups[{place}]"
        for key in (key for key in NOT_PER_GROUP if key in group.arguments):
            raise BadInput.at(f"{where}.{key}", "no such key in a group", group.arguments[key], NOT_PER_GROUP[key])
        own = _typed(name, where, group.arguments)
        _check_values(name, where, own, arguments)
        groups.append((group.match, own))
    return OptimizerSpec(name, arguments, tuple(groups))


def check_groups(spec: OptimizerSpec, names: Iterable[str]) -> None:
    """Refuse a group that takes no parameter: nothing matches it, or groups before it took all that does.

    Args:
        spec: what `resolve_optimizer` returned.
        names: every trained parameter of the model.
    """
    names = list(names)
    taken = {spec.group_of(name) for name in names}
    for place, (pattern, _) in enumerate(spec.groups):
        if place not in taken:
            some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise BadInput.at(
                f"optimizer.groups[{place}].match",
                "a pattern that matches a parameter which no group before it takes",
                pattern,
                f"the parameters are {some}",
            )


class PieceOptimizer:
    """`torch.optim` on the pieces of one shard.

    The weights are stepped in place; the optimizer's state lives here. With no pieces every call does nothing.

    A long vector is stepped in blocks, so that a block's gradient can be made just before and is still in the cache.

    Args:
        spec: what `resolve_optimizer` returned.
        pieces: name of the parameter and its piece, a 1-D contiguous view of the weights that are stepped.
            A shard is contiguous, so it has one piece of a parameter at most.
        block: about how many elements a block has, a multiple of 64, since cuts elsewhere would change bits; None for
            all in one.

    Attributes:
        blocks: what each block is made of, as (number of the piece, first element, stop element).

    >>> weights = torch.zeros(128)
    >>> optimizer = PieceOptimizer(OptimizerSpec("SGD", {"lr": 0.5}), [("a", weights[:3]), ("b", weights[64:66])])
    >>> optimizer.step([torch.ones(3), torch.ones(2)])
    >>> weights[:4].tolist()
    [-0.5, -0.5, -0.5, 0.0]
    """

    def __init__(self, spec: OptimizerSpec, pieces: Sequence[tuple[str, Tensor]], *, block: int | None = None) -> None:
        for name, piece in pieces:
            if piece.dim() != 1 or not piece.is_contiguous():
                raise ValueError(f"{name}: a piece is a contiguous 1-D view, not shape {tuple(piece.shape)}")
        # detach: torch hangs `.grad` on the tensor object, and the caller's must stay as it is
        self._pieces = {name: piece.detach() for name, piece in pieces}
        if len(self._pieces) != len(pieces):
            raise ValueError("two pieces of one parameter in one shard")
        self.blocks = _cut([piece.numel() for _, piece in pieces], block)
        cuts = [[(pieces[i][0], pieces[i][1].detach()[lo:hi]) for i, lo, hi in cut] for cut in self.blocks]
        self._cuts: dict[str, list[Tensor]] = {name: [] for name in self._pieces}
        for name, cut in (each for parts in cuts for each in parts):
            self._cuts[name].append(cut)
        self._torch = _build(spec, self._cuts) if pieces else None
        self._step = _plain_step(self._torch) if self._torch else None
        self._params = [[cut for _, cut in parts] for parts in cuts]
        self._groups = [_groups(self._torch, params) for params in self._params] if self._torch else []
        self._ready: list[Step | None] = [None] * len(self.blocks)  # once a block has been stepped torch's way

    def step(self, grads: Sequence[Tensor], scale: float = 1.0) -> None:
        """Apply one update.

        Args:
            grads: one 1-D tensor for each piece, in the order of the pieces; read, and not kept.
            scale: multiplies every group's learning rate (schedule, staleness).
        """
        if len(grads) != len(self._pieces):
            raise ValueError(f"expected {len(self._pieces)} gradients, found {len(grads)}")
        for number, cut in enumerate(self.blocks):
            self.step_block(number, [grads[i][lo:hi] for i, lo, hi in cut], scale)

    def step_block(self, number: int, grads: Sequence[Tensor], scale: float = 1.0) -> None:
        """Apply one update to one of `blocks`; an update of all takes them once each, in any order.

        Args:
            grads: one 1-D tensor for each part of the block; read, and not kept.
        """
        if (ready := self._ready[number]) is not None:
            ready(grads, scale)
            return
        assert self._torch is not None
        assert self._step is not None
        groups, params = self._groups[number], self._params[number]
        for lr, group in groups:
            group["lr"] = lr * scale
        self._torch.param_groups = [group for _, group in groups]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        self._step(self._torch)
        for param in params:
            param.grad = None
        self._ready[number] = prepared(self._torch, params, [{**group, "lr": lr} for lr, group in groups])

    def state_dict(self) -> State:
        """Everything that the next step depends on besides weights and `spec`, labelled for cutting.

        An elementwise entry is cut and joined like the weights; a scalar one is the same in all pieces that took the
        same steps. The tensors are the optimizer's own: copy them before the next step.
        """
        return {
            label: {
                name: {entry: torch.cat(parts) if len(parts) > 1 else parts[0] for entry, parts in entries.items()}
                for name, entries in tensors.items()
            }
            for label, tensors in self.state_parts().items()
        }

    def state_parts(self) -> StateParts:
        """`state_dict` without the copy that joins blocks: every tensor is the optimizer's own."""
        state: StateParts = {"elementwise": {}, "scalar": {}}
        for name, cuts in self._cuts.items():
            for entry, value in self._state_of(cuts[0]).items():
                label = _label(name, entry, value, cuts[0])
                rest = [self._state_of(cut)[entry] for cut in cuts[1:]] if label == "elementwise" else []
                state[label].setdefault(name, {})[entry] = [value, *rest]
        return state

    def load_state_dict(self, state: State) -> None:
        """Put copies of `state` in the place of all that is here; a piece that is not in it starts anew.

        Raises:
            BadInput: an entry of a parameter that has no piece here, or of another shape than its label says.
        """
        self._ready = [None] * len(self.blocks)
        loaded: dict[str, dict[str, Tensor]] = {name: {} for name in self._pieces}
        for label, parameters in state.items():
            for name, entries in parameters.items():
                if name not in self._pieces:
                    raise BadInput.at(f"optimizer state {name}", f"one of {sorted(self._pieces)}", name)
                for entry, value in entries.items():
                    if _label(name, entry, value, self._pieces[name]) != label:
                        raise BadInput.at(f"optimizer state {name}.{entry}", f"a {label} entry", tuple(value.shape))
                    loaded[name][entry] = value
        for name, entries in loaded.items():
            at = 0
            for cut in self._cuts[name]:
                own = {
                    entry: v[at : at + cut.numel()].clone() if v.dim() else v.clone() for entry, v in entries.items()
                }
                self._state_of(cut).clear()
                self._state_of(cut).update(own)
                at += cut.numel()

    def _state_of(self, cut: Tensor) -> dict[str, Any]:
        assert self._torch is not None
        state: dict[str, Any] = self._torch.state[cut]
        return state


def _cut(sizes: Sequence[int], block: int | None) -> list[list[tuple[int, int, int]]]:
    """Pieces of `sizes`, one after the other, as blocks; a piece is cut at multiples of `block` only.

    >>> _cut([100, 200, 30], 128)
    [[(0, 0, 100)], [(1, 0, 128)], [(1, 128, 200), (2, 0, 30)]]
    """
    blocks: list[list[tuple[int, int, int]]] = []
    room = 0
    for number, size in enumerate(sizes):
        step = block or max(size, 1)
        for first in range(0, size, step):
            stop = min(first + step, size)
            if not blocks or (block and stop - first > room):
                blocks.append([])
                room = block or 0
            blocks[-1].append((number, first, stop))
            room -= stop - first
    return blocks


def _groups(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[tuple[float, dict[str, Any]]]:
    """The optimizer's groups as far as they hold `params`, each with its learning rate."""
    wanted = {id(param) for param in params}
    some = ({**group, "params": [p for p in group["params"] if id(p) in wanted]} for group in optimizer.param_groups)
    return [(group["lr"], group) for group in some if group["params"]]


def _class_name(name: str) -> str:
    """The class of `torch.optim` that `name` means in any case."""
    for refused, reason in REFUSED.items():
        if name.lower() == refused.lower():
            expected = f"one of {', '.join(known.lower() for known in ELEMENTWISE)}"
            raise BadInput.at("optimizer.name", expected, name, f"choose one: {refused} cannot run here, as {reason}")
    by_lower = {known.lower(): known for known in ELEMENTWISE}
    if name.lower() not in by_lower:
        do = _nearest(name.lower(), by_lower) or "choose one"
        raise BadInput.at("optimizer.name", f"one of {', '.join(by_lower)}", name, do)
    return by_lower[name.lower()]


def _defaults(name: str) -> dict[str, Any]:
    """The arguments that torch's class takes and that make sense here, with torch's defaults."""
    parameters = inspect.signature(getattr(torch.optim, name)).parameters
    return {key: p.default for key, p in parameters.items() if key not in REFUSED_ARGUMENTS}


def _typed(name: str, where: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in the types of torch's defaults; YAML has no tuples and writes 1 for 1.0."""
    defaults = _defaults(name)
    for key in (key for key in arguments if key not in defaults):
        if key in REFUSED_ARGUMENTS:
            raise BadInput.at(f"{where}.{key}", "no such key", arguments[key], REFUSED_ARGUMENTS[key])
        expected = f"an argument of torch.optim.{name} ({', '.join(defaults)})"
        raise BadInput.at(f"{where}.{key}", expected, arguments[key], _nearest(key, defaults) or "remove it")
    return {key: _as_type_of(f"{where}.{key}", defaults[key], value) for key, value in arguments.items()}


def _as_type_of(key: str, default: object, value: Any) -> Any:
    if default is None or isinstance(default, bool):
        if isinstance(value, bool):
            return value
        raise BadInput.at(key, "true or false", value, "correct it, or leave it out")
    if isinstance(default, tuple):
        numbers = tuple(map(_number, value)) if isinstance(value, list | tuple) else ()
        if len(numbers) == len(default) and None not in numbers:
            return numbers
        do = "correct it, or leave it out"
        raise BadInput.at(key, f"a list of {len(default)} numbers, such as {list(default)}", value, do)
    number = _number(value)
    if number is None:
        raise BadInput.at(key, f"a finite number, such as {default}", value, "correct it, or leave it out")
    return number


def _number(value: object) -> float | None:
    """A finite number as a float, else None; text counts where it is a number, as PyYAML reads 1e-8 as text."""
    if not isinstance(value, int | float | str) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _check_values(name: str, where: str, arguments: Mapping[str, Any], inherited: Mapping[str, Any]) -> None:
    """Let torch judge; the argument to blame is one without which its complaint is another or none."""
    complaint = _complaint(name, {**inherited, **arguments})
    if complaint is None:
        return

    def complaint_without(key: str) -> str | None:
        return _complaint(name, {**inherited, **{k: v for k, v in arguments.items() if k != key}})

    key = next(key for key in arguments if complaint_without(key) != complaint)
    expected = f"a value that torch.optim.{name} allows (its default is {_defaults(name)[key]})"
    raise BadInput.at(f"{where}.{key}", expected, arguments[key], f"torch says: {complaint}")


def _complaint(name: str, arguments: Mapping[str, Any]) -> str | None:
    try:
        _class(name)([torch.zeros(1)], **arguments)
    except (ValueError, TypeError) as refused:
        return str(refused)
    return None


def _nearest(word: str, known: Iterable[str]) -> str:
    close = get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]}?" if close else ""


def _build(spec: OptimizerSpec, cuts: Mapping[str, Sequence[Tensor]]) -> torch.optim.Optimizer:
    """One torch parameter per cut, in the groups of their names; a group without one here is left out."""
    members: dict[int, list[Tensor]] = {}
    for name, parts in cuts.items():
        members.setdefault(spec.group_of(name), []).extend(parts)
    own = [*(arguments for _, arguments in spec.groups), {}]
    groups = [{**own[place], "params": tensors} for place, tensors in members.items()]
    build: Callable[..., torch.optim.Optimizer] = _class(spec.name)
    some = next(iter(cuts.values()))[0]
    fused = {"fused": True} if "fused" in _defaults(spec.name) and _fused_runs(build, some) else {}
    return build(groups, **{**fused, **spec.arguments})


@cache
def _class(name: str) -> type[torch.optim.Optimizer]:
    """`torch.optim`'s class, whose making does not load torch's compiler: a second and 70 MB for each process."""
    known: type[torch.optim.Optimizer] = getattr(torch.optim, name)
    return type(name, (known,), {"add_param_group": inspect.unwrap(known.add_param_group)})


def _plain_step(optimizer: torch.optim.Optimizer) -> Callable[[torch.optim.Optimizer], Any]:
    """The optimizer's own step without what torch puts around it: a label, hooks, and the compiler's marks.

    Nobody profiles, hooks or compiles a shard's optimizer, and these take as long as stepping ten thousand numbers.
    """
    plain: Callable[[torch.optim.Optimizer], Any] = torch.no_grad()(inspect.unwrap(type(optimizer).step))
    return plain


def _fused_runs(build: Callable[..., torch.optim.Optimizer], like: Tensor) -> bool:
    """Whether torch has the fused kernel for this device and dtype: it says so only when it steps."""
    parameter = torch.zeros_like(like[:1])
    parameter.grad = torch.zeros_like(parameter)
    try:
        trial = build([parameter], fused=True)
        _plain_step(trial)(trial)
    except RuntimeError:
        return False
    return True


def _label(name: str, entry: str, value: object, piece: Tensor) -> Label:
    if isinstance(value, Tensor) and value.shape in (piece.shape, ()):
        return "scalar" if value.dim() == 0 else "elementwise"
    raise BadInput(
        f"optimizer state {name}.{entry}: expected a tensor of shape {tuple(piece.shape)} or (), found {value!r}"
    )
