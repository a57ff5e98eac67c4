"""Checkpoints that mptq cannot quantize: `quantize` and `inspect` give the same reason."""

import pytest
import torch

from mptq import inspect, make_plan
from mptq.errors import CheckpointError
from tests.conftest import mptq
from tests.support.synthetic_checkpoints import Maker

QKV = "decoder.layers.self_attention.linear_qkv"
BASE = {
    "embedding.word_embeddings.weight": (512, 16),
    f"{QKV}.weight": (2, 48, 16),
    "output_layer.weight": (512, 16),
}
ADAPTER = {f"{QKV}.adapter.linear_in.weight": (2, 4, 16), f"{QKV}.adapter.linear_out.weight": (2, 48, 4)}
MOMENT = {f"optimizer.state.exp_avg.{name}": shape for name, shape in ADAPTER.items()}
MERGE = "has LoRA adapters: merge them first (Megatron-Bridge's merge_lora.py, NeMo's llm.peft.merge_lora);"
ADAPTERS = {
    "beside a base": (BASE | ADAPTER | MOMENT, f"adapter tensors: 2, the first {QKV}.adapter.linear_in.weight"),
    "alone": (ADAPTER, f"adapter tensors: 2, the first {QKV}.adapter.linear_in.weight"),
    "wrapped": (
        {name.replace("qkv.weight", "qkv.to_wrap.weight"): shape for name, shape in BASE.items()} | ADAPTER,
        f"adapter tensors: 3, the first {QKV}.to_wrap.weight",
    ),
    "canonical": (
        BASE | {f"{QKV}.adapter.adapter_{name}.linear_in.weight": (2, 4, 16) for name in "qkv"},
        f"adapter tensors: 3, the first {QKV}.adapter.adapter_q.linear_in.weight",
    ),
    "peft": (BASE | {f"{QKV}.lora_A.weight": (2, 4, 16)}, f"adapter tensors: 1, the first {QKV}.lora_A.weight"),
}


def made(root, shapes):
    maker = Maker()
    for name, shape in shapes.items():
        maker.tensor(name, torch.zeros(shape, dtype=torch.bfloat16))
    return maker.write(root)


def reason(directory):
    """Returns the reason that `quantize` gives, after checking that `inspect` gives the same."""
    with pytest.raises(CheckpointError) as failure:
        make_plan(directory, "fp8-blockwise")
    text = str(failure.value)
    assert inspect(directory)[0]["problem"] == text.replace(str(directory), "it")
    return text.removeprefix(f"{directory} ")


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_must_be_merged_first(kind, tmp_path):
    shapes, found = ADAPTERS[kind]
    assert reason(made(tmp_path, shapes)) == f"{MERGE} {found}"


@pytest.mark.parametrize(
    ("name", "rows"), [("output_layer.weight", 1), ("output_layer.weight", 5), ("value_head.weight", 1), ("rm_head.weight", 1)]
)
def test_other_heads_are_named(name, rows, tmp_path):
    base = {key: shape for key, shape in BASE.items() if key != "output_layer.weight"}
    assert reason(made(tmp_path, base | {name: (rows, 16)})) == (
        f"has a value, reward or classification head ({name} [{rows}, 16]) instead of an output layer over the vocabulary: "
        "mptq quantizes language models only"
    )


def test_the_command_line_prints_one_line(tmp_path):
    directory = made(tmp_path, BASE | ADAPTER)
    done = mptq("quantize", directory, "--recipe", "fp8-blockwise")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"mptq: {directory} {MERGE}")
    assert mptq("inspect", directory).stdout.splitlines()[1].startswith(f"cannot be quantized: it {MERGE}")
