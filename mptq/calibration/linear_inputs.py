"""The inputs of a layer's linears, collected in the order in which the linears depend on each other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mptq.model.tensors import LinearSpec

_BEFORE_ADDITION = ("linear_proj", "linear_fc2")
"""Linears whose outputs are added to the residual stream."""


class Reached(BaseException):
    """Raised in a forward pass once all that was wanted has been seen: no error, and not to be caught as one."""


@dataclass
class LinearInputs:
    """Collects the inputs of the linears `wanted`, batch by batch; a pass ends where one of `later` would run.

    `rows` has, by module and number of the batch, the inputs [tokens, in] in their own dtype. Inputs of linears whose
    outputs are added to the residual stream are divided by its root mean square after the addition, as the next norm
    does: a token whose hidden state is large (an attention sink) would outweigh all others. Experts' inputs are not,
    because their order is not that of the tokens. Memory: the inputs of all tokens.
    """

    wanted: Sequence[LinearSpec]
    later: Collection[str]
    rows: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
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
        weighed = [linear.module for linear in self.wanted if linear.kind in _BEFORE_ADDITION and linear.expert is None]
        if weighed and self.wanted[0].kind == "linear_proj":
            hooks.append(layer.pre_mlp_layernorm.register_forward_pre_hook(lambda _, given: self._weigh(weighed, given[0])))
        elif weighed:
            hooks.append(layer.register_forward_hook(lambda _module, _given, out: self._weigh(weighed, out[0])))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, name: str) -> Callable[..., None]:
        def keep(_module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            self.rows[name][self.number] = given[0].reshape(-1, given[0].shape[-1]).clone()

        return keep

    def _weigh(self, names: Sequence[str], residual: torch.Tensor) -> None:
        square = residual.reshape(-1, residual.shape[-1]).float().square().mean(1, keepdim=True)
        weights = torch.where(square > 0, square.rsqrt(), 0)  # a norm makes nothing of zeros
        for name in names:
            rows = self.rows[name][self.number]
            self.rows[name][self.number] = (rows.float() * weights).to(rows.dtype)


def _stop(_module: torch.nn.Module, _given: Any) -> None:
    raise Reached
