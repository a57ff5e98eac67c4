from mptq.arch.config import from_args
from mptq.arch.naming import layer_copies, layer_linears
from tests.arch.test_config import ARGS, MOE_ARGS, TENSORS

CONFIG = from_args(ARGS, "args", TENSORS)
MOE = from_args(MOE_ARGS, "args", TENSORS)


def test_members_of_linears():
    qkv, proj, fc1, fc2 = layer_linears(CONFIG)
    assert qkv.shape == (128, 64)
    assert qkv.members == (
        ("self_attn.q_proj", (64, 64)),
        ("self_attn.k_proj", (32, 64)),
        ("self_attn.v_proj", (32, 64)),
    )
    assert (proj.shape, fc1.shape, fc2.shape) == ((64, 64), (192, 64), (64, 96))
    assert qkv.crosses(128)
    assert not qkv.fits((128, 128))
    assert not qkv.crosses(None)
    assert qkv.fits((1, 1))
    assert not proj.crosses(128)


def test_linears_and_copies_of_a_mixture():
    linears = layer_linears(MOE)
    assert len(linears) == 2 + 2 * 8
    fc1, fc2 = linears[-2:]
    assert (fc1.megatron, fc1.module) == ("mlp.experts.experts.7.linear_fc1", "mlp.experts.local_experts.7.linear_fc1")
    assert fc1.members == (("block_sparse_moe.experts.7.w1", (48, 64)), ("block_sparse_moe.experts.7.w3", (48, 64)))
    assert fc2.members == (("block_sparse_moe.experts.7.w2", (64, 48)),)
    router = layer_copies(MOE)[-1]
    assert (router.megatron, router.hf, router.hf_shape) == ("mlp.router.weight", "block_sparse_moe.gate.weight", (8, 64))
    assert all(linear.module == linear.megatron for linear in layer_linears(CONFIG))
