"""The loop: plan, check, and for each layer read, quantize, write and free; then finish. Start reading at `run`."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mptq import report
from mptq.arch import naming
from mptq.checkpoint.index import read_blob
from mptq.errors import MptqError, OutputError
from mptq.plan import Plan
from mptq.types import LayerOutput, WeightError
from mptq.writers import manifest
from mptq.writers.hf import HfWriter, hf_config, tokenizer_files
from mptq.writers.output import OutputDirectory, check_output

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from mptq.arch.naming import Copy, Linear
    from mptq.checkpoint.reader import Reader
    from mptq.types import Fp8Weight
    from mptq.writers.megatron import MegatronWriter

MAX_SHARD_BYTES = 5_000_000_000
SLACK_BYTES = 64_000_000
"""Room for what the plan does not count: headers, byte items, tokenizer, manifest and report."""


class Progress(Protocol):
    """What a caller can follow; `row` is a row of the report's `tensors`."""

    def stage(self, done: int, total: int, doing: str) -> None:
        """`done` of `total` steps (embedding, layers, head) are over, and `doing` is next."""

    def tensor(self, row: dict[str, Any]) -> None:
        """A tensor is quantized."""


class Silent:
    """Progress for nobody."""

    def stage(self, done: int, total: int, doing: str) -> None:
        """Say nothing."""

    def tensor(self, row: dict[str, Any]) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class Options:
    """How to run, as against what to do to the model (the recipe). `device` is auto, cpu, cuda or cuda:N."""

    tokenizer: Path | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES
    overwrite: bool = False
    device: str = "auto"


@dataclass
class Record:
    """What a run leaves for the report: a row a tensor, and seconds by stage."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of the block to `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start


def default_output(plan: Plan, given: Path) -> Path:
    """The checkpoint's name, a dash and the recipe's name, beside the checkpoint."""
    root = plan.source.checkpoint.location.root
    name = root.name if given.resolve() == root else f"{root.name}-{plan.source.checkpoint.directory.name}"
    return root.parent / f"{name}-{plan.recipe.name}"


def run(plan: Plan, out: Path, options: Options = Options(), progress: Progress = Silent()) -> dict[str, Any]:  # noqa: B008
    """Quantize the planned checkpoint into `out` and return the report.

    Raises OutputError when `out` cannot be written, and CheckpointError when a tensor cannot be read or holds NaN. `out`
    is complete afterwards, or as it was before. Peak memory: `plan.peak_memory`, whatever the number of layers.
    """
    started = time.perf_counter()
    out = out.resolve()
    tokenizer, notes = check(plan, out, options)
    record = Record()
    with record.timed("imports"):
        stages = _Stages(plan, options.device, record, progress)
    with OutputDirectory(out) as target, ExitStack() as stack:
        writers = _writers(plan, target.partial, options)
        hashes = manifest.FileHashes(target.partial)
        stack.callback(hashes.close)
        for writer in writers:
            stack.callback(writer.abort)
        total = plan.model.num_layers + 2
        for step, output in enumerate(stages.outputs()):
            with record.timed("write"):
                for writer in writers:
                    hashes.add(writer.write(output))
            progress.stage(step + 1, total, "finishing" if step + 1 == total else f"layer {step}")
        with record.timed("finish"):
            for writer in writers:
                hashes.add(_finish(writer, plan, tokenizer))
            files = hashes.collect()
        document = report.build(plan, record.rows, dict(record.seconds), notes, started)
        report.write(target.partial, document)
        manifest.write_manifest(target.partial, report.manifest(plan, files))
    return document


def check(plan: Plan, out: Path, options: Options) -> tuple[Path | None, list[str]]:
    """What must hold before the first tensor is read; returns the tokenizer's directory and the plan's warnings.

    Raises OutputError for an output that cannot be written and for a `--tokenizer` that holds none.
    """
    needed = sum(plan.bytes_out(form) for form in plan.formats) + SLACK_BYTES
    check_output(out, plan.source.checkpoint.location.root, needed, options.overwrite)
    notes = plan.warnings
    if "hf" not in plan.formats:
        return None, notes
    if options.tokenizer is not None:
        if not tokenizer_files(options.tokenizer):
            raise OutputError(
                f"--tokenizer {options.tokenizer} has no tokenizer files: give a Hugging Face tokenizer directory"
            )
        return options.tokenizer, notes
    named = plan.model.tokenizer
    if named and tokenizer_files(Path(named)):
        return Path(named), notes
    where = f"{named!r}, which the checkpoint names, is not on this machine" if named else "the checkpoint names none"
    return None, [*notes, f"no tokenizer in the output ({where}): pass --tokenizer DIR"]


def _writers(plan: Plan, directory: Path, options: Options) -> list[HfWriter | MegatronWriter]:
    """The writers, each in a directory of its own where there are several."""
    made: list[HfWriter | MegatronWriter] = []
    for form in plan.formats:
        place = directory / form if len(plan.formats) > 1 else directory
        if form == "hf":
            made.append(HfWriter(place, plan.specs("hf"), options.max_shard_bytes))
        else:
            from mptq.writers.megatron import MegatronWriter

            made.append(MegatronWriter(place, plan.source.checkpoint.location.iteration))
    return made


def _finish(writer: HfWriter | MegatronWriter, plan: Plan, tokenizer: Path | None) -> Sequence[Path]:
    if isinstance(writer, HfWriter):
        return writer.finish(hf_config(plan.model, plan.recipe.hf, plan.excluded), tokenizer)
    from mptq.quantize.modelopt import modelopt_state

    common = plan.source.checkpoint.directory / "common.pt"
    return writer.finish(modelopt_state(plan.recipe), common.read_bytes() if common.is_file() else None)


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first GPU, or the CPU without one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise MptqError(f"--device {name} is no device: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MptqError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


class _Stages:
    """Read and quantize: turns the plan into one LayerOutput after another."""

    def __init__(self, plan: Plan, device: str, record: Record, progress: Progress) -> None:
        self.device = pick_device(device)
        import mptq.quantize.logical  # noqa: F401 (here, so that "imports" has its time)
        from mptq.checkpoint.reader import Reader

        self.plan = plan
        self.record = record
        self.progress = progress
        self.reader: Reader = Reader(plan.source.checkpoint)

    def outputs(self) -> Iterator[LayerOutput]:
        """The embedding, every layer, and what follows the layers."""
        first, *last = naming.outer_copies(self.plan.model)
        layers = self.plan.model.num_layers
        yield self.outer(0, [first])
        for index in range(layers):
            yield self.layer(index)[1]
        final = self.outer(layers + 1, last)
        checkpoint = self.plan.source.checkpoint
        # The training arguments go over byte by byte: what is never unpickled is never executed.
        final.blobs = {
            name: read_blob(checkpoint.directory, record)
            for name, record in checkpoint.blobs.items()
            if name.partition("/")[0] == "common_state"
        }
        yield final

    def outer(self, index: int, copies: Sequence[Copy]) -> LayerOutput:
        """Tensors outside the layers, as they are, the vocabulary's padding cut off for Hugging Face."""
        output = LayerOutput(index, {form: {} for form in self.plan.formats})
        for copy in copies:
            tensor = self.read(copy.megatron, copy.shape)
            for form in self.plan.formats:
                kept = tensor if form == "megatron" else tensor[: copy.hf_rows]
                output.tensors[form][self.plan.copy_spec(form, copy).name] = kept
        return output

    def layer(self, index: int) -> tuple[TransformerLayer, LayerOutput]:
        """One layer of megatron-core, quantized for good and frozen, and what the writers store of it."""
        import torch

        from mptq.arch.layer import build_layer

        output = LayerOutput(index + 1, {form: {} for form in self.plan.formats})
        module = build_layer(self.plan.model, index)
        prefix = naming.megatron_layer(index)
        for copy in naming.layer_copies(self.plan.model):
            tensor = self.read(prefix + copy.megatron, copy.shape)
            owner, _, attribute = copy.megatron.rpartition(".")
            setattr(module.get_submodule(owner), attribute, torch.nn.Parameter(tensor, requires_grad=False))
            for form in self.plan.formats:
                output.tensors[form][self.plan.copy_spec(form, copy, index).name] = tensor
        for linear in self.plan.linears:
            self.linear(module, linear, index, output)
        return module, output

    def linear(self, module: TransformerLayer, linear: Linear, index: int, output: LayerOutput) -> None:
        """Quantize one linear of `module` in place, and add to `output` what each format stores of it."""
        from mptq.quantize.modelopt import compress_linear

        name = f"{naming.megatron_layer(index)}{linear.megatron}.weight"
        source = self.read(name, linear.shape, float32=True)
        target = module.get_submodule(linear.megatron)
        with self.record.timed("quantize"):
            fused = compress_linear(target, source, self.plan.recipe, name)
        if "megatron" in self.plan.formats:
            self._megatron(target, name, fused, source, output)
        if "hf" in self.plan.formats:
            self._hf(linear, index, fused, source, output)

    def _megatron(
        self, target: torch.nn.Module, name: str, fused: Fp8Weight, source: torch.Tensor, output: LayerOutput
    ) -> None:
        from mptq.quantize.modelopt import megatron_state
        from mptq.writers.megatron import split_gate_up

        self._row("megatron", name, fused, source, name)
        owner = name.removesuffix("weight")
        tensors, blob = megatron_state(target)
        found = split_gate_up(name, fused.data) | {owner + key: tensor for key, tensor in tensors.items()}
        output.tensors["megatron"] |= {key: tensor.cpu() for key, tensor in found.items()}
        output.blobs[f"{owner}_extra_state/shard_0_1"] = blob

    def _hf(self, linear: Linear, index: int, fused: Fp8Weight, source: torch.Tensor, output: LayerOutput) -> None:
        import torch

        from mptq.quantize.logical import to_members

        inner = f"{naming.megatron_layer(index)}{linear.megatron}.weight"
        specs = list(self.plan.hf_linear_specs(index, linear))
        parts = linear.fusion.split(source)
        if not self.plan.in_hf(linear):
            for spec, part in zip(specs, parts, strict=True):
                output.tensors["hf"][spec.name] = part.to(getattr(torch, spec.dtype)).cpu()
            return
        with self.record.timed("quantize"):
            members = to_members(fused, source, linear, self.plan.recipe, inner)
        for (weight, scale), part, member in zip(zip(specs[::2], specs[1::2], strict=True), parts, members, strict=True):
            output.tensors["hf"][weight.name] = member.data.cpu()
            output.tensors["hf"][scale.name] = member.scale.expand(scale.shape).contiguous().cpu()
            self._row("hf", weight.name, member, part, inner)

    def _row(self, form: str, name: str, weight: Fp8Weight, source: torch.Tensor, inner: str) -> None:
        from mptq.quantize.fp8 import weight_error

        with self.record.timed("measure"):
            error: WeightError = weight_error(source, weight, self.plan.recipe.block)
        row = report.tensor_row(form, name, inner, self.plan.source.dtype(inner), tuple(source.shape), error)
        self.record.rows.append(row)
        self.progress.tensor(row)

    def read(self, inner: str, shape: tuple[int, ...], float32: bool = False) -> torch.Tensor:
        """An inner tensor, on the device, in its own dtype or in float32: its parts one above the other."""
        import torch

        dtype = torch.float32 if float32 else getattr(torch, self.plan.source.dtype(inner))
        with self.record.timed("read"):
            tensor = torch.empty(shape, dtype=dtype)
            row = 0
            for part in self.plan.source.places[inner]:
                self.reader.read(part.key, tensor[row : row + part.shape[0]], part.layer)
                row += part.shape[0]
            return tensor.to(self.device) if float32 else tensor
