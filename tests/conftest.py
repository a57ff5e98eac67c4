"""Checkpoints written by megatron-core's own code, in separate processes, once per session for all workers."""

import gc
import itertools
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.processes import checked, python
from tests.support.sharing import Outputs, Shared
from tests.support.zoo import Builder

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"

# For all property tests: no time limit, since the machine may be busy, and the same examples in every CI run.
settings.register_profile(
    "mptq",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("mptq")

# Everything quantizes in blocks without crossing: head_dim 128, ffn a multiple of 128. Vocabulary padded from 500 to 512.
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
# A mixture of experts whose sizes fit blocks.
MIXTRAL = ALIGNED | {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
# Blocks of the fused QKV cross heads (head_dim 64), and the MLP's 320 is not a multiple of 128.
CROSSING = ALIGNED | {"head_dim": 64, "intermediate_size": 320, "num_hidden_layers": 2, "tie_word_embeddings": True}


def run(*command, **environment) -> subprocess.CompletedProcess:
    """Run a command; fail with its output if it fails."""
    command = list(map(str, command))
    return checked(subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False))


def mptq(*arguments, **options) -> subprocess.CompletedProcess:
    """Run the command line as a user does, with the options of `python`; the caller checks its exit code."""
    return python("-m", "mptq", *arguments, **options)


def make_checkpoint(hf: Path, out: Path, *options, processes: int = 1) -> Path:
    """Save the Hugging Face model `hf` as a Megatron checkpoint at `out`."""
    checked(python(SCRIPTS / "make_checkpoint.py", "--hf", hf, "--out", out, *options, processes=processes))
    return out


def spread(model) -> None:
    """Give the weights of a random model magnitudes over a wide range."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.mul_(torch.exp2(torch.randint(-6, 3, (*weight.shape[:-1], 1)).float()) / 2)
            if name.endswith("norm.weight"):
                weight.uniform_(0.5, 1.5)


def make_llama(folder: Path, fields: dict, seed: int) -> Path:
    """A random Llama of a few layers in BF16, with one all-zero block and weights over a wide range of magnitudes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**fields))
    spread(model)
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[:128, :128] = 0
    model.bfloat16().save_pretrained(folder)
    return folder


def make_mixtral(folder: Path, fields: dict, seed: int) -> Path:
    """A random Mixtral in BF16, made in the same way, whose experts are chosen by wide margins.

    Routing is discontinuous: with narrow margins, rounding routes a token to another expert. So the first coordinates of each
    token's embedding are large and determine its experts, and every router reads them.
    """
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    model = MixtralForCausalLM(MixtralConfig(**fields))
    spread(model)
    experts = fields["num_local_experts"]
    with torch.no_grad():
        orders = torch.rand(fields["vocab_size"], experts).argsort(dim=1).float() - (experts - 1) / 2
        model.model.embed_tokens.weight[:, :experts] = orders
        for layer in model.model.layers:
            layer.mlp.gate.weight.mul_(0.1)[:, :experts] += torch.eye(experts) / 5
            layer.post_attention_layernorm.weight[:experts] = 1
        model.model.layers[0].mlp.experts.gate_up_proj[1, :128, :128] = 0
    model.bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id) -> Shared:
    """`shared(name, make)` is a folder that is made once, whichever worker needs it first; no test may change it."""
    base = tmp_path_factory.getbasetemp()
    return Shared((base if worker_id == "master" else base.parent) / "shared")


@pytest.fixture(scope="module", autouse=True)
def fast_collections() -> None:
    """Collections of a run, one per layer, skip what was imported before: else each takes 0.3 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def aligned_hf(shared) -> Path:
    return shared("hf/aligned", lambda folder: make_llama(folder, ALIGNED, seed=1))


@pytest.fixture(scope="session")
def crossing_hf(shared) -> Path:
    return shared("hf/crossing", lambda folder: make_llama(folder, CROSSING, seed=2))


@pytest.fixture(scope="session")
def aligned(aligned_hf, shared) -> Path:
    """Megatron checkpoint of a model whose sizes fit blocks."""
    return shared("ckpt/aligned", lambda folder: make_checkpoint(aligned_hf, folder))


@pytest.fixture(scope="session")
def crossing(crossing_hf, shared) -> Path:
    """Megatron checkpoint of a model whose QKV blocks cross heads and whose MLP has ragged blocks."""
    return shared("ckpt/crossing", lambda folder: make_checkpoint(crossing_hf, folder))


RECIPES = ("fp8", "fp8-blockwise", "fp8-per-channel", "fp8-per-tensor", "mxfp8")


@pytest.fixture(scope="session")
def tokens(shared) -> Path:
    """Megatron's indexed dataset of random ids below 500: data without a tokenizer."""
    import numpy as np

    from tests.unit.calibration.conftest import write_indexed

    draw = np.random.default_rng(0)
    documents = [[draw.integers(0, 500, draw.integers(20, 60)).tolist()] for _ in range(40)]

    def make(folder):
        folder.mkdir()
        write_indexed(folder / "random", documents)

    return shared("tokens", make) / "random"


@pytest.fixture(scope="session")
def options(tokens):
    """Options of the test runs: few and short sequences."""
    from mptq import Options
    from mptq.calibration.datasets.options import DataOptions

    data = DataOptions((str(tokens),), calib_size=6, eval_size=3, seq_length=32)
    return Options(device="cpu", data=data, batch_size=4)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    """A tokenizer of fewer than 500 words, with a generation config next to it."""
    from tests.unit.calibration.conftest import make_tokenizer

    folder = make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "words")
    (folder / "generation_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def quantized(aligned, crossing, options, shared) -> Mapping[tuple[str, str], Path]:
    """Outputs in both formats, by model and recipe; the crossing model's have scales for an FP8 cache."""
    from mptq import make_plan, run
    from mptq.recipes.recipe import load_recipe

    checkpoints = {"aligned": aligned, "crossing": crossing}

    def make(key):
        name, recipe = key
        changed = load_recipe(recipe).changed(kv_cache="fp8" if name == "crossing" else "none")
        plan = make_plan(checkpoints[name], changed, ("hf", "megatron"))
        return shared(f"out/{name}-{recipe}", lambda out: run(plan, out, options))

    return Outputs(itertools.product(checkpoints, (*RECIPES, "fp8-blockwise-ue8m0")), make)


@pytest.fixture(scope="session")
def mixtral_hf(shared) -> Path:
    return shared("hf/mixtral", lambda folder: make_mixtral(folder, MIXTRAL, seed=3))


@pytest.fixture(scope="session")
def mixtral(mixtral_hf, shared) -> Path:
    """Megatron checkpoint of a mixture of experts."""
    return shared("ckpt/mixtral", lambda folder: make_checkpoint(mixtral_hf, folder))


@pytest.fixture(scope="session")
def quantized_mixtral(mixtral, options, shared) -> Mapping[str, Path]:
    """Outputs of the mixture of experts in both formats, by recipe."""
    from mptq import make_plan, run

    def make(recipe):
        plan = make_plan(mixtral, recipe, ("hf", "megatron"))
        return shared(f"out/mixtral-{recipe}", lambda out: run(plan, out, options))

    return Outputs(("fp8", "fp8-blockwise", "fp8-per-channel", "fp8-per-tensor"), make)


@pytest.fixture(scope="session")
def smollm2(shared) -> Mapping[int, Path]:
    """SmolLM2-135M-Instruct as Hugging Face directories: unchanged (576 wide) and widened to 768."""

    def make(hidden):
        script = SCRIPTS / "smollm2.py"
        return shared(f"hf/smollm2-{hidden}", lambda folder: checked(python(script, "--out", folder, "--hidden", hidden)))

    return Outputs((576, 768), make)


@pytest.fixture(scope="session")
def smollm2_checkpoints(smollm2, shared) -> Mapping[int, Path]:
    """The same as Megatron checkpoints."""

    def make(hidden):
        return shared(f"ckpt/smollm2-{hidden}", lambda folder: make_checkpoint(smollm2[hidden], folder))

    return Outputs((576, 768), make)


@pytest.fixture(scope="session")
def zoo(shared) -> Builder:
    """`zoo(name)` returns the folder of a tiny model of tests/support/zoo.py, built by megatron-core: checkpoint and logits."""
    return Builder(shared)


def files(root: Path) -> dict[str, bytes]:
    """Every file below a directory with its content."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def pytest_collection_modifyitems(items):
    """Put files with long tests first: a worker takes whole files, and the last ones should be short."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)
