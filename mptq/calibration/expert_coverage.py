"""Counts the tokens routed to each expert of a layer, and provides static scales for experts that saw too few."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mptq.model.tensors import LinearSpec


def observed(linears: Sequence[LinearSpec], static: Sequence[LinearSpec]) -> list[LinearSpec]:
    """Returns the `linears` of a layer whose inputs are observed: the `static` ones, and that linear in all experts.

    An expert to which no token is routed gets its scale from the others, including those that need no scale themselves.
    """
    kinds = {linear.kind for linear in static if linear.expert is not None}
    return [linear for linear in linears if linear in static or (linear.expert is not None and linear.kind in kinds)]


class ExpertCoverage:
    """Tokens per expert of one layer, counted at the input of the expert's first linear."""

    def __init__(self, linears: Sequence[LinearSpec]) -> None:
        self.experts = [(linear.expert, linear) for linear in linears if linear.expert is not None]
        self.tokens: Counter[int] = Counter()

    @contextlib.contextmanager
    def counting(self, layer: torch.nn.Module) -> Iterator[None]:
        """Counts the tokens that pass through `layer`, without changing them."""
        first = dict(reversed(self.experts))
        hooks = [
            layer.get_submodule(linear.module).register_forward_pre_hook(self._counter(expert))
            for expert, linear in first.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _counter(self, expert: int) -> Any:
        def count(_module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            states = arguments[0]
            self.tokens[expert] += states.numel() // states.shape[-1]

        return count

    def join(self, ranks: Sequence[Counter[int]]) -> None:
        """Replaces the counts with the sum of the counts of all `ranks`."""
        self.tokens = sum(ranks, Counter())

    def complete(self, amax: dict[str, torch.Tensor], minimum: int, static: Container[str]) -> dict[str, Any] | None:
        """Gives experts that saw fewer than `minimum` tokens the largest amax of the layer's other experts.

        `amax`, updated in place, has the magnitudes of the observed linears that saw a token, by module. Only the
        modules in `static` get a scale; the others only contribute to the maximum. If no expert saw enough tokens, the
        maximum is over all of them; engines take the largest over experts anyway. Returns the report's row (tokens of
        each expert, and the experts that got the maximum), or None for a layer without experts.
        """
        if not self.experts:
            return None
        experts = sorted({expert for expert, _ in self.experts})
        poor = {expert for expert in experts if self.tokens[expert] < max(1, minimum)}
        fallback: set[int] = set()
        for kind in {linear.kind for _, linear in self.experts}:
            alike = [(expert, linear.module) for expert, linear in self.experts if linear.kind == kind]
            seen = [(expert, module) for expert, module in alike if module in amax]
            rich = [module for expert, module in seen if expert not in poor] or [module for _, module in seen]
            if rich:  # otherwise linears of this kind are not observed, or saw no token
                largest = torch.stack([amax[module] for module in rich]).max()
                needy = {module: expert for expert, module in alike if expert in poor and module in static}
                amax |= dict.fromkeys(needy, largest)
                fallback |= set(needy.values())
        return {"tokens": [self.tokens[expert] for expert in experts], "fallback": sorted(fallback)}
