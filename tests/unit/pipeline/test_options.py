"""`--resume` with every option of the command: refused if it changes the output, complete or unfinished."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import typer

import mptq.pipeline.preflight
from mptq import make_plan, run
from mptq.cli.app import app
from mptq.errors import OutputError, StoppedError
from mptq.pipeline.options import KINDS, LIMIT, RUN, differences
from mptq.plan.plan import SourceOptions
from mptq.recipes.recipe import load_recipe
from mptq.report import QualityLimits
from tests.conftest import mptq as command
from tests.conftest import read_json
from tests.support.killing import contents
from tests.unit.calibration.conftest import write_indexed


def test_every_option_of_the_command_has_a_kind():
    parameters = typer.main.get_command(app).commands["quantize"].params
    found = {max(one.opts, key=len) if one.param_type_name == "option" else one.metavar for one in parameters}
    assert found - {"--help"} == set(KINDS)


@pytest.fixture(scope="module")
def root(aligned, tmp_path_factory):
    """A checkpoint of two iterations that have the same bytes."""
    folder = shutil.copytree(aligned, tmp_path_factory.mktemp("ckpt") / "aligned")
    shutil.copytree(folder / "iter_0000100", folder / "iter_0000200")
    return folder


@pytest.fixture(scope="module")
def outputs(root, options, tmp_path_factory):
    """A complete output, and an unfinished one."""
    folder = tmp_path_factory.mktemp("outputs")
    run(make_plan(root, "fp8"), folder / "complete", options)
    with pytest.raises(StoppedError):
        run(make_plan(root, "fp8"), folder / "begun", replace(options, stop=lambda: True))
    return folder


@pytest.fixture
def other(crossing, aligned_hf, tokenizer, tmp_path):
    """A different value for every option that changes the output: what it changes of the arguments of a run."""
    document = read_json(aligned_hf / "config.json")
    for place in (document, document.get("rope_parameters", {})):
        if "rope_theta" in place:
            place["rope_theta"] = 20_000.0
    (tmp_path / "config.json").write_text(json.dumps(document))
    more = write_indexed(tmp_path / "more", [[list(range(i, i + 60))] for i in range(40)])

    def data(**change):
        return {"data": change}

    return {
        "CKPT": {"checkpoint": crossing},
        "--iteration": {"source": {"iteration": 200}},
        "--config": {"source": {"config": ("rotary_base=20000",)}},
        "--hf-config": {"source": {"hf_config": tmp_path / "config.json"}},
        "--recipe": {"recipe": load_recipe("fp8-per-channel")},
        "--ignore": {"recipe": load_recipe("fp8").changed(["decoder.layers.0.*"])},
        "--kv-cache": {"recipe": load_recipe("fp8").changed(kv_cache="fp8")},
        "--rounding": {"recipe": load_recipe("fp8").changed(rounding="gptq")},
        "--keep-bytes": {"recipe": load_recipe("fp8").changed(["decoder.layers.0.*linear_fc2"])},
        "--format": {"formats": ("hf", "megatron")},
        "--tokenizer": {"options": {"tokenizer": tokenizer}},
        "--max-shard-size": {"options": {"max_shard_bytes": 200_000}},
        "--device": {"device": torch.device("cuda")},
        "--calib-dataset": data(datasets=(str(more),)),
        "--calib-size": data(calib_size=5),
        "--calib-seq-length": data(seq_length=16),
        "--calib-batch-size": {"options": {"batch_size": 2}},
        "--calib-packing": data(packed=False),
        "--eval-size": data(eval_size=2),
        "--sensitivity": {"options": {"sensitivity": True}},
        "--unseen-size": {"options": {"tokenizer": tokenizer}} | data(unseen_size=2),
        "--seed": data(seed=1),
        "--moe-min-tokens": {"options": {"moe_min_tokens": 3}},
    }


def again(root, options, out, change):
    """A run with `resume` and another value of some option."""
    plan = make_plan(
        change.get("checkpoint", root),
        change.get("recipe", "fp8"),
        change.get("formats", ("hf",)),
        SourceOptions(**{"iteration": None} | change.get("source", {})),
    )
    options = replace(options, data=replace(options.data, **change.get("data", {})), resume=True)
    return run(plan, out, replace(options, **change.get("options", {})))


@pytest.mark.parametrize("flag", [flag for flag, kind in KINDS.items() if kind not in (LIMIT, RUN)])
@pytest.mark.parametrize("state", ["complete", "begun"])
def test_options_that_change_the_output_are_refused(root, options, outputs, other, state, flag, monkeypatch):
    before, change = contents(outputs), other[flag]
    if "device" in change:
        monkeypatch.setattr(mptq.pipeline.preflight, "pick_device", lambda _name: change["device"])
    advice = "resume with the same options, (or )?pass --overwrite instead of --resume"
    with pytest.raises(OutputError, match=rf"^[^\n]* differs in [^\n]*{flag}\b[^\n]*: {advice}"):
        again(root, options, outputs / state, change)
    assert contents(outputs) == before


RUNS = {"activation_memory": 1, "stop": lambda: False, "device": "auto"}


@pytest.mark.parametrize("name", RUNS)
def test_run_options_do_not_change_the_output(root, options, outputs, name):
    before = contents(outputs)
    again(root, options, outputs / "complete", {"options": {name: RUNS[name]}})
    assert contents(outputs) == before


def test_changed_contents_of_data_and_weights_are_refused(root, options, outputs, tokens, tmp_path):
    """Even under the same names."""
    complete = shutil.copytree(outputs / "complete", tmp_path / "out")
    moved = write_indexed(tmp_path / tokens.name, [[list(range(i, i + 60))] for i in range(40)])
    data = replace(options.data, datasets=(str(moved),))
    with pytest.raises(OutputError, match="is complete, but differs in the contents of the data: resume"):
        again(root, replace(options, data=data), complete, {})
    copied = shutil.copytree(root, tmp_path / "aligned")
    for shard in copied.rglob("iter_0000100/*.distcp"):
        content = bytearray(shard.read_bytes())
        content[content.rfind(b"PK\x01\x02") + 16] ^= 1  # the CRC-32 of the tensor written last
        shard.write_bytes(content)
    with pytest.raises(OutputError, match="is complete, but differs in the contents of the shards: resume"):
        again(copied, options, complete, {})


def test_limits_are_checked_on_the_report_that_is_there(root, options, outputs):
    before, found = contents(outputs), []
    for limit in (10.0, 1e-9):
        document = again(
            root, options, outputs / "complete", {"options": {"gates": QualityLimits(max_kl=limit, max_ppl_increase=1e6)}}
        )
        found.append([(gate["name"], gate["limit"], gate["met"]) for gate in document["gates"]])
        assert all(gate["value"] is not None for gate in document["gates"])
    assert [gates[0] for gates in found] == [("max_kl", 10.0, True), ("max_kl", 1e-9, False)]
    assert contents(outputs) == before


def test_a_missed_limit_on_a_complete_output_is_exit_code_3(root, tokens, outputs):
    arguments = ["quantize", root, "--recipe", "fp8", "-o", outputs / "complete", "--device", "cpu", "-q", "--resume"]
    arguments += [
        "--calib-dataset",
        tokens,
        "--calib-size",
        6,
        "--eval-size",
        3,
        "--calib-seq-length",
        32,
        "--calib-batch-size",
        4,
    ]
    assert command(*arguments, "--max-kl", "1e-9").returncode == 3
    assert command(*arguments, "--max-kl", "1e-9", "--dry-run").returncode == 0
    done = command(*arguments, "--seed", "1")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "is complete, but differs in --seed (0, now 1): resume with the same options, pass --overwrite" in done.stderr


def test_overwrite_replaces_a_complete_output(root, options, outputs, tmp_path):
    out = shutil.copytree(outputs / "complete", tmp_path / "out")
    again(root, options, out, {"options": {"overwrite": True, "max_shard_bytes": 200_000}})
    assert read_json(out / "manifest.json")["options"]["max_shard_size"] == 200_000
    assert len(list(out.glob("*.safetensors"))) > 1


def test_differences_that_follow_from_an_option_are_not_named():
    made = {"eval_size": 8, "tokens": {"sha256": "a"}, "recipe": {"sha256": "a"}, "format": ["hf"]}
    assert differences(made, made) == []
    assert differences(made, made | {"eval_size": 4, "tokens": {"sha256": "b"}}) == ["--eval-size (8, now 4)"]
    assert differences(made, made | {"tokens": {"sha256": "b"}}) == ["the contents of the data"]
    assert differences(made, made | {"recipe": {"sha256": "b"}}) == [
        "--recipe or --ignore or --kv-cache or --rounding or --keep-bytes"
    ]
    assert differences(made, made | {"format": ["hf", "megatron"]}) == ["--format (hf, now hf,megatron)"]
    assert differences(made, made | {"seed": 0}) == ["--seed"]
    assert differences(made, {key: value for key, value in made.items() if key != "eval_size"}) == ["--eval-size"]
