"""The same model in every layout that frameworks write gives the same plan; unsupported models are refused."""

import io
import pickle
import shutil
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from mptq import make_plan, run
from mptq.calibration.datasets.options import DataOptions
from mptq.checkpoint.index import open_checkpoint
from mptq.errors import CheckpointError, DataError, MptqError, UnsupportedModelError
from mptq.inspection import inspect
from mptq.model.settings.resolve import resolve
from mptq.model.settings.supported import REFUSED, obstacles
from mptq.plan.estimates import bytes_in, warnings
from mptq.plan.plan import SourceOptions
from tests.conftest import mptq, read_json
from tests.unit.calibration.conftest import write_indexed

TRACKER = "latest_checkpointed_iteration.txt"
BOTH = ("hf", "megatron")
TARGETS = {
    "Megatron-Bridge": "megatron.bridge.models.gpt_provider.GPTModelProvider",
    "NeMo 2": "nemo.collections.llm.gpt.model.llama.LlamaConfig",
}


def iteration_of(root: Path) -> Path:
    return next(root.glob("iter_*"))


def copied(root: Path, to: Path) -> Path:
    """A copy whose files are links."""
    return Path(shutil.copytree(root, to, copy_function=lambda one, other: Path(other).symlink_to(Path(one).resolve())))


def renamed(directory: Path, rename) -> None:
    """Rename the keys of a checkpoint's items in its metadata; `rename` returns None to remove an item."""
    file = directory / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.state_dict_metadata = {
        new: entry for key, entry in metadata.state_dict_metadata.items() if (new := rename(key)) is not None
    }
    metadata.storage_data = {
        replace(index, fqn=new): entry
        for index, entry in metadata.storage_data.items()
        if (new := rename(index.fqn)) is not None
    }
    file.unlink()
    file.write_bytes(pickle.dumps(metadata))


def without_args(key: str) -> str | None:
    return None if key.startswith("common_state") else key


def arguments(directory: Path) -> Namespace:
    """The training run's arguments as torch reads them."""
    record = next(record for key, record in open_checkpoint(directory).blobs.items() if key.startswith("common_state"))
    with (directory / record.file).open("rb") as file:
        file.seek(record.offset)
        state = torch.load(io.BytesIO(file.read(record.length)), weights_only=False)
    return (state[0] if isinstance(state, list) else state)["args"]


def fields(root: Path, framework: str) -> dict:
    """The model section of a run config with the settings of the arguments, as Bridge and NeMo write it."""
    found = {key: value for key, value in resolve(open_checkpoint(root)).entries.items() if not key.startswith("tokenizer")}
    function = {"_target_": "torch.nn.functional.silu", "_call_" if framework == "Megatron-Bridge" else "_partial_": False}
    dtype = {"_target_": "torch.bfloat16", "_call_": False}
    return found | {"_target_": TARGETS[framework], "activation_func": function, "params_dtype": dtype}


def bridge(aligned: Path, to: Path, **changed) -> Path:
    """A Megatron-Bridge root, without Megatron-LM's arguments."""
    root = copied(aligned, to)
    directory = iteration_of(root)
    renamed(directory, without_args)
    document = {"model": fields(aligned, "Megatron-Bridge") | changed, "checkpoint": {"_target_": "x.CheckpointConfig"}}
    (directory / "run_config.yaml").write_text(yaml.safe_dump(document))
    (root / TRACKER).unlink()
    torch.save({"step": torch.tensor(100), "do_train": torch.tensor(True)}, root / "latest_train_state.pt")
    return root


def nemo(aligned: Path, to: Path) -> Path:
    """A NeMo 2 directory, whose keys begin with `module.`."""
    copied(iteration_of(aligned), to / "weights")
    renamed(to / "weights", lambda key: without_args(key) and f"module.{key}")
    document = {"_target_": "nemo.collections.llm.gpt.model.llama.LlamaModel", "config": fields(aligned, "NeMo 2")}
    (to / "context").mkdir()
    (to / "context" / "model.yaml").write_text(yaml.safe_dump(document))
    return to


def common(aligned: Path, to: Path, newer: Sequence[str] = ()) -> Path:
    """A checkpoint of megatron-core 0.13 to 0.16, with the arguments in common.pt, except those in `newer`."""
    root = copied(aligned, to)
    directory = iteration_of(root)
    args = arguments(directory)
    for name in newer:
        delattr(args, name)
    renamed(directory, without_args)
    torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 100}, directory / "common.pt")
    (directory / "metadata.json").unlink()
    (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist", "common_backend": "torch"}')
    return root


def untracked(aligned: Path, to: Path) -> Path:
    """A root of several iterations without its tracker."""
    root = copied(aligned, to)
    (root / TRACKER).unlink()
    (root / "iter_0000020").mkdir()
    return root


def described(plan) -> dict:
    """The contents of a plan, without the sources of its settings."""
    document = dict(plan.model.document)
    document.pop("settings")
    document.pop("tokenizer")
    tensors = {form: plan.layouts[form].specs for form in BOTH}
    return {"model": document, "tensors": tensors, "in": bytes_in(plan), "schemes": plan.assignment.schemes}


@pytest.fixture(scope="module")
def plain(aligned) -> dict:
    return described(make_plan(aligned, "fp8-blockwise", BOTH))


@pytest.mark.parametrize(
    ("layout", "source"),
    [
        (bridge, "run_config.yaml"),
        (nemo, "context/model.yaml"),
        (common, "args in common.pt"),
        (untracked, "args in common_state"),
    ],
)
def test_every_layout_gives_the_same_plan(aligned, plain, layout, source, tmp_path):
    plan = make_plan(layout(aligned, tmp_path / "copy"), "fp8-blockwise", BOTH)
    assert described(plan) == plain
    assert plan.model.settings.sources["num_attention_heads"] == source
    assert [str(conflict) for conflict in plan.model.settings.conflicts] == []


SAID = ("num_attention_heads=4", "num-query-groups=2", "kv_channels=128", "swiglu=true", "norm-epsilon=1e-5")
SAID += ("position_embedding_type=rope", "rotary_base=10000", "max_position_embeddings=512", "vocab_size=500")


def bare(aligned: Path, to: Path) -> Path:
    """A checkpoint without any source of settings except its tensors."""
    root = copied(aligned, to)
    renamed(iteration_of(root), without_args)
    return root


def test_without_a_config_a_hugging_face_one_gives_the_same_plan(aligned, aligned_hf, plain, tmp_path):
    options = SourceOptions(hf_config=aligned_hf)
    plan = make_plan(bare(aligned, tmp_path / "copy"), "fp8-blockwise", BOTH, options)
    assert described(plan)["tensors"] == plain["tensors"]
    assert described(plan)["model"] == plain["model"]
    assert plan.model.settings.conflicts == ()


def test_settings_that_shapes_do_not_determine_must_be_given(aligned, plain, tmp_path):
    root = bare(aligned, tmp_path / "copy")
    plan = make_plan(root, "fp8-blockwise", BOTH, SourceOptions(config=SAID))
    assert described(plan) == plain
    for said in ("num_attention_heads", "swiglu", "norm-epsilon", "position_embedding_type", "rotary_base"):
        left = tuple(option for option in SAID if not option.startswith(said))
        with pytest.raises(CheckpointError, match="its tensors do not determine .*: pass --hf-config DIR, or each as --config"):
            make_plan(root, "fp8-blockwise", BOTH, SourceOptions(config=left))


@pytest.mark.parametrize("layout", [bridge, nemo, common])
def test_inspect_reads_every_layout(aligned, layout, tmp_path):
    (found,) = inspect(layout(aligned, tmp_path / "copy"))
    (plain,) = inspect(aligned)
    assert found["facts"]["architecture"] == plain["facts"]["architecture"]
    assert found["parameters"] == plain["parameters"]


def test_options_take_precedence_over_the_run_config(aligned, tmp_path):
    root = bridge(aligned, tmp_path / "copy", rotary_base=12345, num_layers=3)
    assert {conflict.key for conflict in resolve(open_checkpoint(root)).conflicts} == {"num_layers"}
    options = SourceOptions(100, ("num-layers=4", "rotary_base=500000"))
    plan = make_plan(root, "fp8-blockwise", BOTH, options)
    assert (plan.model.num_layers, plan.model.get("rotary_base"), plan.model.source("rotary_base")) == (4, 500000, "--config")


def test_a_hugging_face_config_replaces_missing_arguments(aligned, aligned_hf, plain, tmp_path):
    root = copied(aligned, tmp_path / "copy")
    renamed(iteration_of(root), without_args)
    with pytest.raises(CheckpointError, match="--hf-config DIR"):
        make_plan(root, "fp8-blockwise")
    plan = make_plan(root, "fp8-blockwise", BOTH, SourceOptions(hf_config=aligned_hf))
    assert described(plan)["tensors"] == plain["tensors"]


@pytest.mark.parametrize(
    "target", ["gemma.gemma_provider.GemmaModelProvider", "qwen_vl.qwen25_vl_provider.Qwen25VLModelProvider"]
)
def test_models_that_settings_do_not_fully_describe_are_refused(aligned, target, tmp_path):
    root = bridge(aligned, tmp_path / "copy", _target_=f"megatron.bridge.models.{target}")
    with pytest.raises(UnsupportedModelError, match=f"may do more .*provider={target.rpartition('.')[2]}"):
        make_plan(root, "fp8-blockwise")
    make_plan(root, "fp8-blockwise", options=SourceOptions(config=("provider=GPTModelProvider",)))


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        ("GPTModelProvider GPTModelConfig MLAModelProvider HybridModelProvider MambaModelProvider GPTModel LlamaModel", False),
        (
            "Llama3ModelProvider8B Llama31ModelProvider405B Llama31Config70B Qwen3MoEModelProvider30B_A3B Qwen2Config7B",
            False,
        ),
        ("MistralModelProvider MixtralConfig8x7B DeepSeekV3ModelProvider DeepSeekModel NemotronHModelProvider56B", False),
        ("GemmaModel Gemma2ModelProvider Gemma3ModelProvider27B CodeGemmaConfig7B Gemma3VLModelProvider NevaModel", True),
        (
            "Qwen3VLModelProvider Qwen25OmniModelProvider NemotronVLModelProvider LlavaMegatronMIMOProvider T5ModelProvider",
            True,
        ),
        ("Llama4Model Llama4OmniModel Baichuan2Model HyenaModel FalconH1ModelProvider LlamaBidirectionalModel", True),
    ],
)
def test_which_classes_build_plain_models(names, refused):
    assert {name: bool(obstacles(REFUSED, {"provider": name})) for name in names.split()} == dict.fromkeys(
        names.split(), refused
    )


@pytest.mark.parametrize(
    "spec",
    [
        "megatron.bridge.models.olmoe.olmoe_provider.olmoe_layer_spec",
        "megatron.bridge.models.minimax_m2.minimax_m2_provider.minimax_m2_layer_spec",
        "megatron.bridge.models.exaone.exaone4.exaone4_provider.exaone4_layer_spec",
    ],
)
def test_custom_layer_specs_are_refused(aligned, spec, tmp_path):
    """Megatron-Bridge converts OLMoE, MiniMax-M2 and EXAONE 4 this way; their settings equal those of other models."""
    root = bridge(aligned, tmp_path / "copy", transformer_layer_spec={"_target_": spec, "_call_": False})
    name = spec.rpartition(".")[2]
    message = (
        rf"\(transformer_layer_spec={name}\), which mptq does not quantize: if .* --config transformer_layer_spec=default_"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        make_plan(root, "fp8-blockwise")
    make_plan(root, "fp8-blockwise", options=SourceOptions(config=("transformer_layer_spec=default_layer_spec",)))


@pytest.mark.parametrize(
    ("key", "names", "refused"),
    [
        ("transformer_layer_spec", "default_layer_spec transformer_engine_layer_spec local_layer_spec local", False),
        ("transformer_layer_spec", "modelopt_transformer_layer_spec quantization_layer_spec get_gpt_decoder_block_spec", False),
        ("transformer_layer_spec", "get_transformer_block_with_experimental_attention_variant_spec", False),
        ("transformer_layer_spec", "transformer_engine_full_layer_spec heterogeneous_layer_spec ModuleSpec <lambda>", True),
        ("transformer_layer_spec", "gemma2_layer_spec ministral_layer_spec get_gpt_decoder_block_spec(qk_l2_norm=True)", True),
        ("hybrid_stack_spec", "get_default_hybrid_stack_spec hybrid_stack_spec mamba_stack_spec ModuleSpec", False),
        ("mamba_stack_spec", "modelopt_mamba_stack_spec <lambda> ModuleSpec", False),
        ("mamba_stack_spec", "hyena_stack_spec", True),
    ],
)
def test_which_specs_are_megatron_cores_own(key, names, refused):
    assert {name: bool(obstacles(REFUSED, {key: name})) for name in names.split()} == dict.fromkeys(names.split(), refused)


def test_transformer_engines_own_layers_are_refused(aligned, tmp_path):
    """NeMo 2 trains some sizes with them: their tensors have names that no other layer uses."""
    root = bridge(aligned, tmp_path / "copy", use_transformer_engine_full_layer_spec=True)
    with pytest.raises(UnsupportedModelError, match="Transformer Engine's own layers, whose tensors have other names"):
        make_plan(root, "fp8-blockwise")


def test_unknown_settings_are_a_warning(aligned, tmp_path):
    root = bridge(aligned, tmp_path / "copy", scale_embeddings=True, hidden_dropout=0.1)
    (note,) = [note for note in warnings(make_plan(root, "none")) if "does not know" in note]
    assert note.startswith("run_config.yaml has settings that mptq does not know (scale_embeddings=True): if one")


@pytest.mark.parametrize("cap", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_a_soft_cap_is_refused_for_hugging_face(aligned, cap, tmp_path):
    root = bridge(aligned, tmp_path / "copy", **{cap: 30.0})
    with pytest.raises(UnsupportedModelError, match=rf"a soft cap on .* \({cap}=30.0\).*--format megatron"):
        make_plan(root, "none")


def positions(root, options=None):
    """The positions that config.json would have, and the warnings about them before the run."""
    plan = make_plan(root, "none", options=options)
    return plan.model.max_position_embeddings, [note for note in warnings(plan) if "max_position_embeddings" in note]


def test_positions_taken_from_the_training_length_are_a_warning(aligned, tmp_path):
    root = bridge(aligned, tmp_path / "copy", max_position_embeddings=None, seq_length=64)
    length, notes = positions(root)
    assert (length, len(notes)) == (64, 1)
    assert "max_position_embeddings is 64, the training sequence length" in notes[0]
    assert positions(root, SourceOptions(config=("max_position_embeddings=512",))) == (512, [])


@pytest.mark.parametrize("given", [False, True])
def test_positions_taken_from_the_tokenizer_are_a_warning(aligned, given, tmp_path):
    root = bridge(aligned, tmp_path / "copy", max_position_embeddings=None, seq_length=64)
    tokenizer = tmp_path / "tokenizer" if given else iteration_of(root) / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer_config.json").write_text('{"model_max_length": 131072}')
    length, notes = positions(root, SourceOptions(tokenizer=tokenizer if given else None))
    assert (length, len(notes)) == (131072, 1)
    assert "max_position_embeddings is 131072, the tokenizer's model_max_length" in notes[0]


LONG = {"position_embedding_type": "yarn", "yarn_rotary_scaling_factor": 4.0, "yarn_original_max_position_embeddings": 32768}


@pytest.mark.parametrize(("said", "warned"), [(None, True), (True, False), (False, False)])
def test_unspecified_yarn_rounding_is_a_warning(aligned, said, warned, tmp_path):
    """As written by AutoBridge; megatron-core treats None as False, while Hugging Face rounds by default."""
    root = bridge(aligned, tmp_path / "copy", seq_length=4096, yarn_correction_range_round_to_int=said, **LONG)
    assert positions(root) == (131072, [])
    plan = make_plan(root, "none")
    notes = [note for note in warnings(plan) if "pass --config yarn_correction_range_round_to_int=false" in note]
    assert bool(notes) == warned
    plain = make_plan(root, "none", options=SourceOptions(config=("yarn_rotary_scaling_factor=1.0",)))
    assert not [note for note in warnings(plain) if "round" in note]
    assert plan.model.yarn["correction_range_round_to_int"] is (said is not False)


def with_state(directory):
    (directory / "modelopt_state").mkdir()


def with_quantizers(directory):
    renamed(directory, lambda key: key.replace("final_layernorm.weight", "x.weight_quantizer._amax"))


@pytest.mark.parametrize("spoil", [with_state, with_quantizers])
def test_a_quantized_checkpoint_is_inspected_but_not_quantized_again(aligned, spoil, tmp_path):
    root = copied(aligned, tmp_path / "copy")
    spoil(iteration_of(root))
    with pytest.raises(CheckpointError, match="is quantized already"):
        make_plan(root, "fp8-blockwise")
    assert inspect(root)[0]["kind"] == "Megatron checkpoint"


@pytest.mark.parametrize(
    "state", ["state.fp32_param.module.{}", "state.param.{}", "distributed.dp_group_idx_0.gbuf_idx_0.bucket_idx_0.param.{}"]
)
def test_main_params_are_not_weights(aligned, state, tmp_path):
    root = copied(aligned, tmp_path / "copy")
    renamed(iteration_of(root), lambda key: f"chained_0.optimizer.{state.format(key)}" if key.endswith("weight") else key)
    with pytest.raises(CheckpointError, match=r"only as the optimizer's main params .* save it with the model weights"):
        make_plan(root, "fp8-blockwise")


def test_the_command_line(aligned, tmp_path):
    root = untracked(aligned, tmp_path / "copy")
    (root / "iter_0000300").mkdir()
    done = mptq("quantize", root, "--recipe", "fp8-blockwise", "--dry-run")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "iter_0000300 is empty" in done.stderr
    options = ("--iteration", 100, "--config", "rotary_base=777")
    out = tmp_path / "out"
    done = mptq(
        "quantize", root, "--recipe", "fp8-per-channel", *options, "-o", out, "--eval-size", 0, "--device", "cpu", "--quiet"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert read_json(out / "config.json")["rope_parameters"]["rope_theta"] == 777
    done = mptq("verify", out, "--against", root, *options)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "ok")
    done = mptq("inspect", root, *options)
    assert done.returncode == 0
    assert "iteration" in done.stdout
    done = mptq("inspect", root, "--iteration", 5)
    assert (done.returncode, "there are 20, 100, 300" in done.stderr) == (1, True)


def test_wrong_options_are_refused(aligned):
    with pytest.raises(MptqError, match="did you mean rotary_base"):
        make_plan(aligned, "fp8-blockwise", options=SourceOptions(config=("rotary_bas=1",)))


def test_null_tokenizers_before_0_18_add_an_end_of_document_id(aligned, options, tmp_path):
    """There `--vocab-size 500` is 501 tokens; it is 500 with the arguments of 0.19."""
    newer = ("null_tokenizer_eod_id", "null_tokenizer_pad_id")
    old = common(aligned, tmp_path / "old", newer)
    documents = [[[*range(20 * index, 20 * index + 40), 500]] for index in range(20)]
    ends = DataOptions((str(write_indexed(tmp_path / "ends", documents)),), calib_size=2, eval_size=2, seq_length=32)
    run(make_plan(old, "fp8-per-channel"), tmp_path / "out", replace(options, data=ends))
    assert read_json(tmp_path / "out" / "config.json")["vocab_size"] == 501
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as tensors:
        assert tensors.get_slice("model.embed_tokens.weight").get_shape() == [501, 256]
        assert tensors.get_slice("lm_head.weight").get_shape() == [501, 256]
    with pytest.raises(DataError, match="token id 500, but the model's vocabulary size is 500"):
        run(make_plan(aligned, "fp8-per-channel"), tmp_path / "none", replace(options, data=ends))
