"""Run the streams of activations as the pipeline does, and build transformers' models from the outputs."""

import math
from dataclasses import replace

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoConfig, AutoModelForCausalLM

from mptq.calibration.hidden_state_pair import HiddenStateOptions, HiddenStatePair
from mptq.calibration.tokens import TokenData
from mptq.layers.forward import final_norm, logits
from mptq.pipeline.context import RunContext
from mptq.pipeline.layer_stream import LayerStream
from mptq.plan.plan import Plan
from mptq.quantize.fp8 import dequantize
from mptq.report.run_log import RunLog, Silent
from mptq.types import Fp8Weight

CPU = torch.device("cpu")
MODELS = ["aligned", "crossing", "mixtral"]
IDS = torch.randint(0, 500, (6, 12), generator=torch.Generator().manual_seed(5))
"""Six sequences of twelve tokens."""
OTHERS = torch.randint(0, 500, (4, 10), generator=torch.Generator().manual_seed(6))
"""Four sequences of ten tokens, for calibration."""


class Kept(HiddenStatePair):
    """The streams, which also keep the hidden states before the final norm, and the logits computed from them."""

    def finish(self, norm, head):
        self.hidden = [stream.states.clone() for stream in (self.reference, self.quantized)]
        self.norm, self.head = norm, head
        weight = head[: self.config.vocab_size].float()
        self.logits = [logits(final_norm(states, norm, self.config), weight) for states in self.hidden]
        return super().finish(norm, head)


class Driven:
    """A plan, run as in the pipeline: the tensors of all outputs, the log, the streams."""

    def __init__(self, plan, tokens, folder, memory=10**9, batch_size=2, kind=Kept):
        self.log, self.tensors = RunLog(), {form: {} for form in plan.formats}
        self.streams = kind(plan, tokens, HiddenStateOptions(CPU, batch_size, memory, folder, 0))
        for output in LayerStream(RunContext(plan, CPU, self.log, Silent(), self.streams)).outputs():
            for form, tensors in output.tensors.items():
                self.tensors[form] |= tensors


def tokens_of(held_out, calibration=()):
    """Rows of ids as sequences."""
    return TokenData(*(tuple(row.numpy() for row in rows) for rows in (calibration, held_out, ())), {})


def float32(plan):
    """The same plan for a model that computes in float32."""
    return Plan(replace(plan.source, model=replace(plan.model, dtype="float32")), plan.recipe, plan.formats)


def weights_of(tensors, scheme):
    """The Hugging Face output in float32, dequantized by the test, and its scales of activations."""
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(("_scale", "_scale_inv"))}
    weights = {}
    for name in tensors.keys() - scales.keys():
        scale = scales.pop(f"{name}_scale", scales.pop(f"{name}_scale_inv", None))
        weights[name] = tensors[name].float() if scale is None else dequantize(Fp8Weight(tensors[name], scale), scheme)
    return weights, scales


def transformers_model(folder, weights):
    """A float32 model of transformers, with the config at `folder`."""
    config = AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, *config.architectures)
    return cls.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32).eval()


@torch.no_grad()
def logits_of(model, ids):
    """Logits [tokens, vocabulary] of rows of ids."""
    return model(ids).logits.flatten(0, 1)


def source_logits(folder):
    """transformers' float32 logits of the weights at `folder` on `IDS`."""
    return logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), IDS)


def check_fidelity(found, reference, quantized, close=1e-3):
    """Check the metrics against those computed from transformers' logits of both models, in float64."""
    following = IDS[:, 1:].flatten()
    left, right = (part.double().unflatten(0, IDS.shape)[:, :-1].flatten(0, 1) for part in (reference, quantized))
    kl = kl_div(right.log_softmax(-1), left.log_softmax(-1), reduction="batchmean", log_target=True)
    losses = [float(cross_entropy(part, following)) for part in (left, right)]
    assert (found["tokens"], found["sequences"]) == (following.numel(), len(IDS))
    # Float32 logarithms of about 6: half a unit in the last place is 2.4e-7 per token, of either sign.
    assert found["kl"]["mean"] == pytest.approx(float(kl), rel=close, abs=1e-7)
    assert found["perplexity"]["reference"] == pytest.approx(math.exp(losses[0]), rel=close / 10)
    assert found["perplexity"]["quantized"] == pytest.approx(math.exp(losses[1]), rel=close / 10)
    assert found["perplexity"]["ratio"] == pytest.approx(math.exp(losses[1] - losses[0]), rel=close / 10)
    assert found["top1_agreement"]["mean"] == float((left.argmax(-1) == right.argmax(-1)).double().mean())


def largest_inputs(driven):
    """The input scales of the Hugging Face output by Megatron's module, and the scales of K and V."""
    plan, found, cache = driven.streams.plan, {}, {}
    for layer in range(plan.model.num_layers):
        for part in plan.linears(layer):
            scales = {float(driven.tensors["hf"][f"model.layers.{layer}.{member}.input_scale"]) for member in part.hf}
            assert len(scales) == 1
            found[f"layers.{layer}.{part.module}"] = scales.pop()
        for kind in ("key", "value"):
            scale = driven.tensors["hf"].get(f"model.layers.{layer}.self_attn.{kind[0]}_proj.{kind[0]}_scale")
            cache[f"layers.{layer}.self_attention.core_attention.{kind}"] = scale
    return found, cache
