"""The forward pass: embedding, a single layer with its rotary angles, final norm and output layer, called separately.

The arithmetic is megatron-core's (models/gpt/gpt_model.py).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from mptq.layers.norm import Norm
from mptq.layers.rope import angles
from mptq.layers.transformer_config import transformer_config

if TYPE_CHECKING:
    from mptq.model.config import ModelConfig


def embed(ids: torch.Tensor, tables: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the hidden states [..., length, hidden] of token ids int64 [..., length].

    `tables` are the word embeddings [vocabulary, hidden] and, if the model has any, the position embeddings
    [positions, hidden].
    """
    words, *positions = tables
    states = torch.nn.functional.embedding(ids, words)
    for table in positions:
        states = states + table[: ids.shape[-1]]
    return states


@contextlib.contextmanager
def _in_fixed_order() -> Iterator[None]:
    """Makes runs on a GPU repeatable: by default megatron-core adds the outputs of a token's experts in any order there.

    torch warns instead of failing for matrix products, which vary only where several streams share a workspace.
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
def run_layer(layer: torch.nn.Module, config: ModelConfig, hidden: torch.Tensor) -> torch.Tensor:
    """Runs a layer on hidden states [sequences, length, hidden]; each sequence is separate, from position 0 on."""
    rotary = None
    if config.get("position_embedding_type") in ("rope", "yarn") and not config.latent:
        rotary = angles(config, hidden.shape[1], hidden.device)
    with _in_fixed_order() if hidden.is_cuda else contextlib.nullcontext():
        # Megatron's layout is [length, sequences, hidden].
        out: torch.Tensor = layer(hidden.transpose(0, 1).contiguous(), attention_mask=None, rotary_pos_emb=rotary)[0]
    return out.transpose(0, 1)


def weigh_output(expert: torch.nn.Module) -> None:
    """Makes the router's weights multiply the output of an expert instead of the input of its second linear.

    Engines and transformers (modeling_mixtral.py) apply them to the output, megatron-core (transformer/mlp.py) to the
    input. The results are the same up to rounding, but the scale of the second linear's input is not.
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
    """Applies the final norm to hidden states [tokens, hidden]; `weights` are its weight and, if any, bias [hidden]."""
    module = Norm(transformer_config(config), config.hidden_size, eps=config.norm_epsilon)
    for name, weight in zip(("weight", "bias"), weights, strict=False):
        setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
    out: torch.Tensor = module(hidden)
    return out


@torch.no_grad()
def logits(states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Returns the float32 logits [tokens, vocabulary] of the outputs [tokens, hidden] of `final_norm`.

    `head` float32 [vocabulary, hidden] is the output layer's weight without vocabulary padding. Logits are not rounded
    to the model's dtype, so that rounding does not add to the difference between two models.
    """
    return torch.nn.functional.linear(states.float(), head)
