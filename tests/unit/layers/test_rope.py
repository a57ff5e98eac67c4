"""Rotary angles against short independent references in float64."""

import math

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mptq.layers.rope import Positions, angles
from mptq.model.architectures.config_json import config_fields
from mptq.model.architectures.registry import nearest_family
from tests.support.models import ARGS, FAMILY_ARGS, LATENT, model

CPU = torch.device("cpu")


def plain(dim, base=5000.0):
    """Inverse frequencies [dim / 2]."""
    return base ** (-torch.arange(0, dim, 2).double() / dim)


def llama3(dim, base, factor):
    """Wavelengths above 8192 / 1 are stretched, those below 8192 / 4 are not, and those between are interpolated."""
    found = []
    for frequency in plain(dim, base).tolist():
        wave = 2 * math.pi / frequency
        share = min(1.0, max(0.0, (8192 / wave - 1) / (4 - 1)))
        found.append((1 - share) * frequency / factor + share * frequency)
    return torch.tensor(found, dtype=torch.float64)


def yarn(dim, base, factor, original, fast, slow, whole=True):
    """Dimensions with more than `fast` rotations in the original length stay, with less than `slow` are stretched."""

    def turning(times):
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = turning(fast), turning(slow)
    if whole:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2).double() - low) / (high - low)).clamp(0, 1)
    return plain(dim, base) * (1 - ramp) + plain(dim, base) / factor * ramp


def expected(frequencies, length=40, factor=1.0, interleaved=False):
    turns = torch.arange(length).double()[:, None] / factor * frequencies
    return turns.repeat_interleave(2, dim=1) if interleaved else torch.cat((turns, turns), dim=1)


YARN = {
    "position_embedding_type": "yarn",
    "rotary_scaling_factor": 32.0,
    "yarn_original_max_position_embeddings": 64,
    "kv_channels": 64,
    "rotary_base": 150000,
}


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, expected(plain(16))),
        ({"rotary_base": 1000000}, expected(plain(16, 1e6))),
        ({"rotary_percent": 0.5}, expected(plain(8))),
        ({"rotary_percent": 0.25, "kv_channels": 32}, expected(plain(8))),
        ({"rotary_interleaved": True}, expected(plain(16), interleaved=True)),
        ({"rotary_seq_len_interpolation_factor": 4}, expected(plain(16), factor=4)),
        ({"use_rope_scaling": True, "rope_scaling_factor": 8.0}, expected(llama3(16, 5000.0, 8))),
        (
            {"use_rope_scaling": True, "rope_scaling_factor": 32.0, "kv_channels": 128, "rotary_base": 500000},
            expected(llama3(128, 500000.0, 32)),
        ),
        (YARN, expected(yarn(64, 150000.0, 32, 64, 32, 1))),
        (YARN | {"yarn_correction_range_round_to_int": False}, expected(yarn(64, 150000.0, 32, 64, 32, 1, whole=False))),
        (YARN | {"yarn_beta_fast": 8, "yarn_beta_slow": 2}, expected(yarn(64, 150000.0, 32, 64, 8, 2))),
    ],
    ids=[
        "plain",
        "base",
        "half",
        "quarter",
        "interleaved",
        "interpolated",
        "llama3",
        "llama3-of-128",
        "yarn",
        "yarn-not-rounded",
        "yarn-of-other-turns",
    ],
)
def test_angles_by_hand(fields, wanted):
    found = angles(model(ARGS | fields), 40, CPU)
    assert (found.shape, found.dtype) == ((40, 1, 1, wanted.shape[1]), torch.float32)
    assert torch.allclose(found[:, 0, 0].double(), wanted, rtol=1e-5, atol=1e-6)


def test_references_differ_from_unscaled_angles():
    """Otherwise the tests above would prove nothing."""
    assert not torch.allclose(llama3(128, 500000.0, 32), plain(128, 500000.0), rtol=1e-3)
    assert not torch.allclose(yarn(64, 150000.0, 32, 64, 32, 1), plain(64, 150000.0), rtol=1e-3)
    whole, exact = yarn(64, 150000.0, 32, 64, 32, 1), yarn(64, 150000.0, 32, 64, 32, 1, whole=False)
    assert not torch.allclose(whole, exact, rtol=1e-3)
    assert not torch.allclose(yarn(64, 150000.0, 32, 64, 8, 2), whole, rtol=1e-3)


LONG = LATENT | {"max_position_embeddings": 163840, "original_max_position_embeddings": 4096, "qk_pos_emb_head_dim": 64}


def test_latent_attention_rotates_only_its_rotary_dimensions():
    config = model(LATENT | {"rope_type": "rope"})
    positions = Positions(config)
    hidden = torch.zeros(9, 2, 64)
    assert positions.get_rotary_seq_len(None, None, hidden) == 9
    found = positions(9)
    assert found.shape == (9, 1, 1, 8)
    assert torch.allclose(found[:, 0, 0].double(), expected(plain(8), 9), rtol=1e-5)


@pytest.mark.parametrize("mscale", [(1.0, 1.0), (1.0, 0.0), (0.707, 0.707), (1.0, 0.707)])
def test_yarn_of_latent_attention(mscale):
    """The factor of cosine and sine is the ratio of 0.1 * m * log(40) + 1 for both mscales."""
    config = model(LONG | {"mscale": mscale[0], "mscale_all_dim": mscale[1]})
    found, factor = Positions(config)(40)
    assert torch.allclose(found[:, 0, 0].double(), expected(yarn(64, 5000.0, 40, 4096, 32, 1)), rtol=1e-5, atol=1e-6)
    first, second = (0.1 * scale * math.log(40) + 1 for scale in mscale)
    assert float(factor) == pytest.approx(first / second)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Llama", {}),
        ("Llama", {"rotary_seq_len_interpolation_factor": 4}),
        ("Llama", {"use_rope_scaling": True, "kv_channels": 128, "rotary_base": 500000}),
        ("Mistral", {}),
        ("Qwen3", {"rotary_base": 1000000}),
        ("Llama", YARN),
        ("Qwen3", YARN | {"yarn_correction_range_round_to_int": False}),
        ("DeepSeek-V2", {"rotary_scaling_factor": 1.0, "mscale_all_dim": 1.0}),
        ("Nemotron", {}),
        ("DeepSeek-V3", {"max_position_embeddings": 163840, "qk_pos_emb_head_dim": 64}),
        ("DeepSeek-V2", {"max_position_embeddings": 163840, "qk_pos_emb_head_dim": 64, "mscale": 1.0, "mscale_all_dim": 1.0}),
    ],
)
def test_transformers_computes_the_same_angles_from_the_written_config(name, fields):
    config = model(FAMILY_ARGS[name] | fields)
    family = nearest_family(config)
    assert family.name == name
    hf = getattr(transformers, family.config_class)(**config_fields(config, family))
    if config.latent:
        hf.head_dim = config.latent.rotary_dim
    kind = hf.rope_parameters["rope_type"]
    if kind == "default":
        share = hf.rope_parameters.get("partial_rotary_factor", 1.0)
        turned = config.latent.rotary_dim if config.latent else int(config.head_dim * share)
        frequencies, factor = plain(turned, hf.rope_parameters["rope_theta"]), 1.0
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](hf, CPU)
    assert torch.allclose(angles(config, 40, CPU)[:, 0, 0].double(), expected(frequencies.double()), rtol=1e-5, atol=1e-6)
    if config.latent:
        assert float(Positions(config)(40)[1]) == pytest.approx(factor)
