"""On a GPU: the bytes that a CPU writes, and figures that are close to its own."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from torch.distributed import HashStore

from mptq import make_plan, run
from mptq.calibration.datasets.options import DataOptions
from mptq.calibration.linear_inputs import Inputs
from mptq.calibration.moments import Batches, moments
from mptq.distributed import Ranks
from mptq.formats import FORMATS
from mptq.quantize import cpu_kernels, quantizer, torch_kernels
from mptq.quantize.activation_quantizers import ActivationQuantizer
from mptq.quantize.fp8 import dequantize, first_out_of_bound, floored, powers_of_two, reference_scale, scale_of
from mptq.quantize.modelopt import E4M3
from mptq.quantize.rounding.rounder import Rounder
from mptq.recipes.recipe import load_recipe
from mptq.recipes.schemes import SCHEMES
from mptq.report import read
from mptq.verification.structure import verify
from tests.conftest import ROOT, mptq
from tests.integration.test_resume import BOTH, PLAIN, stopped, whole
from tests.support.killing import check, contents

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False")

GPU = "cuda:0"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["block", "row", "tensor", "mx"]


def equal(one, other):
    """The same dtype, shape and bytes, on whatever devices."""
    one, other = (part.cpu().contiguous() for part in (one, other))
    same = (one.dtype, one.shape) == (other.dtype, other.shape)
    return same and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def every_number(dtype):
    """Every finite number of a 16-bit format; of float32 those halfway between two of E4M3 and their neighbors, either sign."""
    if dtype is not torch.float32:
        numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
        return numbers[numbers.isfinite()]
    bits = torch.arange(0x3A000000, 0x44000001, 0x80000, dtype=torch.int32)  # 2^-11 to 512 by half a unit of E4M3
    numbers = torch.cat([bits - 1, bits, bits + 1]).view(torch.float32)
    return torch.cat([numbers, -numbers])


def matrices(dtype):
    """Weights by name: of every number, near the ends of the format, of many magnitudes, of shapes that blocks do not fit."""
    torch.manual_seed(0)
    numbers = every_number(dtype)
    ends = torch.finfo(dtype)
    scaled_by_one = numbers[numbers.abs() <= 448][: 32 * (len(numbers[numbers.abs() <= 448]) // 32)].view(-1, 32).clone()
    scaled_by_one[:, 0] = 448  # every row, block and the whole have the scale 1: halves are halves
    found = {
        "every number": numbers[: 256 * (len(numbers) // 256)].view(-1, 256),
        "scale 1": scaled_by_one,
        "subnormal": (torch.randn(130, 96) * ends.smallest_normal / 4).to(dtype),
        "largest": ((torch.rand(130, 96) * 2 - 1) * ends.max).to(dtype),
        "zeros": torch.zeros(130, 96, dtype=dtype),
        "next to nothing": (torch.randn(140, 160) * 2.0**-45).to(dtype),
    }
    for rows, columns in ((1, 32), (1, 1), (127, 33), (129, 257), (300, 704), (1000, 4096), (5000, 4096)):
        weight = torch.randn(rows, columns) * torch.exp2(torch.randint(-12, 9, (rows, 1)).float())
        weight[: rows // 3, : columns // 3] = -0.0
        found[f"{rows} x {columns}"] = weight.to(dtype)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantized_weights_are_those_of_the_cpu(dtype, kind):
    scheme = SCHEMES[kind]
    for name, weight in matrices(dtype).items():
        if not weight.shape[1] % (32 if kind == "mx" else 1):
            check_weight(name, weight, scheme)


def check_weight(name, weight, scheme):
    """Bytes, scales and magnitudes to the bit; sums of errors to the order of their terms."""
    (ours, error), (theirs, expected) = (quantizer.quantize(one, scheme, "w") for one in (weight.to(GPU), weight))
    assert ours.data.is_cuda
    assert equal(ours.data, theirs.data), name
    assert equal(ours.scale, theirs.scale), name
    assert (ours.amax is None) == (theirs.amax is None)
    assert ours.amax is None or equal(ours.amax, theirs.amax), name
    left, right = ({key: part for key, part in asdict(one).items() if part is not None} for one in (error, expected))
    sums = ("relative", "norm", "sqnr_db")
    assert {key: left[key] for key in left if key not in sums} == {key: right[key] for key in right if key not in sums}, name
    assert {key: left[key] for key in left if key in sums} == pytest.approx(
        {key: right[key] for key in right if key in sums}, rel=1e-9
    ), name
    assert equal(dequantize(ours, scheme), dequantize(theirs, scheme)), name
    assert equal(reference_scale(weight.to(GPU), scheme), theirs.scale), name
    assert first_out_of_bound(weight.to(GPU), ours, scheme) == first_out_of_bound(weight, theirs, scheme), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_casts_and_magnitudes_are_those_of_the_compiled_loops(dtype):
    """Whatever the scale, what is beyond 448 times it too."""
    numbers = every_number(dtype)[None]
    for scale in (1.0, 1.0 / 3, 2.0**-39, 2.0**20):
        out = [torch.empty(numbers.shape, dtype=torch.float8_e4m3fn, device=device) for device in (GPU, "cpu")]
        one = torch.full((1, 1), scale)
        torch_kernels.cast(numbers.to(GPU), one.to(GPU), (1, numbers.numel()), out[0])
        cpu_kernels.cast(numbers, one, (1, numbers.numel()), out[1])
        assert equal(*out), scale
    matrix = matrices(dtype)["300 x 704"]
    for cell in ((1, 704), (128, 128), (300, 704), (7, 32)):
        assert equal(torch_kernels.magnitudes(matrix.to(GPU), *cell), cpu_kernels.magnitudes(matrix, *cell))
    assert equal(quantizer.amax_of(matrix.to(GPU), "w"), quantizer.amax_of(matrix, "w"))


def test_scales_are_those_of_the_cpu():
    """A million magnitudes, every E8M0 byte that is stored, and the magnitudes at which MX takes the next one."""
    amax = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)) * torch.exp2(torch.arange(1 << 20) % 80 - 60.0)
    assert equal(scale_of(amax.to(GPU)), scale_of(amax))
    assert equal(floored(amax.to(GPU)), floored(amax))
    stored = torch.arange(127 - 39, 255, dtype=torch.uint8)
    assert equal(powers_of_two(stored.to(GPU)), powers_of_two(stored))
    edges = 448 * torch.exp2(torch.arange(-50, 119).float())
    edges = torch.cat([edges, torch.nextafter(edges, torch.tensor(torch.inf)), torch.nextafter(edges, torch.tensor(0.0))])
    assert equal(quantizer.mx.scale(edges.to(GPU)), quantizer.mx.scale(edges))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_not_finite_are_found(kind, value):
    weight = torch.randn(300, 160, device=GPU).bfloat16()
    weight[150, 7] = value
    with pytest.raises(quantizer.CheckpointError, match=r"^w \[300, 160\] has 1 values .* first at \[150, 7\]$"):
        quantizer.quantize(weight, SCHEMES[kind], "w")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_are_rounded_as_on_the_cpu(dtype):
    states = torch.cat([every_number(dtype), torch.zeros(1, dtype=dtype)])
    for amax in (448.0, 3.0, 2.0**-20):
        found = []
        for device in (GPU, "cpu"):
            quantizer = ActivationQuantizer(QuantizerAttributeConfig(**E4M3))
            quantizer.round_with(torch.tensor(amax, device=device))
            found.append(quantizer(states.to(device)))
        assert equal(*found), amax


def memory_of(work):
    """Peak bytes that torch took on the GPU beyond those before, and what `work` returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    done = work()
    return torch.cuda.max_memory_allocated() - before, done


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_takes_the_memory_that_is_promised(kind):
    """The result and 0.4 GB, of Llama-7B's largest matrix and of one that is four times as large."""
    for rows in (22016, 88064):
        weight = torch.randn(rows, 4096, device=GPU, dtype=torch.bfloat16)
        peak, (made, _) = memory_of(lambda weight=weight: quantizer.quantize(weight, SCHEMES[kind], "w"))
        result = sum(part.nbytes for part in (made.data, made.scale, made.amax) if part is not None)
        print(f"{kind} {rows} x 4096: {(peak - result) / 1e9:.3f} GB beside the result")
        assert peak - result < 0.4e9


GPU_RUN = replace(PLAIN, device=GPU)
RECIPES = ["fp8-blockwise", "fp8-per-channel", "fp8-per-tensor", "mxfp8"]
FIGURES = ("report.json", "report.html")


def differing(one, other):
    """The files in which two outputs differ, beside the report; of the manifest without the device that it names."""
    found = [contents(folder) for folder in (one, other)]
    for files in found:
        manifest = json.loads(files["manifest.json"])
        assert manifest["options"].pop("device") in ("cpu", "cuda")
        files["manifest.json"] = manifest
    return [
        name
        for name in sorted(found[0].keys() | found[1].keys())
        if name not in FIGURES and found[0].get(name) != found[1].get(name)
    ]


def both(plan, folder, options=PLAIN):
    """Outputs of a GPU and of the CPU."""
    outs = folder / "gpu", folder / "cpu"
    run(plan, outs[0], replace(options, device=GPU))
    run(plan, outs[1], replace(options, device="cpu"))
    return outs


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", ["aligned", "crossing", "mixtral"])
def test_the_same_bytes_without_data(request, model, recipe, tmp_path):
    checkpoint = request.getfixturevalue(model)
    plan = make_plan(checkpoint, recipe, BOTH)
    gpu, cpu = both(plan, tmp_path)
    assert differing(gpu, cpu) == []
    assert verify(gpu, checkpoint).failures == []
    for left, right in zip(read(gpu)["tensors"], read(cpu)["tensors"], strict=True):
        numbers = ("relative_error", "norm", "sqnr_db")
        exact = left.keys() - set(numbers)
        assert {key: left[key] for key in exact} == {key: right[key] for key in exact}
        assert [left[key] for key in numbers] == pytest.approx([right[key] for key in numbers], rel=1e-9)


def test_the_same_conversion(aligned, tmp_path):
    assert differing(*both(make_plan(aligned, "none"), tmp_path)) == []


DATA = [
    ("aligned", "fp8", "none"),
    ("crossing", "fp8", "fp8"),
    ("mixtral", "fp8", "fp8"),
    ("aligned", "fp8-blockwise", "none"),
    ("mixtral", "mxfp8", "fp8"),
]
CLOSE = 2.0**-5
"""Of calibrated magnitudes: BF16 states of a few layers, each rounded to 2^-9 of itself after sums in another order."""


@pytest.mark.parametrize(("model", "recipe", "kv_cache"), DATA)
def test_figures_and_scales_with_data_are_close(request, options, model, recipe, kv_cache, tmp_path):
    checkpoint = request.getfixturevalue(model)
    check_with_data(checkpoint, make_plan(checkpoint, load_recipe(recipe).changed(kv_cache=kv_cache), BOTH), options, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek-v3-yarn", "gpt-oss", "gpt", "qwen3-moe"])
def test_every_part_of_a_layer_runs(zoo, options, name, tmp_path):
    """Latent attention, experts that are shared, biases, sinks, windows, LayerNorm."""
    checkpoint = zoo(name) / "ckpt"
    plan = make_plan(checkpoint, load_recipe("fp8").changed(kv_cache="fp8"), ("megatron",))
    check_with_data(checkpoint, plan, options, tmp_path)


def check_with_data(checkpoint, plan, options, folder):
    """Weights are the same to the bit; calibrated scales, errors after each layer and the KL divergence are close."""
    gpu, cpu = both(plan, folder, options)
    assert verify(gpu, checkpoint).failures == []
    left, right = (tensors_of(out, plan) for out in (gpu, cpu))
    assert left.keys() == right.keys()
    calibrated = [name for name in left if name.endswith(CALIBRATED)]
    assert bool(calibrated) == (plan.recipe.needs_data)
    assert [name for name in left.keys() - set(calibrated) if not equal(left[name], right[name])] == []
    apart = {name: float((left[name] / right[name] - 1).abs().max()) for name in calibrated}
    one, other = read(gpu), read(cpu)
    print(f"{checkpoint.name} {plan.recipe.name}: scales {max(apart.values(), default=0):.4f} apart, KL", end=" ")
    print(one["fidelity"]["kl"]["mean"], other["fidelity"]["kl"]["mean"])
    assert {name: value for name, value in apart.items() if value > CLOSE} == {}
    assert one["fidelity"]["kl"]["mean"] == pytest.approx(other["fidelity"]["kl"]["mean"], rel=0.1)
    for mine, theirs in zip(one["layers"], other["layers"], strict=True):
        assert mine["hidden_relative_error"] == pytest.approx(theirs["hidden_relative_error"], rel=0.1)


CALIBRATED = ("input_scale", "k_scale", "v_scale", "input_quantizer._amax", "bmm_quantizer._amax")


def tensors_of(out, plan):
    """Every tensor of an output by its name and format."""
    found = {}
    for form in plan.formats:
        folder = out / form if len(plan.formats) > 1 else out
        folder = next(folder.glob("iter_*")) if form == "megatron" else folder
        opened = FORMATS[form].open(folder)
        found |= {f"{form} {name}": opened.load(name) for name in opened.specs}
    return found


@pytest.mark.parametrize("after", [1, 3])
def test_a_stopped_run_goes_on(aligned, after, tmp_path, tmp_path_factory):
    plan = make_plan(aligned, "fp8-blockwise", BOTH)
    stopped(plan, tmp_path / "out", after, GPU_RUN)
    run(plan, tmp_path / "out", replace(GPU_RUN, resume=True))
    check(tmp_path / "out", whole(plan, tmp_path_factory.mktemp("one"), GPU_RUN))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["aligned", "mixtral", "qwen3-moe"])
def test_a_stopped_run_with_data_goes_on(request, zoo, model, options, tmp_path, tmp_path_factory):
    """Also where a token has three experts, whose outputs are added up."""
    checkpoint = zoo(model) / "ckpt" if model == "qwen3-moe" else request.getfixturevalue(model)
    plan = make_plan(checkpoint, load_recipe("fp8").changed(kv_cache="fp8"), BOTH)
    options = replace(options, device=GPU)
    stopped(plan, tmp_path / "out", 2, options)
    run(plan, tmp_path / "out", replace(options, resume=True))
    check(tmp_path / "out", whole(plan, tmp_path_factory.mktemp("one"), options))


def test_results_alone_are_on_stdout(crossing, tokens, tmp_path):
    """Where ModelOpt would say what it compiles; and the output is right."""
    arguments = ("--recipe", "fp8", "--kv-cache", "fp8", "--calib-dataset", tokens, "--calib-seq-length", 32, "--calib-size", 6)
    done = mptq("quantize", crossing, *arguments, "--eval-size", 3, "--device", "cuda", "--json", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fidelity"]["kl"]["mean"] > 0
    done = mptq("verify", tmp_path / "out", "--against", crossing)
    assert done.returncode == 0, done.stdout + done.stderr


def test_tensors_are_shared_through_nccl():
    """By a group of one: of more, each needs a GPU of its own."""
    ranks = Ranks(0, 1, HashStore())
    tensors = [torch.randn(3, 5, device=GPU), torch.tensor(2.0, device=GPU)]
    tensors.append(torch.randn(4, 4, device=GPU).to(torch.float8_e4m3fn))
    for tensor in tensors:
        before = tensor.clone()
        ranks.broadcast(tensor, 0)
        assert equal(tensor, before)
    assert equal(ranks.all_reduce_max(torch.tensor([1.0, -1.0], device=GPU)), torch.tensor([1.0, -1.0]))
    assert list(ranks.groups) == ["cuda"]
    ranks.barrier()
    assert ranks.all_gather(7) == [7]


@pytest.mark.slow
def test_same_bytes_from_two_processes_on_one_gpu(mixtral, tmp_path, tmp_path_factory):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "mptq",
        "quantize",
        mixtral,
    ]
    command += ["--recipe", "fp8-blockwise", "--eval-size", 0, "--format", "hf,megatron", "--max-shard-size", 200000]
    command += ["--device", GPU, "-o", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plan = make_plan(mixtral, "fp8-blockwise", BOTH)
    check(tmp_path / "out", whole(plan, tmp_path_factory.mktemp("one"), GPU_RUN), apart=["report.json: ranks"])


@pytest.mark.slow
def test_what_nccl_refuses_is_one_line(mixtral, tokens, tmp_path):
    """Two processes on one GPU, here, which share tensors where there are data."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "mptq",
        "quantize",
        mixtral,
    ]
    command += ["--recipe", "fp8", "--calib-dataset", tokens, "--calib-seq-length", 32, "--calib-size", 8, "--eval-size", 4]
    done = subprocess.run(
        list(map(str, [*command, "--device", GPU, "-o", tmp_path / "out"])),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert re.search(r"^mptq: the GPUs of the processes cannot share tensors.*Duplicate GPU", done.stderr, re.MULTILINE), (
        done.stderr
    )


@pytest.mark.slow
def test_a_process_without_a_gpu_of_its_own_is_one_line(mixtral, tmp_path):
    environment = os.environ | {"LOCAL_RANK": str(torch.cuda.device_count())}
    command = [
        sys.executable,
        "-m",
        "mptq",
        "quantize",
        mixtral,
        "--recipe",
        "fp8-blockwise",
        "--eval-size",
        0,
        "-o",
        tmp_path / "out",
    ]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "this machine has" in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["block", "row", "tensor", "mx"])
def test_rounding_by_the_inputs_is_as_good_as_on_the_cpu(kind):
    """Sums in another order may decide a few codes otherwise; the outputs are as near."""
    torch.manual_seed(0)
    inputs = torch.randn(3000, 384) @ torch.randn(384, 384) / 8
    weight, found = (torch.randn(512, 384) / 8).bfloat16(), {}
    for device in ("cpu", GPU):
        rows = {number: Inputs(part) for number, part in enumerate(inputs.chunk(8))}
        rounder = Rounder(moments(Batches(8, 384, rows), torch.device(device), Ranks()), "gptq")
        found[device] = rounder.round(weight.to(device), SCHEMES[kind], "w")
    assert found[GPU].method == found["cpu"].method == "gptq"
    assert found[GPU].error == pytest.approx(found["cpu"].error, rel=0.01)
    assert found[GPU].nearest == pytest.approx(found["cpu"].nearest, rel=1e-3)
    same = (found[GPU].weight.cpu() == found["cpu"].weight).float().mean()
    print(f"{kind}: {100 * float(same):.3f} % of the codes are the same")
    assert same > 0.95


@pytest.mark.parametrize(
    ("model", "recipe", "method"),
    [
        ("aligned", "fp8-blockwise", "gptq"),
        ("aligned", "fp8-blockwise", "qep"),
        ("mixtral", "fp8-per-channel", "qep"),
        ("aligned", "mxfp8", "gptq"),
    ],
)
def test_a_run_with_rounding_by_the_inputs(request, options, tokens, model, recipe, method, tmp_path):
    options = replace(options, data=DataOptions((str(tokens),), calib_size=40, eval_size=3, seq_length=32))
    checkpoint = request.getfixturevalue(model)
    plan = make_plan(checkpoint, load_recipe(recipe).changed(rounding=method), BOTH)
    gpu, cpu = both(plan, tmp_path, options)
    assert verify(gpu, checkpoint).failures == []
    one, other = read(gpu), read(cpu)
    assert one["fidelity"]["kl"]["mean"] == pytest.approx(other["fidelity"]["kl"]["mean"], rel=0.2)
    for mine, theirs in zip(one["tensors"], other["tensors"], strict=True):
        if theirs["output_error"] is not None:
            assert mine["output_error"] == pytest.approx(theirs["output_error"], rel=0.1)
