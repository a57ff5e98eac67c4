import functools
import io
import itertools
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product

import pytest
import torch
from safetensors.torch import load_file

import mptq.pipeline.context
from mptq import Options, load_recipe, make_plan, run, verify
from mptq.calibration.datasets.options import DataOptions
from mptq.checkpoint.index import open_checkpoint
from mptq.checkpoint.reader import Reader
from mptq.errors import CheckpointError, OutputError
from mptq.recipes.recipe import recipe_from
from mptq.report.schema import Report
from tests.conftest import RECIPES, files, make_checkpoint, read_json
from tests.support import reference


def megatron_tensors(out):
    """Every tensor of a Megatron output, with gated fc1 concatenated."""
    checkpoint = open_checkpoint(out)
    reader = Reader(checkpoint)
    found = {
        name: reader.read(name, torch.empty(tensor.spec.shape, dtype=getattr(torch, tensor.spec.dtype)))
        for name, tensor in checkpoint.tensors.items()
    }
    for name in [name for name in found if name.endswith("weight_w")]:
        gate, up = found.pop(name), found.pop(name.removesuffix("w") + "v")
        found[name.removesuffix("_w")] = torch.cat([gate.view(torch.uint8), up.view(torch.uint8)]).view(gate.dtype)
    return found


def hf_weights(folder):
    return {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}


PROJECTIONS = {
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
}


def bits(tensor):
    return tensor.reshape(-1, *tensor.shape[1:]).contiguous().view(torch.uint8)


def test_hf_blocks_equal_the_reference(quantized, aligned_hf):
    source, found = (
        hf_weights(aligned_hf),
        load_file(quantized["aligned", "fp8-blockwise"] / "hf" / "model.safetensors"),
    )
    quantized_names = [name for name in found if found[name].dtype == torch.float8_e4m3fn]
    assert len(quantized_names) == 4 * 7
    for name in quantized_names:
        data, scale = reference.block(source[name])
        assert torch.equal(bits(found[name]), data)
        assert torch.equal(found[name.replace(".weight", ".weight_scale_inv")], scale)


def test_hf_groups_share_one_scale_and_equal_the_reference(quantized, aligned_hf, crossing_hf):
    for recipe, (model, hf, layers) in product(
        ("fp8", "fp8-per-tensor"), (("aligned", aligned_hf, 4), ("crossing", crossing_hf, 2))
    ):
        source = hf_weights(hf)
        found = load_file(quantized[model, recipe] / "hf" / "model.safetensors")
        for layer in range(layers):
            for members in PROJECTIONS.values():
                names = [f"model.layers.{layer}.{member}" for member in members]
                amax = max(source[f"{name}.weight"].abs().max() for name in names)
                for name in names:
                    data, scale = reference.tensor(source[f"{name}.weight"], amax)
                    assert torch.equal(bits(found[f"{name}.weight"]), data)
                    scale = scale if recipe == "fp8" else scale.expand(len(data), 1)
                    assert torch.equal(found[f"{name}.weight_scale"], scale)
                inputs = {found[f"{name}.input_scale"].item() for name in names if recipe == "fp8"}
                assert len(inputs) == (recipe == "fp8")  # the members share one input scale


def fused(source, layer, linear, heads, groups):
    """Megatron's fused matrix, concatenated by the test's own code for the layout."""
    parts = [source[f"model.layers.{layer}.{member}.weight"] for member in PROJECTIONS[linear]]
    if linear != "self_attention.linear_qkv":
        return torch.cat(parts)
    query, key, value = parts
    rows = []
    for group in range(groups):
        for part, count in ((query, heads // groups), (key, 1), (value, 1)):
            dim = len(key) // groups
            rows.append(part[group * count * dim : (group + 1) * count * dim])
    return torch.cat(rows)


def test_hf_rows_equal_the_reference(quantized, crossing_hf):
    source, found = hf_weights(crossing_hf), load_file(quantized["crossing", "fp8-per-channel"] / "hf" / "model.safetensors")
    names = [name for name in found if found[name].dtype == torch.float8_e4m3fn]
    assert len(names) == 2 * 7
    for name in names:
        data, scale = reference.row(source[name])
        assert torch.equal(bits(found[name]), data)
        assert torch.equal(found[f"{name}_scale"], scale)


def test_hf_microscaling_equals_the_reference(quantized, crossing_hf):
    source, found = hf_weights(crossing_hf), load_file(quantized["crossing", "mxfp8"] / "hf" / "model.safetensors")
    names = [name for name in found if found[name].dtype == torch.float8_e4m3fn]
    assert len(names) == 2 * 7
    for name in names[::5]:  # the reference is slow
        data, scale = reference.mx(source[name])
        assert torch.equal(bits(found[name]), data)
        assert torch.equal(found[f"{name}_scale"], scale)


@pytest.mark.parametrize(
    ("recipe", "quantize"),
    [
        ("fp8", reference.tensor),
        ("fp8-blockwise", reference.block),
        ("fp8-per-channel", reference.row),
        ("fp8-per-tensor", reference.tensor),
    ],
)
@pytest.mark.parametrize("model", ["aligned", "crossing"])
def test_megatron_output_equals_the_reference_on_ceil_grids(quantized, model, recipe, quantize, request):
    source = hf_weights(request.getfixturevalue(f"{model}_hf"))
    found = megatron_tensors(quantized[model, recipe] / "megatron")
    for layer in range(4 if model == "aligned" else 2):
        for linear, members in PROJECTIONS.items():
            name = f"decoder.layers.{layer}.{linear}"
            data, scale = quantize(fused(source, layer, linear, heads=4, groups=2))
            assert torch.equal(bits(found[f"{name}.weight"]), data), name
            assert torch.equal(found[f"{name}.weight_quantizer._scale"], scale), name
            amax = torch.where(scale == 1, 448.0, found[f"{name}.weight_quantizer._amax"].reshape(scale.shape))
            assert torch.equal(amax / 448, scale)
            if recipe == "fp8":
                hf = load_file(quantized[model, recipe] / "hf" / "model.safetensors")
                first = members[0]
                static = found[f"{name}.input_quantizer._amax"]
                assert static.shape == (1,)
                assert torch.equal(static[0] / 448, hf[f"model.layers.{layer}.{first}.input_scale"])


def test_the_cache_has_scales_of_every_layer_in_both_outputs(quantized):
    for recipe in RECIPES:
        out = quantized["crossing", recipe]
        hf, megatron = load_file(out / "hf" / "model.safetensors"), megatron_tensors(out / "megatron")
        report = read_json(out / "report.json")
        names = [("k_scale", "self_attn.k_proj.k_scale"), ("v_scale", "self_attn.v_proj.v_scale")]
        if report["recipe"]["hf"] == "compressed-tensors":
            names = [("k_scale", "self_attn.k_scale"), ("v_scale", "self_attn.v_scale")]
        for row in report["layers"]:
            for kind, name in names:
                scale = hf[f"model.layers.{row['layer']}.{name}"]
                amax = megatron[f"decoder.layers.{row['layer']}.self_attention.core_attention.{kind[0]}_bmm_quantizer._amax"]
                assert scale.item() == row["kv_cache"][kind] == (amax / 448).item()
                assert torch.equal(scale.bfloat16().float(), scale)  # engines store it in bfloat16
        assert not any("k_scale" in name for name in load_file(quantized["aligned", recipe] / "hf" / "model.safetensors"))


def test_both_outputs_hold_the_same_bytes_where_the_grid_allows(quantized):
    for model, recipe in itertools.product(("aligned", "crossing"), RECIPES):
        out = quantized[model, recipe]
        hf, megatron = load_file(out / "hf" / "model.safetensors"), megatron_tensors(out / "megatron")
        document = read_json(out / "report.json")
        expected = set()
        for layer in range(document["model"]["num_layers"]):
            for linear, members in PROJECTIONS.items():
                source = {
                    f"model.layers.{layer}.{member}.weight": hf[f"model.layers.{layer}.{member}.weight"] for member in members
                }
                inner = f"decoder.layers.{layer}.{linear}.weight"
                if any(tensor.dtype != torch.float8_e4m3fn for tensor in source.values()):
                    expected.add(inner)
                    continue
                rebuilt = fused({name: bits(tensor) for name, tensor in source.items()}, layer, linear, 4, 2)
                if not torch.equal(rebuilt, bits(megatron[inner])):
                    expected.add(inner)
        assert expected == set(document["differing"])
        crossing = model == "crossing" and recipe == "fp8-blockwise"
        assert len(document["differing"]) == (6 if crossing else 0)


def test_ragged_groups_keep_their_precision_in_hf(quantized, crossing_hf):
    out = quantized["crossing", "fp8-blockwise"] / "hf"
    found, source = load_file(out / "model.safetensors"), load_file(crossing_hf / "model.safetensors")
    kept = [f"model.layers.{layer}.mlp.{name}_proj" for layer in range(2) for name in ("gate", "up", "down")]
    for name in kept:
        assert torch.equal(bits(found[f"{name}.weight"]), bits(source[f"{name}.weight"]))
    config = read_json(out / "config.json")
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head", *kept]
    assert "lm_head.weight" not in found  # tied
    for name in ("q", "k", "v", "o"):
        assert found[f"model.layers.0.self_attn.{name}_proj.weight"].dtype == torch.float8_e4m3fn


def test_ragged_groups_can_have_one_scale_a_row_in_hf(crossing, crossing_hf, tmp_path):
    recipe = recipe_from(load_recipe("fp8-blockwise").model_dump() | {"misaligned": "per-channel"}, "test")
    out = tmp_path / "out"
    run(make_plan(crossing, recipe, ("hf", "megatron")), out, Options(device="cpu"))
    found, source = load_file(out / "hf" / "model.safetensors"), hf_weights(crossing_hf)
    config = read_json(out / "hf" / "config.json")["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    strategies = {group["weights"]["strategy"]: group["targets"] for group in config["config_groups"].values()}
    assert {strategy: len(names) for strategy, names in strategies.items()} == {"block": 8, "channel": 6}
    for quantize, names in ((reference.block, strategies["block"]), (reference.row, strategies["channel"])):
        for name in names:
            data, scale = quantize(source[f"{name}.weight"])
            assert torch.equal(bits(found[f"{name}.weight"]), data)
            assert torch.equal(found[f"{name}.weight_scale"], scale)
    megatron = megatron_tensors(out / "megatron")
    assert megatron["decoder.layers.0.mlp.linear_fc2.weight_quantizer._scale"].shape == (2, 3)  # blocks, ceil-divided
    assert verify(out, crossing).failures == []


def test_padding_of_the_vocabulary_is_cut_in_hf_only(quantized, aligned_hf):
    out = quantized["aligned", "fp8-blockwise"]
    found, source = load_file(out / "hf" / "model.safetensors"), load_file(aligned_hf / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(bits(found[name]), bits(source[name]))
    assert megatron_tensors(out / "megatron")["embedding.word_embeddings.weight"].shape == (512, 256)


def test_input_is_untouched_and_output_is_the_same_every_time(aligned, quantized, options, tmp_path):
    before = files(aligned)
    run(make_plan(aligned, "fp8-blockwise", ("hf", "megatron")), tmp_path / "again", options)
    assert files(aligned) == before
    first, second = files(quantized["aligned", "fp8-blockwise"]), files(tmp_path / "again")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == ["report.html", "report.json"]  # they contain times


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "processes"),
    [(["--tp", 2], 2), (["--pp", 2], 2), (["--per-layer"], 1)],
    ids=["tp2", "pp2", "per-layer"],
)
def test_bytes_do_not_depend_on_how_the_checkpoint_was_saved(aligned_hf, quantized, options, tmp_path, flags, processes):
    checkpoint = make_checkpoint(aligned_hf, tmp_path / "ckpt", *flags, processes=processes)
    for recipe in ("fp8", "fp8-blockwise"):
        out = tmp_path / recipe
        run(make_plan(checkpoint, recipe, ("hf", "megatron")), out, options)
        first, second = files(quantized["aligned", recipe]), files(out)
        # The last file holds the training run's arguments, which include how it was saved; the metadata has its length.
        apart = {
            "report.json",
            "report.html",
            "manifest.json",
            "megatron/iter_0000100/__5_0.distcp",
            "megatron/iter_0000100/.metadata",
        }
        assert first.keys() == second.keys()
        assert {name for name in first if first[name] != second[name]} <= apart
        left = megatron_tensors(quantized["aligned", recipe] / "megatron")
        right = megatron_tensors(out / "megatron")
        assert left.keys() == right.keys()
        assert all(torch.equal(bits(left[name]), bits(right[name])) for name in left)


def test_shards(aligned, quantized, tmp_path):
    out = tmp_path / "out"
    run(make_plan(aligned, "fp8-blockwise"), out, Options(device="cpu", max_shard_bytes=1_000_000))
    index = read_json(out / "model.safetensors.index.json")
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 2
    assert set(index["weight_map"].values()) == set(shards)
    whole = load_file(quantized["aligned", "fp8-blockwise"] / "hf" / "model.safetensors")
    parts = {name: tensor for shard in shards for name, tensor in load_file(out / shard).items()}
    assert parts.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(bits(parts[name]), bits(whole[name])) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())


def test_every_report_has_the_documented_schema(quantized, quantized_mixtral):
    for out in (*quantized.values(), *quantized_mixtral.values()):
        Report.model_validate(read_json(out / "report.json"))
        assert (out / "report.html").stat().st_size > 20_000


def test_report_of_a_mixture_of_experts(quantized_mixtral):
    document = read_json(quantized_mixtral["fp8"] / "report.json")
    assert document["calibration"]["calibration"]["tokens"] == 6 * 32
    for row in document["layers"]:
        assert sum(row["experts"]["tokens"]) == 6 * 32 * 2  # each token is routed to two
        poor = [expert for expert, count in enumerate(row["experts"]["tokens"]) if count < 16]
        assert row["experts"]["fallback"] == poor
    assert all(row["input_amax"] > 0 for row in document["tensors"])
    data_free = read_json(quantized_mixtral["fp8-per-channel"] / "report.json")
    assert [sum(row["experts"]["tokens"]) for row in data_free["layers"]] == [3 * 32 * 2] * 2  # the held-out sequences


def test_experts_with_few_tokens_get_the_largest_scale_of_their_layer(mixtral, options, tmp_path):
    rows = {}
    for name, minimum in (("own", 0), ("layers", 10**6)):
        document = run(make_plan(mixtral, "fp8"), tmp_path / name, replace(options, moe_min_tokens=minimum))
        rows[name] = [row for row in document["tensors"] if row["name"].startswith("model.layers.1.block_sparse_moe")]
        assert document["layers"][1]["experts"]["fallback"] == ([0, 1, 2, 3] if minimum else [])
    for kind in ("w1", "w2"):
        own = [row["input_amax"] for row in rows["own"] if row["name"].endswith(f"{kind}.weight")]
        assert len(set(own)) > 1
        assert {row["input_amax"] for row in rows["layers"] if row["name"].endswith(f"{kind}.weight")} == {max(own)}


def test_report(quantized):
    document = read_json(quantized["aligned", "fp8-blockwise"] / "report.json")
    assert document["schema"] == 2
    assert document["fidelity"]["tokens"] == 3 * 31
    assert all(row["hidden_relative_error"] > 0 for row in document["layers"])
    assert all(0.99 < row["hidden_cosine"] < 1 for row in document["layers"])
    assert len(document["tensors"]) == 4 * (7 + 4)
    assert all(0.01 < row["relative_error"] < 0.04 for row in document["tensors"])
    assert len(document["layers"]) == 4
    assert document["bytes"]["hf"] < document["bytes"]["in"]
    assert {"read", "quantize", "write", "total"} <= document["seconds"].keys()
    assert document["peak_rss_bytes"] > 0
    assert document["versions"]["nvidia-modelopt"]
    assert document["dropped"]["common_state/shard_0_1"].startswith("training arguments")


def spoil_a_weight(root, name, value):
    """Store another BF16 value in a tensor's shard, with valid checksums."""
    checkpoint = open_checkpoint(root)
    record = checkpoint.tensors[name].chunks[0].record
    raw = bytearray((checkpoint.directory / record.file).read_bytes())
    weight = torch.load(io.BytesIO(raw[record.offset : record.offset + record.length]), weights_only=True)
    weight.view(-1)[0] = value
    saved = io.BytesIO()
    torch.save(weight, saved)
    assert len(saved.getvalue()) == record.length
    raw[record.offset : record.offset + record.length] = saved.getvalue()
    (checkpoint.directory / record.file).write_bytes(raw)


@pytest.mark.parametrize(
    ("key", "inner"),
    [
        ("decoder.layers.mlp.linear_fc2.weight", "decoder.layers.0.mlp.linear_fc2.weight"),
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("decoder.layers.mlp.linear_fc1.layer_norm_weight", "decoder.layers.0.pre_mlp_layernorm.weight"),
    ],
)
def test_nan_stops_the_run_and_leaves_no_output(aligned, tmp_path, key, inner):
    root = shutil.copytree(aligned, tmp_path / "ckpt")
    spoil_a_weight(root, key, float("nan"))
    with pytest.raises(CheckpointError, match=rf"{re.escape(inner)} .* NaN or infinite"):
        run(make_plan(root, "fp8-blockwise"), tmp_path / "out", Options(device="cpu"))
    # The unit that was finished before, the embedding, is kept for --resume.
    kept = [] if inner.startswith("embedding") else [".out.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*kept, "ckpt"]


def test_output_is_refused_before_anything_is_read(aligned, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(OutputError, match="exists"):
        run(make_plan(aligned, "fp8-blockwise"), tmp_path / "out", Options(device="cpu"))


@pytest.mark.slow
def test_interrupt_leaves_no_output(aligned, tmp_path):
    command = [
        sys.executable,
        "-m",
        "mptq",
        "quantize",
        aligned,
        "--recipe",
        "fp8-blockwise",
        "-o",
        tmp_path / "out",
        "-v",
    ]
    # A test run in a shell's background ignores SIGINT, and its children would too.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    for line in process.stderr:
        if "linear_fc1" in line or "gate_proj" in line:
            break
    process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.returncode == 130
    assert "mptq: interrupted; progress is kept (finished steps: 1): pass --resume" in process.stderr.read()
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]


@pytest.mark.parametrize("piece", [40_000, 512], ids=["some rows", "one row, and rows of padding alone"])
def test_large_tables_are_copied_by_rows(aligned, tmp_path, monkeypatch, piece):
    """The bytes are the same, and only some rows of the vocabulary (whose padding is removed) are in memory at once."""
    plan = make_plan(aligned, "fp8-blockwise")
    options = Options(device="cpu", data=DataOptions(eval_size=0))
    run(plan, tmp_path / "whole", options)
    sizes, read_parts = [], Reader.read_parts
    monkeypatch.setattr(mptq.pipeline.context, "PIECE_BYTES", piece)
    monkeypatch.setattr(Reader, "read_parts", lambda *args: sizes.append(args[2].shape) or read_parts(*args))
    run(plan, tmp_path / "rows", options)
    assert not [shape for shape in sizes if shape[0] == plan.model.padded_vocab_size]
    assert plan.model.vocab_size < plan.model.padded_vocab_size
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "rows" / file.name).read_bytes()
