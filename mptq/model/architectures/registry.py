"""The registry of architectures; to add one, add a row here. No torch."""

from __future__ import annotations

from mptq.model.architectures import (
    arcee,
    deepseek,
    gpt2,
    llama,
    mistral,
    mixtral,
    nemotron,
    nemotron_h,
    opt,
    qwen,
    starcoder2,
)
from mptq.model.architectures.family import PLAIN, Family
from mptq.model.config import ModelConfig

FAMILIES = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen.QWEN2,
    qwen.QWEN3,
    arcee.FAMILY,
    nemotron.FAMILY,
    opt.FAMILY,
    starcoder2.FAMILY,
    mixtral.FAMILY,
    qwen.QWEN2_MOE,
    qwen.QWEN3_MOE,
    deepseek.V3,
    deepseek.V2,
    nemotron_h.FAMILY,
)
"""In order of preference: a model is written as the first family that can express it."""

CONFIG_TYPES = gpt2.CONFIG_TYPES | {kind: found for family in FAMILIES for kind, found in family.config_types.items()}
"""`model_type` of config.json -> how it is read."""


def family_of(config: ModelConfig) -> Family | None:
    """Returns the first architecture that can express every feature of the model, or None."""
    return next((family for family in FAMILIES if not family.missing(config)), None)


def nearest_family(config: ModelConfig) -> Family:
    """Returns the architecture that lacks the fewest of the model's features, for the names of logical projections."""
    return family_of(config) or min(_alike(config), key=lambda family: len(family.missing(config)))


def _alike(config: ModelConfig) -> list[Family]:
    """Returns the architectures that have names for the model's modules."""
    kinds = {name for name in ("attention", "hybrid", "position") if config.features[name] not in PLAIN[name]}
    found = [family for family in FAMILIES if all(config.features[name] in family.expressed(name) for name in kinds)]
    return found or list(FAMILIES)
