"""How many tokens each expert of a layer saw, and static scales for those that saw too few to have their own."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mptq.model.tensors import LinearSpec


def observed(linears: Sequence[LinearSpec], static: Sequence[LinearSpec]) -> list[LinearSpec]:
    """Of a layer's `linears`, those whose inputs are observed: the `static` ones, and their like in every other expert.

    An expert that no token comes to has its scale from the others, also from those that need none themselves.
    """
    kinds = {linear.kind for linear in static if linear.expert is not None}
    return [linear for linear in linears if linear in static or (linear.expert is not None and linear.kind in kinds)]


class ExpertCoverage:
    """Tokens by expert of one layer, counted as they come into the expert's first linear."""

    def __init__(self, linears: Sequence[LinearSpec]) -> None:
        self.experts = [(linear.expert, linear) for linear in linears if linear.expert is not None]
        self.tokens: Counter[int] = Counter()

    @contextlib.contextmanager
    def counting(self, layer: torch.nn.Module) -> Iterator[None]:
        """Count what passes through `layer`; changes nothing of it."""
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
        """Count what each of the `ranks` has counted."""
        self.tokens = sum(ranks, Counter())

    def complete(self, amax: dict[str, torch.Tensor], minimum: int, static: Container[str]) -> dict[str, Any] | None:
        """Give the experts that saw fewer than `minimum` tokens, in `amax`, the largest magnitude of their layer's others.

        `amax` has the linears that were observed and saw a token, by module, and `static` those that have a scale: the others
        only lend theirs. Returns the report's row: tokens of each expert, and which of them got that. None for a layer
        without experts. Where no expert saw enough, the largest of all stands in; engines take the largest over experts
        anyway.
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
            if rich:  # else nothing is static here
                largest = torch.stack([amax[module] for module in rich]).max()
                needy = {module: expert for expert, module in alike if expert in poor and module in static}
                amax |= dict.fromkeys(needy, largest)
                fallback |= set(needy.values())
        return {"tokens": [self.tokens[expert] for expert in experts], "fallback": sorted(fallback)}
