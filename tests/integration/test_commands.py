"""The command line as a user runs it: exit codes, one line per error, results on stdout."""

import json
import shutil
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from typer.models import ArgumentInfo
from typer.testing import CliRunner

from mptq import load_recipe, make_plan
from mptq.cli.app import app
from mptq.cli.quantize import parse_size
from mptq.errors import CheckpointError, MptqError
from tests.conftest import mptq, read_json


def refused(done, *words):
    """Check for one line on stderr, exit code 1 and nothing on stdout."""
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("mptq: ")
    for word in words:
        assert word in lines[0], lines[0]


def test_the_default_output_is_next_to_the_checkpoint(aligned, tmp_path):
    root = shutil.copytree(aligned, tmp_path / "ckpt")
    done = mptq("quantize", "--recipe", "fp8-blockwise", root)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "written to" in done.stderr
    out = tmp_path / "ckpt-fp8-blockwise"
    assert (out / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "ckpt-fp8-blockwise"]
    refused(mptq("quantize", "--recipe", "fp8-blockwise", root), "exists", "--overwrite")
    again = mptq("quantize", "--recipe", "fp8-blockwise", root / "iter_0000100", "--quiet", "--json")
    assert again.stderr == ""
    document = json.loads(again.stdout)
    assert document["schema"] == 2
    assert document["recipe"]["name"] == "fp8-blockwise"
    assert (tmp_path / "ckpt-iter_0000100-fp8-blockwise" / "manifest.json").is_file()
    before = (out / "manifest.json").read_bytes()
    assert mptq("quantize", "--recipe", "fp8-blockwise", root, "--overwrite", "-q").returncode == 0
    assert (out / "manifest.json").read_bytes() == before


def test_verbose_prints_a_row_for_every_tensor(aligned, tmp_path):
    done = mptq("quantize", "--recipe", "fp8-per-tensor", aligned, "-o", tmp_path / "out", "-v")
    row = next(line for line in done.stderr.splitlines() if "layers.3.mlp.up_proj.weight" in line)
    assert "bfloat16 384x256 -> float8_e4m3fn 384x256  amax " in row
    assert row.endswith("%")


def test_dry_run_writes_nothing(aligned, crossing, tmp_path):
    out = tmp_path / "out"
    done = mptq("quantize", "--recipe", "fp8-blockwise", crossing, "-o", out, "--dry-run", "--format", "hf,megatron")
    assert done.returncode == 0
    for word in ("attention", "mlp", "embedding", "peak memory", "not multiples of 128", "excluded", "dropped"):
        assert word in done.stdout
    document = json.loads(mptq("quantize", "--recipe", "fp8-blockwise", aligned, "-o", out, "--dry-run", "--json").stdout)
    assert document["output"] == str(out)
    assert document["predicted_peak_bytes"] > document["bytes"]["hf"]
    assert any("pass --tokenizer DIR" in warning for warning in document["warnings"])
    assert list(tmp_path.iterdir()) == []


def test_tokenizer(aligned, tokenizer, tmp_path):
    command = ["quantize", "--recipe", "fp8-per-tensor", aligned, "-o", tmp_path / "out", "-q"]
    assert mptq(*command, "--tokenizer", tokenizer, "--eval-size", 2, "--calib-seq-length", 16).returncode == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert read_json(tmp_path / "out" / "report.json")["fidelity"]["tokens"] == 2 * 15
    refused(mptq(*command, "--overwrite", "--tokenizer", tmp_path / "out" / "none"), "has no tokenizer files")
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    refused(mptq(*command, "--overwrite", "--tokenizer", tmp_path / "tok"), "tok cannot be loaded")


def quick(checkpoint, dataset, out, *options, recipe="fp8-per-channel"):
    data = ["--calib-dataset", dataset, "--calib-size", 3, "--eval-size", 2, "--calib-seq-length", 16, "-q", "--device", "cpu"]
    return mptq("quantize", checkpoint, "--recipe", recipe, "-o", out, *data, *options)


def test_limits_on_the_fidelity(aligned, tokens, tmp_path):
    out = tmp_path / "out"
    done = quick(aligned, tokens, out, "--max-kl", "0.0000001", "--max-ppl-increase", "1000%")
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert f"{out} was written, but the KL divergence is 0." in line
    assert line.endswith(" nats (limit 1e-07 nats)")
    gates = read_json(out / "report.json")["gates"]
    assert [(gate["name"], gate["limit"], gate["met"]) for gate in gates] == [
        ("max_kl", 1e-7, False),
        ("max_ppl_increase", 1000.0, True),
    ]
    assert mptq("verify", out, "--against", aligned).returncode == 0
    assert quick(aligned, tokens, out, "--overwrite", "--max-kl", "10").returncode == 0
    assert mptq("quantize", aligned, "--recipe", "fp8", "--max-ppl-increase", "lots").returncode == 2


def test_ignored_linears_keep_their_precision(aligned, tokens, tmp_path):
    out = tmp_path / "out"
    done = quick(aligned, tokens, out, "--ignore", "decoder.layers.0.*", "--ignore", "*.layers.3.mlp.*", "--eval-size", 0)
    assert done.returncode == 0, done.stderr
    ignored = read_json(out / "config.json")["quantization_config"]["ignore"]
    assert ignored[1] == "model.layers.0.self_attn.q_proj"
    assert ignored[-1] == "model.layers.3.mlp.down_proj"
    assert len(ignored) == 1 + 7 + 3
    assert read_json(out / "report.json")["schemes"] == {"hf": {"bfloat16": 6, "FP8, one scale a row": 10}}
    assert mptq("verify", out, "--against", aligned).returncode == 0
    refused(quick(aligned, tokens, tmp_path / "no", "--ignore", "decoder.layer.0"), "'decoder.layer.0' matches no linear")
    refused(quick(aligned, tokens, tmp_path / "no", "--ignore", "*.q_proj"), "one fused linear in Megatron and in engines")


def test_cache_and_data_are_options_of_every_recipe(aligned, tokens, tmp_path):
    out = tmp_path / "out"
    done = quick(aligned, tokens, out, "--kv-cache", "fp8", "--activation-memory", "1kB", recipe="mxfp8")
    assert done.returncode == 0, done.stderr
    report = read_json(out / "report.json")
    assert report["calibration"]["activations_on_disk"]
    assert report["calibration"]["datasets"][0]["name"] == tokens.name
    assert report["calibration"]["calibration"] | {"sha256": ""} == {"sequences": 3, "tokens": 48, "sha256": ""}
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "hf_quant_config.json",
        "manifest.json",
        "model.safetensors",
        "report.html",
        "report.json",
    ]
    refused(quick(aligned, tokens, tmp_path / "no", "--kv-cache", "int4"), "kv_cache: Input should be 'none' or 'fp8'")


def test_missing_data_is_refused_or_reported(aligned, tmp_path):
    def quantize(*options, recipe="fp8-per-channel"):
        return mptq("quantize", aligned, "--recipe", recipe, "-o", tmp_path / "out", *options)

    refused(quantize(recipe="fp8"), "recipe fp8 calibrates scales on data", "names no tokenizer: pass --tokenizer DIR")
    refused(quantize("--max-kl", 1), "a fidelity limit (--max-kl) needs fidelity figures, but the checkpoint names")
    refused(quantize("--calib-dataset", tmp_path / "none.txt"), "none.txt")
    (tmp_path / "text.txt").write_text("words")
    refused(quantize("--calib-dataset", tmp_path / "text.txt"), "--calib-dataset is text")
    done = quantize("-q", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["fidelity"] is None
    assert any(warning.startswith("no fidelity figures (") for warning in report["warnings"])


def test_bad_input_is_one_line(aligned, tmp_path):
    def quantize(checkpoint, *options, recipe="fp8-blockwise"):
        return mptq("quantize", checkpoint, "--recipe", recipe, *options)

    refused(quantize(tmp_path / "none"), "none does not exist")
    refused(quantize(tmp_path), "is empty")
    refused(quantize(aligned, recipe="fp8-blckwise"), "did you mean 'fp8-blockwise'")
    refused(quantize(aligned, "--format", "gguf"), "unknown format gguf")
    refused(quantize(aligned, "--device", "tpu0x"), "--device tpu0x")
    refused(quantize(aligned, "-o", aligned / "out"), "is inside the checkpoint")
    (tmp_path / "file").touch()
    refused(quantize(aligned, "-o", tmp_path / "file" / "out"), "is a file")
    refused(quantize(aligned, "-o", "/proc/mptq-out"), "/proc")

    zarr = tmp_path / "zarr"
    zarr.mkdir()
    (zarr / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    refused(quantize(zarr), "is a zarr checkpoint", "torch_dist")
    (tmp_path / "legacy" / "mp_rank_00").mkdir(parents=True)
    refused(quantize(tmp_path / "legacy"), "is a legacy checkpoint", "torch_dist")

    broken = shutil.copytree(aligned, tmp_path / "broken")
    shard = broken / "iter_0000100" / "__0_0.distcp"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refused(quantize(broken), "__0_0.distcp is truncated")
    shard.unlink()
    refused(quantize(broken), "__0_0.distcp is missing")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "file", "legacy", "zarr"]


def paths_of_commands():
    """Yield every path on the command line: the command, and arguments with that path as a URL and no other mistake."""
    url = "s3://bucket/run"
    for command in app.registered_commands:
        function = command.callback
        hints = [item for item in get_type_hints(function, include_extras=True).items() if item[0] != "return"]
        paths = {name: hint.__metadata__[0] for name, hint in hints if Path in (hint.__origin__, *get_args(hint.__origin__))}
        given = ["--recipe", "fp8"] if function.__name__ == "quantize" else []
        for name, info in paths.items():
            if isinstance(info, ArgumentInfo):
                yield pytest.param([function.__name__, url, *given], id=f"{function.__name__} {name}")
            else:
                option = f"--{name.replace('_', '-')}"
                yield pytest.param([function.__name__, "x", *given, option, url], id=f"{function.__name__} {option}")


def test_paths_of_commands_covers_every_kind():
    found = {param.id for param in paths_of_commands()}
    assert found >= {"quantize checkpoint", "quantize --output", "quantize --tokenizer", "quantize --hf-config"}
    assert found >= {"inspect path", "verify output", "verify --against", "report output", "report --html"}


@pytest.mark.parametrize("words", paths_of_commands())
def test_remote_paths_are_refused_by_every_option(words):
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, MptqError)
    if words[-2] in ("--output", "--html"):
        assert str(result.exception) == "s3://bucket/run: remote paths are not written: write to a mounted or local directory"
    else:
        assert str(result.exception) == "s3://bucket/run: remote paths are not read: mount or copy it"


def test_remote_checkpoints_and_recipes(tmp_path):
    said = "msc://profile/run/iter_0000100: remote paths are not read: mount or copy it"
    refused(mptq("quantize", "msc://profile/run/iter_0000100", "--recipe", "fp8"), f"mptq: {said}")
    with pytest.raises(MptqError) as failure:
        make_plan(Path("msc://profile/run/iter_0000100").absolute(), "fp8")
    assert str(failure.value) == said
    with pytest.raises(MptqError, match="^gs://bucket/mine.yaml: remote paths are not read"):
        load_recipe("gs://bucket/mine.yaml")
    (tmp_path / "s3:" / "run").mkdir(parents=True)  # an existing directory with such a name
    with pytest.raises(CheckpointError, match="run is empty"):
        make_plan(tmp_path / "s3:" / "run", "fp8")


def test_formats_may_have_spaces_after_commas(aligned, tmp_path):
    command = ("quantize", aligned, "--recipe", "fp8-blockwise", "-o", tmp_path / "out", "--dry-run", "--json", "--format")
    assert json.loads(mptq(*command, "hf, megatron").stdout)["formats"] == ["hf", "megatron"]
    assert mptq(*command, "hf, gguf").stderr == "mptq: unknown format gguf: there are hf, megatron\n"


def test_help_explains_trusted_code():
    text = " ".join(mptq("quantize", "--help").stdout.replace("│", " ").split())
    assert "Let a tokenizer run the Python code in its directory." in text


def test_a_full_disk_is_detected_before_the_run(aligned, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10, 9, 1000))
    result = CliRunner().invoke(app, ["quantize", str(aligned), "--recipe", "fp8-blockwise", "-o", str(tmp_path / "o")])
    assert "0.00 GB free" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_usage_errors():
    assert mptq("quantize").returncode == 2
    assert mptq("quantize", "x", "--recipe", "fp8-blockwise", "--max-shard-size", "lots").returncode == 2
    assert mptq("frobnicate").returncode == 2


def test_debug_shows_the_traceback(tmp_path):
    done = mptq("--debug", "inspect", tmp_path / "none")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("mptq: ")


def test_inspect(aligned, quantized):
    done = mptq("inspect", aligned)
    assert done.returncode == 0
    assert "Llama-like, 4 layers" in done.stdout
    assert done.stderr == ""
    models = json.loads(mptq("inspect", "--json", quantized["aligned", "fp8-blockwise"]).stdout)["models"]
    assert [model["kind"] for model in models] == ["Hugging Face model", "Megatron checkpoint"]


def test_verify(quantized, aligned, tmp_path):
    out = quantized["aligned", "fp8-per-tensor"]
    done = mptq("verify", out, "--against", aligned)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "ok")
    assert json.loads(mptq("verify", out, "--json").stdout)["ok"] is True
    bad = shutil.copytree(out, tmp_path / "bad")
    (bad / "hf" / "config.json").write_text("{}")
    done = mptq("verify", bad)
    assert done.returncode == 3
    assert "hf/config.json" in done.stderr.splitlines()[-1]
    assert json.loads(mptq("verify", bad, "--json").stdout)["ok"] is False


def test_report(quantized, tmp_path):
    out = quantized["crossing", "fp8-blockwise"]
    done = mptq("report", out, "-v")
    assert done.returncode == 0
    assert "weight error" in done.stdout
    assert "amax" in done.stdout
    assert json.loads(mptq("report", out, "--json").stdout) == read_json(out / "report.json")
    refused(mptq("report", tmp_path), "is not an output of mptq")


def test_report_as_html(quantized, tmp_path):
    out = quantized["aligned", "fp8-blockwise"]
    page = tmp_path / "[page].html"
    page.write_text("before")
    done = mptq("report", out, "--html", page, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == f"written to  {page}"
    assert json.loads(done.stdout) == read_json(out / "report.json")
    assert "<h1>fp8-blockwise</h1>" in page.read_text()
    assert [path.name for path in tmp_path.iterdir()] == [page.name]
    refused(mptq("report", out, "--html", tmp_path / "nowhere" / "page.html"), "nowhere is not a directory")
    refused(mptq("report", out, "--html", tmp_path), "is a directory", "report.html")


def test_recipes():
    assert "fp8-blockwise   " in mptq("recipes").stdout
    assert "block_size: 128" in mptq("recipes", "fp8-blockwise").stdout
    assert len(json.loads(mptq("recipes", "--json").stdout)["recipes"]) == 9
    assert json.loads(mptq("recipes", "fp8-per-tensor", "--json").stdout)["weights"]["scale"] == "tensor"
    refused(mptq("recipes", "nothing"), "unknown recipe")


def test_version_help_and_completion():
    assert mptq("--version").stdout.startswith("mptq 0.")
    help_text = mptq("--help").stdout
    for command in ("quantize", "inspect", "verify", "recipes", "report", "--install-completion"):
        assert command in help_text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("5GB", 5_000_000_000),
        ("500 MB", 500_000_000),
        ("1GiB", 2**30),
        ("123", 123),
        ("1.5k", 1500),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes(text, count):
    assert parse_size(text) == count
