"""Refusals before the first tensor is read, on plans of checkpoints that exist only as metadata."""

import math
import shutil
from dataclasses import replace

import pytest
import torch

from mptq import Options
from mptq.calibration.datasets.options import DataOptions
from mptq.errors import DataError, MptqError, OptionError, OutputError
from mptq.pipeline.preflight import check, pick_device
from mptq.plan.plan import plan_source
from mptq.recipes.recipe import load_recipe
from mptq.report import QualityLimits
from tests.unit.plan.test_plan import source

NOT_RUN = {"fp32_residual_connection": True}
LIMITS = [QualityLimits(max_kl=0.1), QualityLimits(max_ppl_increase=1.0)]


def plan(recipe="fp8-blockwise", **features):
    """A plan for Hugging Face, or for Megatron with features that no Hugging Face architecture has."""
    return plan_source(source(256, 384, 4, 2, 64, **features), load_recipe(recipe), ("megatron" if features else "hf",))


def test_the_forecast_has_the_outputs_that_the_sensitivity_compares(tokens, tmp_path):
    options = Options(data=DataOptions((str(tokens),), eval_size=3, seq_length=32))
    plain, measuring = (check(plan(), tmp_path / "out", replace(options, sensitivity=on)).work for on in (False, True))
    assert measuring == replace(plain, measured_bytes=2 * 3 * 32 * 256 * 2)  # before and after, in BF16


UNMEASURED = pytest.mark.parametrize(
    ("recipe", "features", "eval_size", "reason"),
    [
        ("fp8-blockwise", {}, 0, "--eval-size is 0: use at least 1 sequence"),
        ("fp8-blockwise", NOT_RUN, 8, r"mptq cannot run this model, which has residuals in float32 .*: remove it"),
        ("none", {}, 8, "recipe none quantizes nothing: remove it"),
    ],
    ids=["no sequences", "not run", "not quantized"],
)


@UNMEASURED
@pytest.mark.parametrize("gates", LIMITS, ids=["--max-kl", "--max-ppl-increase"])
def test_a_limit_without_metrics_is_refused(tokens, tmp_path, gates, recipe, features, eval_size, reason):
    options = Options(gates=gates, data=DataOptions((str(tokens),), eval_size=eval_size))
    (flag,) = gates.flags
    with pytest.raises(DataError, match=rf"^a fidelity limit \({flag}\) needs fidelity figures, but {reason}$"):
        check(plan(recipe, **features), tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []


@UNMEASURED
@pytest.mark.parametrize(("flag", "change"), [("--sensitivity", {"sensitivity": True}), ("--unseen-size", {"unseen_size": 2})])
def test_other_options_without_metrics_are_refused(tokens, tmp_path, recipe, features, eval_size, reason, flag, change):
    data, more = (change, {}) if flag == "--unseen-size" else ({}, change)
    options = Options(data=DataOptions((str(tokens),), eval_size=eval_size, **data), **more)
    with pytest.raises(DataError, match=rf"^{flag} needs fidelity figures, but {reason}$"):
        check(plan(recipe, **features), tmp_path / "out", options)


def test_the_unseen_kind_needs_a_tokenizer(tokens, tmp_path):
    options = Options(data=DataOptions((str(tokens),), unseen_size=2))
    with pytest.raises(DataError, match=r"^--unseen-size needs text, but .*: pass --tokenizer DIR$"):
        check(plan(), tmp_path / "out", options)


@pytest.mark.parametrize("limit", [math.nan, math.inf])
def test_a_limit_that_is_not_a_number_is_refused(tokens, tmp_path, limit):
    options = Options(gates=QualityLimits(max_kl=limit), data=DataOptions((str(tokens),)))
    with pytest.raises(OptionError, match="^--max-kl must be finite: omit an option to set no limit$"):
        check(plan(), tmp_path / "out", options)


def test_disk_space_for_activations_is_required_only_if_they_are_used(tokens, tmp_path, monkeypatch):
    """The free space suffices for the output, but not for the hidden states of 256 sequences beyond the memory budget."""
    model = plan()
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(1, 1, 100_000_000))
    data = DataOptions((str(tokens),), eval_size=256)
    options = Options(activation_memory=1, data=data)
    with pytest.raises(OutputError, match="GB free, and the output needs"):
        check(model, tmp_path / "out", options)
    impossible = {
        "no tokenizer": (model, replace(options, data=replace(data, datasets=()))),
        "not wanted": (model, replace(options, data=replace(data, eval_size=0))),
        "not run": (plan(**NOT_RUN), options),
        "not quantized": (plan("none"), options),
    }
    for name, (made, wanted) in impossible.items():
        assert check(made, tmp_path / "out", wanted).work is None, name


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_missing_device_is_refused(tmp_path, device):
    """Also before a dry run."""
    with pytest.raises(MptqError, match=f"^--device {device}"):
        check(plan(), tmp_path / "out", Options(device=device))


def test_each_process_of_a_machine_has_its_own_gpu(monkeypatch):
    """But for a GPU that is named by its number, and where there are fewer than processes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    found = {name: str(pick_device(name)) for name in ("auto", "cuda", "cuda:0", "cpu")}
    assert found == {"auto": "cuda:1", "cuda": "cuda:1", "cuda:0": "cuda:0", "cpu": "cpu"}
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(MptqError, match="^--device cuda:2: this machine has 2 CUDA devices$"):
        pick_device("auto")


def test_options_without_effect_are_named(tokens, tmp_path):
    data = DataOptions((str(tokens),), eval_size=0)

    def notes(made, wanted):
        return [note for note in check(made, tmp_path / "out", wanted).notes if "has no effect" in note]

    unread = "--calib-dataset has no effect: "
    assert notes(plan(), Options(data=data)) == [f"{unread}no scales are calibrated, and --eval-size is 0"]
    assert notes(plan("none"), Options(data=data)) == [f"{unread}recipe none quantizes nothing"]
    assert notes(plan(**NOT_RUN), Options(data=data)) == [f"{unread}mptq cannot run this model"]
    assert notes(plan("fp8"), Options(data=data)) == []
    assert notes(plan(), Options(data=replace(data, eval_size=1), max_shard_bytes=1 << 20)) == []
    alone = plan_source(source(256, 384, 4, 2, 64), load_recipe("fp8"), ("megatron",))
    assert notes(alone, Options(data=data, max_shard_bytes=1 << 20)) == [
        "--max-shard-size has no effect: megatron output has one file per layer"
    ]
