"""Checkpoints written by megatron-core's own code, in processes of their own: once a session."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"

# All that quantizes in blocks without crossing: head_dim 128, ffn a multiple of 128. Vocabulary padded from 500 to 512.
ALIGNED = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 500,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
# Blocks of the fused QKV cross heads (head_dim 64), and the MLP's 320 is no multiple of 128.
CROSSING = ALIGNED | {"head_dim": 64, "intermediate_size": 320, "num_hidden_layers": 2, "tie_word_embeddings": True}


def run(*command, **environment) -> subprocess.CompletedProcess:
    """Run a command; fail with its output when it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | environment, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def mptq(*arguments) -> subprocess.CompletedProcess:
    """Run the command line as a user does; the caller looks at its exit code."""
    return subprocess.run([sys.executable, "-m", "mptq", *map(str, arguments)], capture_output=True, text=True, check=False)


def make_checkpoint(hf: Path, out: Path, *options, processes: int = 1) -> Path:
    """Save the Hugging Face model `hf` as a Megatron checkpoint at `out`."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    run(*launcher, SCRIPTS / "make_checkpoint.py", "--hf", hf, "--out", out, *options, OMP_NUM_THREADS="1")
    return out


def make_llama(folder: Path, fields: dict, seed: int) -> Path:
    """A random Llama of a few layers in BF16, with one all-zero block and weights of many magnitudes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**fields))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.mul_(torch.exp2(torch.randint(-6, 3, (weight.shape[0], 1)).float()) / 2)
            if name.endswith("layers.0.mlp.gate_proj.weight"):
                weight[:128, :128] = 0
            if name.endswith("norm.weight"):
                weight.uniform_(0.5, 1.5)
    model.bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def aligned_hf(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("hf") / "aligned", ALIGNED, seed=1)


@pytest.fixture(scope="session")
def crossing_hf(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("hf") / "crossing", CROSSING, seed=2)


@pytest.fixture(scope="session")
def aligned(aligned_hf, tmp_path_factory) -> Path:
    """Megatron checkpoint of a model that blocks fit."""
    return make_checkpoint(aligned_hf, tmp_path_factory.mktemp("ckpt") / "aligned")


@pytest.fixture(scope="session")
def crossing(crossing_hf, tmp_path_factory) -> Path:
    """Megatron checkpoint of a model whose QKV blocks cross heads and whose MLP has ragged blocks."""
    return make_checkpoint(crossing_hf, tmp_path_factory.mktemp("ckpt") / "crossing")


@pytest.fixture(scope="session")
def quantized(aligned, crossing, tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Outputs in both formats, by model and recipe."""
    from mptq import Options, make_plan, run

    made = {}
    for name, checkpoint in (("aligned", aligned), ("crossing", crossing)):
        for recipe in ("fp8-blockwise", "fp8-per-channel", "fp8-per-tensor"):
            out = tmp_path_factory.mktemp("out") / f"{name}-{recipe}"
            run(make_plan(checkpoint, recipe, ("hf", "megatron")), out, Options(device="cpu"))
            made[name, recipe] = out
    return made


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> dict[int, Path]:
    """SmolLM2-135M-Instruct as Hugging Face directories: as it is (576 wide) and widened to 768."""
    folder = tmp_path_factory.mktemp("smollm2")
    for hidden in (576, 768):
        run(sys.executable, SCRIPTS / "smollm2.py", "--out", folder / str(hidden), "--hidden", hidden)
    return {hidden: folder / str(hidden) for hidden in (576, 768)}


@pytest.fixture(scope="session")
def smollm2_checkpoints(smollm2, tmp_path_factory) -> dict[int, Path]:
    """The same as Megatron checkpoints."""
    folder = tmp_path_factory.mktemp("smollm2-ckpt")
    return {hidden: make_checkpoint(hf, folder / str(hidden)) for hidden, hf in smollm2.items()}


def files(root: Path) -> dict[str, bytes]:
    """Every file below a directory with its content."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())
