"""The inputs of a layer's linears, collected in the order in which the linears depend on each other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mptq.model.tensors import LinearSpec

_BEFORE_ADDITION = ("linear_proj", "linear_fc2")
"""Linears whose outputs are added to the residual stream."""


class Reached(BaseException):
    """Raised in a forward pass once all that was wanted has been seen: no error, and not to be caught as one."""


def is_added(linear: LinearSpec) -> bool:
    """Whether the outputs of a linear are added to the residual stream, token by token."""
    return linear.kind in _BEFORE_ADDITION and linear.expert is None


@dataclass(frozen=True, slots=True)
class Inputs:
    """Inputs `rows` [tokens, in] of a linear in a batch, in their own dtype.

    Where its outputs are added to the residual stream, there are `weights` float32 [tokens, 1], one over the root mean
    square of that stream after the addition, and possibly the stream before it, `residual` [tokens, hidden].
    """

    rows: torch.Tensor
    weights: torch.Tensor | None = None
    residual: torch.Tensor | None = None

    def weighted(self, values: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Returns values [tokens, any], times the weights of the tokens if there are any: float32, on `device`."""
        values = values.to(device, torch.float32, copy=True)
        return values if self.weights is None else values.mul_(self.weights.to(device))


@dataclass
class LinearInputs:
    """Collects the inputs of the linears `wanted`, batch by batch; a pass ends where one of `later` would run.

    `rows` has the inputs by module and number of the batch. The tokens of linears whose outputs are added to the residual
    stream are weighted with one over its root mean square after the addition, as the next norm does: a token whose hidden
    state is large (an attention sink) would outweigh all others. Experts' tokens are not, because their order is not
    that of the stream. With `residuals`, that stream before the addition is kept too. Memory: the inputs of all tokens.
    """

    wanted: Sequence[LinearSpec]
    later: Collection[str] = ()
    residuals: bool = False
    rows: dict[str, dict[int, Inputs]] = field(default_factory=dict)
    number: int = 0

    @contextlib.contextmanager
    def collecting(self, layer: Any) -> Iterator[None]:
        """Collects whenever `layer` runs; the caller sets `number` before, and catches `Reached`."""
        self.rows = {linear.module: {} for linear in self.wanted}
        # Experts run one after the other, each with both of its linears.
        stops = () if any(linear.expert is not None for linear in self.wanted) else self.later
        hooks = [layer.get_submodule(name).register_forward_pre_hook(_stop) for name in stops]
        hooks += [
            layer.get_submodule(linear.module).register_forward_pre_hook(self._keep(linear.module)) for linear in self.wanted
        ]
        attention, mlp = (
            [one.module for one in self.wanted if is_added(one) and one.kind == kind] for kind in _BEFORE_ADDITION
        )
        if attention or mlp:
            stream: list[torch.Tensor] = []

            def enter(_module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
                stream[:] = given[:1]

            def between(_module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
                self._weigh(attention, stream[0], given[0])
                stream[:] = given[:1]

            hooks.append(layer.register_forward_pre_hook(enter))
            hooks.append(layer.pre_mlp_layernorm.register_forward_pre_hook(between))
            hooks.append(layer.register_forward_hook(lambda _module, _given, out: self._weigh(mlp, stream[0], out[0])))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, name: str) -> Callable[..., None]:
        def keep(_module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            self.rows[name][self.number] = Inputs(_flat(given[0]).clone())

        return keep

    def _weigh(self, names: Sequence[str], before: torch.Tensor, after: torch.Tensor) -> None:
        square = _flat(after).float().square().mean(1, keepdim=True)
        weights = torch.where(square > 0, square.rsqrt(), 0)  # a norm makes nothing of zeros
        for name in names:
            residual = _flat(before).clone() if self.residuals else None
            self.rows[name][self.number] = replace(self.rows[name][self.number], weights=weights, residual=residual)


def _flat(states: torch.Tensor) -> torch.Tensor:
    return states.reshape(-1, states.shape[-1])


def _stop(_module: torch.nn.Module, _given: Any) -> None:
    raise Reached
