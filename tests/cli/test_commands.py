"""The command line as a user runs it: exit codes, one line an error, results on stdout."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from mptq.cli.app import app
from mptq.cli.quantize import parse_size
from tests.conftest import mptq, read_json


def refused(done, *words):
    """One line on stderr, exit code 1, nothing on stdout."""
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("mptq: ")
    for word in words:
        assert word in lines[0], lines[0]


def test_bare_command_does_the_job_beside_the_checkpoint(aligned, tmp_path):
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
    assert document["schema"] == 1
    assert document["recipe"]["name"] == "fp8-blockwise"
    assert (tmp_path / "ckpt-iter_0000100-fp8-blockwise" / "manifest.json").is_file()
    before = (out / "manifest.json").read_bytes()
    assert mptq("quantize", "--recipe", "fp8-blockwise", root, "--overwrite", "-q").returncode == 0
    assert (out / "manifest.json").read_bytes() == before


def test_verbose_has_a_row_for_every_tensor(aligned, tmp_path):
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


def test_tokenizer(aligned, tmp_path):
    (tmp_path / "tok").mkdir()
    for name in ("tokenizer.json", "generation_config.json", "model.safetensors"):
        (tmp_path / "tok" / name).write_text("{}")
    command = ["quantize", "--recipe", "fp8-per-tensor", aligned, "-o", tmp_path / "out", "-q"]
    assert mptq(*command, "--tokenizer", tmp_path / "tok").returncode == 0
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 1000
    refused(mptq(*command, "--overwrite", "--tokenizer", tmp_path / "out" / "none"), "has no tokenizer files")


def test_bad_input_is_one_line(aligned, tmp_path):
    def quantize(checkpoint, *options, recipe="fp8-blockwise"):
        return mptq("quantize", checkpoint, "--recipe", recipe, *options)

    refused(quantize(tmp_path / "none"), "none does not exist")
    refused(quantize(tmp_path), "is not a torch_dist checkpoint")
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
    refused(quantize(broken), "__0_0.distcp is cut short")
    shard.unlink()
    refused(quantize(broken), "__0_0.distcp is missing")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "file", "legacy", "zarr"]


def test_full_disk_is_seen_before_the_run(aligned, tmp_path, monkeypatch):
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


def test_recipes():
    assert "fp8-blockwise   " in mptq("recipes").stdout
    assert "block_size: 128" in mptq("recipes", "fp8-blockwise").stdout
    assert len(json.loads(mptq("recipes", "--json").stdout)["recipes"]) == 3
    assert json.loads(mptq("recipes", "fp8-per-tensor", "--json").stdout)["weights"]["scale"] == "tensor"
    refused(mptq("recipes", "none"), "unknown recipe")


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
