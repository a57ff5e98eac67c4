"""mptq leaves its host process unchanged: other packages' modules, the garbage collector, logging, warnings, threads."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT

IMPORTS = """
import pkgutil, importlib, mptq
for module in pkgutil.walk_packages(mptq.__path__, "mptq."):
    if module.name != "mptq.__main__":
        importlib.import_module(module.name)
"""
LAYER = """
from mptq.layers.transformer_layer import build_layer
from tests.support.models import DEEPSEEK, model
layer = build_layer(model(DEEPSEEK), 0)
"""
OWN = """
from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding
from megatron.core.transformer import multi_latent_attention
assert multi_latent_attention.YarnRotaryEmbedding is YarnRotaryEmbedding
assert multi_latent_attention.RotaryEmbedding is RotaryEmbedding
"""
RUN = """
from pathlib import Path
from mptq import Options, inspect, load_recipe, make_plan, run, verify
from mptq.calibration.datasets.options import DataOptions
options = Options(device="cpu", data=DataOptions(({tokens!r},), calib_size=2, eval_size=1, seq_length=16))
checkpoint, out = Path({checkpoint!r}), Path({out!r})
run(make_plan(checkpoint, load_recipe({recipe!r}).changed(kv_cache="fp8"), ("hf", "megatron")), out, options)
inspect(checkpoint)
assert not verify(out, checkpoint).failures
"""


def changed(work):
    """What `work` changes in a process that has imported everything that mptq imports: by name, before and after."""
    command = [sys.executable, "-m", "tests.support.hosting", work]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_imports_change_nothing():
    assert changed(IMPORTS) == {}


def test_a_layer_of_latent_attention_leaves_megatrons_module_alone():
    assert changed(LAYER + OWN) == {}


@pytest.mark.parametrize("recipe", ["fp8", "fp8-blockwise"])
def test_a_run_changes_nothing(crossing, tokens, recipe, tmp_path):
    work = RUN.format(tokens=str(tokens), checkpoint=str(crossing), out=str(tmp_path / "out"), recipe=recipe)
    assert changed(work) == {}
