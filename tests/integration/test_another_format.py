"""Adding a format takes a class and a row in `FORMATS`: run, resume and `verify` with a format that writes .npy files."""

import numpy as np
import pytest
import torch

from mptq import make_plan, run, verify
from mptq.errors import StoppedError
from mptq.formats import FORMATS
from mptq.formats.layout import Layout, canonical_weight
from mptq.formats.protocol import Format, LoadedWeight, OpenedOutput, Stored, Writer
from mptq.model.tensors import CORE_ATTENTION, megatron_layer
from mptq.types import TensorSpec
from tests.conftest import files


class NpyLayout(Layout):
    def linear(self, layer, linear):
        name, scheme = canonical_weight(layer, linear), self.scheme(layer, linear)
        scale = [TensorSpec(f"{name}.scale", scheme.scale_dtype, scheme.grid(*linear.shape))] if scheme else []
        return TensorSpec(name, self.dtype(layer, linear), linear.shape), *scale

    def kv_cache(self, layer):
        return tuple(TensorSpec(f"{megatron_layer(layer)}{CORE_ATTENTION}.{kind}", "float32", ()) for kind in "kv")


class NpyWriter(Writer):
    def __init__(self, directory, specs, done):
        self.directory, self.specs, self.done = directory, specs, done
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def complete(self):
        return [self.directory / f"{name}.npy" for name in self.done]

    def write(self, output):
        written = [self.directory / f"{name}.npy" for name in output.tensors["npy"]]
        for file, tensor in zip(written, output.tensors["npy"].values(), strict=True):
            np.save(file, tensor.contiguous().flatten().view(torch.uint8).numpy())
        return written

    def finish(self):
        return [self.directory / f"{spec.name}.npy" for spec in self.specs]


class NpyFormat(Format):
    name, label, short, layout = "npy", "NumPy", "NumPy", NpyLayout

    def store_linear(self, layout, linear):
        (made,) = linear.weights or [None]
        parts = (made.weight.data, made.weight.scale) if made else (linear.source,)
        return Stored({spec.name: part for spec, part in zip(layout.linear(linear.layer, linear.spec), parts, strict=True)})

    def store_kv_cache(self, layout, cache):
        return Stored({spec.name: value for spec, value in zip(layout.kv_cache(cache.layer), cache.amax, strict=True)})

    def writer(self, layout, directory, _options, resumed):
        return NpyWriter(directory, layout.specs, resumed.names)

    def open(self, directory):
        specs = {spec.name: spec for spec in self.plan.layouts["npy"].specs}

        def load(name):
            raw = torch.from_numpy(np.load(directory / f"{name}.npy"))
            return raw.view(getattr(torch, specs[name].dtype)).reshape(specs[name].shape)

        found = {name: specs[name] for name in specs if (directory / f"{name}.npy").is_file()}
        return OpenedOutput("npy", directory, found, load)

    def scales(self, canonical, weights, scheme, _manifest):
        yield TensorSpec(f"{canonical}.scale", scheme.scale_dtype, scheme.grid(*weights[0]["shape"]))

    def load_linear(self, layout, output, layer, linear):
        weight, *scale = (spec.name for spec in layout.linear(layer, linear))
        yield LoadedWeight(weight, output.load(weight), output.load(scale[0]) if scale else None)


@pytest.fixture
def plan(aligned, monkeypatch):
    monkeypatch.setitem(FORMATS, "npy", NpyFormat())
    NpyFormat.plan = make_plan(aligned, "fp8-blockwise", ("hf", "npy"))
    return NpyFormat.plan


def test_a_run_and_a_resumed_run_write_the_same_files_and_verify(plan, aligned, options, tmp_path):
    from dataclasses import replace

    run(plan, tmp_path / "whole", options)
    asked = iter([False, False, True])
    with pytest.raises(StoppedError):
        run(plan, tmp_path / "resumed", replace(options, stop=lambda: next(asked)))
    run(plan, tmp_path / "resumed", replace(options, resume=True))
    whole, resumed = files(tmp_path / "whole"), files(tmp_path / "resumed")
    reports = {"report.json", "report.html"}
    assert {name: data for name, data in whole.items() if name not in reports} == {
        name: data for name, data in resumed.items() if name not in reports
    }
    assert len([name for name in whole if name.endswith(".npy")]) == len(plan.layouts["npy"].specs)
    found = verify(tmp_path / "resumed", aligned)
    assert (found.failures, found.compared > 40) == ([], True)


def test_a_changed_weight_is_detected(plan, aligned, options, tmp_path):
    run(plan, tmp_path / "out", options)
    file = tmp_path / "out/npy/decoder.layers.0.mlp.linear_fc2.weight.scale.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert verify(tmp_path / "out", aligned).failures == [
        f"npy/{file.name} has changed: its SHA-256 does not match the manifest"
    ]
