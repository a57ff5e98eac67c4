"""Results of the models of tests/support/zoo.py, and checks that a mistake would change them."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

from tests.support.zoo import VOCABULARY

BATCH = 4


class OnCpu(TorchFunctionMode):
    """Lets megatron-core create its masks, and the second table of tied embeddings, without the GPU that it requires."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@torch.no_grad()
def observe(model, ids):
    """Logits [batch, length, vocabulary] and hidden states [layers + 1, batch, length, hidden] of a whole model."""
    hidden = []

    def first(_module, _arguments, keywords):
        hidden.append(keywords["hidden_states"])

    def after(_module, _inputs, out):
        hidden.append(out[0] if isinstance(out, tuple) else out)

    hooks = [layer.register_forward_hook(after) for layer in model.decoder.layers]
    hooks.append(model.decoder.register_forward_pre_hook(first, with_kwargs=True))
    length = ids.shape[1]
    mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), 1)
    with OnCpu():
        logits = model(ids, torch.arange(length).expand(len(ids), -1), mask)
    for hook in hooks:
        hook.remove()
    return logits[..., :VOCABULARY].clone(), torch.stack(hidden).transpose(1, 2).contiguous()


@torch.no_grad()
def cached_latents(model, ids):
    """The values that engines cache per layer of latent attention: largest latent after its norm, largest rotated shared key.

    Float32 [layers, 2]. The shared key is the last part of every head's key.
    """
    found = torch.zeros(len(model.decoder.layers), 2)
    hooks = []
    for row, layer in zip(found, model.decoder.layers, strict=True):
        attention = layer.self_attention

        def normed(_module, _given, out, row=row):
            row[0] = out.abs().max()

        def rotated(_module, given, row=row, width=attention.config.qk_head_dim):
            row[1] = given[1][..., width:].abs().max()

        hooks.append(attention.kv_layernorm.register_forward_hook(normed))
        hooks.append(attention.core_attention.register_forward_pre_hook(rotated))
    observe(model, ids)
    for hook in hooks:
        hook.remove()
    return found


class OneHeadWrong:
    """While entered, the first head of every query is rotated with the frequencies in reverse order."""

    def __enter__(self):
        from megatron.core.transformer import attention, multi_latent_attention

        self.modules, self.right = (attention, multi_latent_attention), attention.apply_rotary_pos_emb
        for module in self.modules:
            module.apply_rotary_pos_emb = self.rotate

    def __exit__(self, *_exception):
        for module in self.modules:
            module.apply_rotary_pos_emb = self.right

    def rotate(self, states, frequencies, *args, **kwargs):
        out = self.right(states, frequencies, *args, **kwargs).clone()
        if states.shape[2] > 1:  # a single head may be a key shared by all
            half = frequencies.chunk(2, dim=-1)[0].flip(-1)
            out[:, :, :1] = self.right(states[:, :, :1], torch.cat([half, half], dim=-1), *args, **kwargs)
        return out


def divergence(logits, other):
    """Mean KL divergence of two models' next-token distributions, in nats."""
    p, q = logits.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def check_sensitive(model, ids, logits):
    """Check that wrong positions, or one head's decay instead of another's, change the logits; return the KL divergence."""
    shifted = {"learned_absolute": "embedding.position_embeddings.weight", "none": "decoder.layers.0.mixer.A_log"}
    if model.position_embedding_type in shifted:
        table = model.get_parameter(shifted[model.position_embedding_type]).data
        table.copy_(table.roll(1, 0))
        changed, _ = observe(model, ids)
        table.copy_(table.roll(-1, 0))
    else:
        with OneHeadWrong():
            changed, _ = observe(model, ids)
    found = divergence(logits, changed)
    assert found > 1e-3, f"a wrong rotation changes next words by {found} only"
    return found


class Routing:
    """While entered, records which experts each router chooses, and disturbs the routers' inputs by relative `noise`."""

    def __init__(self, model, noise=0.0):
        from megatron.core.transformer.moe.router import TopKRouter

        self.routers = [module for module in model.decoder.modules() if isinstance(module, TopKRouter)]
        self.noise, self.chosen = noise, []

    def __enter__(self):
        self.hooks = [router.register_forward_pre_hook(self.disturb) for router in self.routers]
        self.hooks += [router.register_forward_hook(self.keep) for router in self.routers]
        return self

    def __exit__(self, *_exception):
        for hook in self.hooks:
            hook.remove()

    def disturb(self, _module, inputs):
        return inputs[0] * (1 + self.noise * torch.randn_like(inputs[0])), *inputs[1:]

    def keep(self, _module, _inputs, out):
        self.chosen.append(out[1])


def moved_tokens(model, ids, noise):
    """Which tokens [batch, length] are routed to other experts if the routers' inputs are off by `noise`; experts' counts."""
    with Routing(model) as exact:
        observe(model, ids)
    moved = torch.zeros_like(ids, dtype=torch.bool)
    for trial in range(3):
        torch.manual_seed(trial)
        with Routing(model, noise) as disturbed:
            observe(model, ids)
        for right, other in zip(exact.chosen, disturbed.chosen, strict=True):
            moved |= (right != other).any(1).view(ids.shape[1], -1).T
    return moved, torch.stack(exact.chosen).sum(1)


def sentences(model, row):
    """Token ids [4, length] that no rounding routes to other experts."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (BATCH, row.length), generator=generator)
    if not model.config.num_moe_experts:
        return ids
    for _ in range(20):
        moved, counts = moved_tokens(model, ids, 0.03)
        if not moved.any():
            assert counts.min() > 0, f"experts without tokens: {counts}"
            return ids
        ids[moved] = torch.randint(0, VOCABULARY, (int(moved.sum()),), generator=generator)
    raise AssertionError("there are no sentences whose experts are sure")
