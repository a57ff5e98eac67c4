"""What surrounds the layers in the forward pass: embedding, rotary angles, final norm and output layer, one piece at a time.

The arithmetic is megatron-core's (models/gpt/gpt_model.py); hidden states are [tokens, hidden], sequences end to end.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from mptq.layers.rope import angles
from mptq.layers.transformer_layer import Norm, transformer_config

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from mptq.model.config import ModelConfig


def embed(ids: torch.Tensor, tables: Sequence[torch.Tensor]) -> torch.Tensor:
    """Hidden states [..., length, hidden] of token ids int64 [..., length].

    `tables` are the embedding of words [vocabulary, hidden], and that of positions [positions, hidden] where there is one.
    """
    words, *positions = tables
    states = torch.nn.functional.embedding(ids, words)
    for table in positions:
        states = states + table[: ids.shape[-1]]
    return states


@contextlib.contextmanager
def _in_one_order() -> Iterator[None]:
    """On a GPU, megatron-core adds up what the experts of a token make in any order, unless torch is told to repeat itself.

    It is asked to warn only, of matrix products, which differ where several streams share a workspace: here is one.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@torch.no_grad()
def run_layer(layer: TransformerLayer, config: ModelConfig, hidden: torch.Tensor) -> torch.Tensor:
    """One layer on hidden states [sequences, length, hidden], every sequence on its own from position 0."""
    rotary = None
    if config.get("position_embedding_type") in ("rope", "yarn") and not config.latent:
        rotary = angles(config, hidden.shape[1], hidden.device)
    with _in_one_order() if hidden.is_cuda else contextlib.nullcontext():
        # Megatron's order is [length, sequences, hidden].
        out: torch.Tensor = layer(hidden.transpose(0, 1).contiguous(), attention_mask=None, rotary_pos_emb=rotary)[0]
    return out.transpose(0, 1)


def weigh_output(expert: torch.nn.Module) -> None:
    """Let the router's weights multiply what an expert of a layer hands on, and no longer the input of its second linear.

    The first is where engines have them (and transformers: modeling_mixtral.py), the second megatron-core (transformer/mlp.py).
    But for rounding it is the same, and not to a scale of the second linear's input.
    """
    kept: list[torch.Tensor] = []

    def take(_expert: torch.nn.Module, arguments: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, None]:
        states, weights = arguments
        kept.append(weights)
        return states, None

    def apply(_expert: torch.nn.Module, _arguments: Any, out: tuple[torch.Tensor, None]) -> tuple[torch.Tensor, None]:
        states, bias = out
        return (states * kept.pop()[:, None]).to(states.dtype), bias

    expert.register_forward_pre_hook(take)
    expert.register_forward_hook(apply)


@torch.no_grad()
def final_norm(hidden: torch.Tensor, weights: Sequence[torch.Tensor], config: ModelConfig) -> torch.Tensor:
    """Hidden states [tokens, hidden] after the final norm, whose weight, and bias where it has one, are `weights` [hidden]."""
    module = Norm(transformer_config(config), config.hidden_size, eps=config.norm_epsilon)
    for name, weight in zip(("weight", "bias"), weights, strict=False):
        setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
    out: torch.Tensor = module(hidden)
    return out


@torch.no_grad()
def logits(states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Float32 logits [tokens, vocabulary] of `final_norm`'s states [tokens, hidden].

    `head` float32 [vocabulary, hidden] is the output layer's weight without the padding of the vocabulary. The logits are not
    rounded to the model's dtype, so that the difference of two models is theirs alone.
    """
    return torch.nn.functional.linear(states.float(), head)
