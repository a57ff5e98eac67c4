"""Float32 block scales as Blackwell serves them, in a run: the weights of the served stream, and its figures."""

import pytest
import torch

from mptq import make_plan, run
from mptq.calibration.hidden_state_pair import HiddenStatePair
from mptq.formats import FORMATS
from mptq.report import read
from tests.unit.quantize.test_powers_of_two import requantized


@pytest.mark.parametrize("formats", [("hf",), ("megatron",), ("megatron", "hf")])
def test_the_served_stream_has_the_weights_of_blackwells_loader(aligned, options, formats, monkeypatch, tmp_path):
    live, serve = [], HiddenStatePair.serve

    def recording(states, layer):
        live.append({name: weight.detach().clone() for name, weight in layer.named_parameters()})
        serve(states, layer)

    monkeypatch.setattr(HiddenStatePair, "serve", recording)
    plan = make_plan(aligned, "fp8-blockwise", formats)
    report = run(plan, tmp_path / "out", options)
    # The first format is the one that is run.
    form, layout = formats[0], plan.layouts[formats[0]]
    stored = FORMATS[form].open(tmp_path / "out" if len(formats) == 1 else tmp_path / "out" / form)
    assert len(live) == plan.model.num_layers
    for layer, weights in enumerate(live):
        for linear in plan.linears(layer):
            parts = FORMATS[form].load_linear(layout, stored, layer, linear)
            served = []
            for part in parts:
                rows, columns = part.data.shape
                data, scale = requantized(part.data, part.scale)
                values = data.float().view(rows // 128, 128, columns // 128, 128) * scale[:, None, :, None]
                served.append(values.view(rows, columns))
            expected = linear.fusion.merge(served) if layout.splits else served[0]
            assert torch.equal(weights[f"{linear.module}.weight"], expected.to(torch.bfloat16))
    fidelity = report["fidelity"]
    assert fidelity["served"]["kl"]["mean"] > fidelity["kl"]["mean"]
    assert fidelity["served"]["tokens"] == fidelity["tokens"]


@pytest.mark.parametrize("recipe", ["fp8-blockwise-ue8m0", "fp8-per-channel"])
def test_other_scales_are_served_as_they_are(aligned, options, recipe, tmp_path):
    run(make_plan(aligned, recipe), tmp_path / "out", options)
    assert read(tmp_path / "out")["fidelity"]["served"] is None
