"""Measure and plot time and peak memory of `mptq quantize` by number of layers, on generated Llama-7B-sized checkpoints.

    python scripts/bench_scale.py --work DIR [--layers 8 16 32 78] [--experts 256] [--plot FILE.svg]

Each checkpoint is written layer by layer (78 layers are 16 billion parameters, 32 GB), after a check of the free disk
space, and removed after its run. The layers are copies of one that megatron-core wrote, each rolled by its index.
`--experts` adds a checkpoint of two layers, each with that many experts of 512 hidden units. Runs are without
activations, `fp8-blockwise --format hf`.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from bench_quantize import make_inputs, measure

from mptq.checkpoint.index import open_checkpoint, read_blob
from mptq.checkpoint.reader import Reader
from mptq.formats.megatron.writer import MegatronWriter
from mptq.types import LayerOutput

LAYERS = "decoder.layers."
IMPORTS = (
    "import mptq.pipeline.run, mptq.pipeline.layer_stream, mptq.formats.hf.writer, safetensors, transformers; "
    "transformers.LlamaConfig()"
)
"""The imports of a run without activations."""
EXPERT = 512
"""Hidden size of an expert: a multiple of 128, as in models intended for FP8."""


class Source:
    """A checkpoint of one layer, read once."""

    def __init__(self, path: Path) -> None:
        checkpoint = open_checkpoint(path)
        reader = Reader(checkpoint)
        name = next(name for name in checkpoint.blobs if name.startswith("common_state"))
        blob = read_blob(checkpoint.directory, checkpoint.blobs[name])
        self.common: list[dict[str, Any]] = torch.load(io.BytesIO(blob), weights_only=False)  # written by make_checkpoint.py
        self.tensors = {
            name: reader.read(name, torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)))
            for name, spec in checkpoint.specs.items()
        }

    def layer(self, index: int, experts: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a layer, one by one, with the layer's index in their keys."""
        for name, tensor in self.tensors.items():
            if name.startswith(LAYERS):
                kind = name.removeprefix(LAYERS)
                own = tensor[0].roll(index, -1)
                parts: Iterable[tuple[str, torch.Tensor]] = [(kind, own)]
                if experts and kind in ("mlp.linear_fc1.weight", "mlp.linear_fc2.weight"):
                    parts = _experts(kind, own, experts)
                yield from ((f"{LAYERS}{index}.{key}", part) for key, part in parts)
        if experts:
            hidden = self.tensors["decoder.final_layernorm.weight"].shape[0]
            yield f"{LAYERS}{index}.mlp.router.weight", torch.randn(experts, hidden).bfloat16()

    def outer(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors outside of the layers."""
        yield from ((name, tensor) for name, tensor in self.tensors.items() if not name.startswith(LAYERS))


def _experts(kind: str, weight: torch.Tensor, experts: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of the experts, each a slice of the rows (or columns) of an MLP's weight."""
    for expert in range(experts):
        rolled = weight.roll(expert, 1 if kind.endswith("fc1.weight") else 0)
        part = rolled[: 2 * EXPERT] if kind.endswith("fc1.weight") else rolled[:, :EXPERT]
        yield f"mlp.experts.experts.{expert}.{kind.removeprefix('mlp.')}", part.contiguous()


def size(tensors: Iterator[tuple[str, torch.Tensor]]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.nbytes for _, tensor in tensors)


def write(writer: MegatronWriter, unit: int, tensors: Iterator[tuple[str, torch.Tensor]], blobs: dict[str, bytes]) -> None:
    """Write a unit tensor by tensor."""
    for name, tensor in tensors:
        writer.write(LayerOutput(unit, {"megatron": {name: tensor}}, {"megatron": {}}))
    writer.write(LayerOutput(unit, {"megatron": {}}, {"megatron": blobs}, last=True))


def make(origin: Path, path: Path, layers: int, experts: int) -> int:
    """Write a checkpoint made from the one at `origin`, layer by layer; return its size in bytes."""
    source = Source(origin)
    free, wanted = shutil.disk_usage(path.parent).free, size(source.outer()) + layers * size(source.layer(0, experts))
    if free < 1.6 * wanted:  # the output is half as large
        raise SystemExit(f"{path.parent} has {free / 1e9:.0f} GB free, and {layers} layers need {1.6 * wanted / 1e9:.0f} GB")
    common = copy.deepcopy(source.common)
    args = common[0]["args"]
    args.num_layers = args.encoder_num_layers = layers
    if experts:
        args.num_experts, args.moe_ffn_hidden_size = experts, EXPERT
    blob = io.BytesIO()
    torch.save(common, blob)
    writer = MegatronWriter(path, 100)
    for index in range(layers):
        write(writer, index, source.layer(index, experts), {})
    write(writer, layers, source.outer(), {"common_state/shard_0_1": blob.getvalue()})
    writer.finish()
    return wanted


@dataclass(frozen=True)
class Run:
    """The measurements for a checkpoint with these numbers of layers and experts."""

    layers: int
    experts: int
    parameters: float
    seconds: float
    stream: float
    peak: float

    @property
    def row(self) -> str:
        """The row of the table."""
        what = f"{self.layers} layers" + (f" of {self.experts} experts" if self.experts else "")
        size = f"{self.parameters / 1e9:.2f} | {2 * self.parameters / 1e9:.1f}"
        rate = 2 * self.parameters / 1e9 / self.stream
        return f"| {what} | {size} | {self.seconds:.1f} | {self.stream:.1f} | {rate:.2f} | {self.peak:.2f} |"


def run(work: Path, origin: Path, layers: int, experts: int) -> Run:
    """Create a checkpoint, quantize it in a separate process, and remove both."""
    checkpoint, out = work / f"scale-{layers}-{experts}", work / "out"
    for path in (checkpoint, out):
        shutil.rmtree(path, ignore_errors=True)
    # In a separate process: the peak memory of a child starts at that of its parent.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        stored = pool.submit(make, origin, checkpoint, layers, experts).result()
    os.sync()
    command = [sys.executable, "-m", "mptq", "quantize", str(checkpoint), "--recipe", "fp8-blockwise", "--device", "cpu"]
    seconds, peak = measure([*command, "-q", "--eval-size", "0", "-o", str(out)], work / "log.txt")
    report = json.loads((out / "report.json").read_text())
    for path in (checkpoint, out):
        shutil.rmtree(path)
    return Run(layers, experts, stored / 2, seconds, report["seconds"]["stream"], peak)


def plot(runs: list[Run], path: Path) -> None:
    """Peak memory and time by layers."""
    from matplotlib import pyplot

    figure, (memory, time) = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    layers = [run.layers for run in runs]
    memory.plot(layers, [run.peak for run in runs], "o-")
    time.plot(layers, [run.seconds for run in runs], "o-")
    for axes, label in ((memory, "peak RSS, GB"), (time, "seconds, whole process")):
        axes.set(xlabel="Llama-7B-sized layers", ylabel=label, ylim=(0, None), xlim=(0, None))
        axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run all, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="*", default=[8, 16, 32])
    parser.add_argument("--experts", type=int, default=0)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    packages = ("mptq", "torch")
    print(f"{platform.platform()}, {os.cpu_count()} cores; {', '.join(f'{name} {version(name)}' for name in packages)}\n")
    origin = make_inputs(options.work, 1)[1]
    print("| checkpoint | parameters, billions | BF16, GB | seconds | stream | stream, GB/s | peak RSS, GB |")
    print("|---|---|---|---|---|---|---|")
    _, imports = measure([sys.executable, "-c", IMPORTS], options.work / "log.txt")
    print(f"| none: an empty process with the imports only | | | | | | {imports:.2f} |")
    wanted = [(layers, 0) for layers in options.layers] + ([(2, options.experts)] if options.experts else [])
    runs = []
    for layers, experts in wanted:
        runs.append(run(options.work, origin, layers, experts))
        print(runs[-1].row, flush=True)
    if options.plot:
        plot([run for run in runs if not run.experts], options.plot)


if __name__ == "__main__":
    main()
