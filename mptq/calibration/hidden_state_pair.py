"""The two streams of hidden states, reference and quantized, that pass through each layer as it is processed."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mptq.calibration.expert_coverage import ExpertCoverage, observed
from mptq.calibration.fidelity import Deviation, NextTokens, token_error
from mptq.calibration.hidden_states import Batch, HiddenStates, batches, chunks, flat
from mptq.calibration.linear_inputs import Inputs, LinearInputs, Reached
from mptq.distributed import Ranks
from mptq.errors import CheckpointError, OutputError
from mptq.layers.forward import embed, final_norm, logits, run_layer, weigh_output
from mptq.model.tensors import megatron_layer
from mptq.output.disk import PieceFile
from mptq.plan.estimates import LOGITS
from mptq.quantize.activation_quantizers import ActivationQuantizers
from mptq.quantize.fp8 import E4M3_MAX, floored, scale_of

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from mptq.calibration.tokens import TokenData
    from mptq.model.tensors import LinearSpec
    from mptq.plan.plan import Plan


type Collected = dict[str, dict[int, Inputs]]
"""Inputs of linears, by module and number of the batch."""


@dataclass(frozen=True)
class HiddenStateOptions:
    """How to run forward passes. Hidden states over `memory` bytes on a rank are kept in files in `folder`."""

    device: torch.device
    batch_size: int
    memory: int
    folder: Path
    moe_min_tokens: int = 0
    ranks: Ranks = field(default_factory=Ranks)


@dataclass
class Calibrated:
    """Result of calibrating a layer: float32 [] magnitudes of the inputs of linears, by module, and of the KV cache.

    `rounded` names those that the quantized stream rounds with: those of the first format. `experts` is the report's
    row.
    """

    observers: ActivationQuantizers
    amax: dict[str, torch.Tensor]
    rounded: Sequence[str]
    experts: dict[str, Any] | None = None


class HiddenStatePair:
    """Hidden states of the held-out and calibration sequences in both streams: the inputs of the next layer.

    Held-out tokens come first, those of the unseen kind from `unseen` on. With `propagate: quantized`, both streams hold
    the held-out tokens, and the quantized one also the calibration tokens; otherwise the reference holds both, and the
    quantized stream only the held-out ones. Rounding that compares the streams has both in both. With several ranks,
    each takes every n-th batch. Calibration batches are the same as with a single rank, so scales are the same bit for
    bit; held-out batches are smaller where there would be too few for all ranks. Memory: tokens * hidden * 2 bytes for
    each stream (for 16-bit models), of the rank's own tokens: in memory up to a budget, in files beyond it.
    """

    def __init__(self, plan: Plan, tokens: TokenData, options: HiddenStateOptions) -> None:
        self.plan, self.options = plan, options
        self.config = plan.model
        self.propagates = plan.recipe.propagates
        self.ids = flat([*tokens.held_out, *tokens.unseen, *tokens.calibration])
        groups = (tokens.held_out, tokens.unseen, tokens.calibration)
        held_out, unseen, calibration = ([len(sequence) for sequence in part] for part in groups)
        self.unseen = sum(held_out)
        ranks = options.ranks
        self.measures, self.calibrates = bool(held_out), bool(calibration)
        together = max(1, min(options.batch_size, len(held_out) // ranks.size))
        evaluated = [*batches(held_out, together), *batches(unseen, together, self.unseen)]
        self.held_out = evaluated[ranks.rank :: ranks.size]
        evaluated_tokens = sum(held_out) + sum(unseen)
        calibrating = batches(calibration, options.batch_size, evaluated_tokens)
        self.calibration, self.calibration_batches = calibrating[ranks.rank :: ranks.size], len(calibrating)
        self.sequences = [one for batch in self.held_out for one in batch.sequences]
        wide = evaluated_tokens + sum(calibration)
        both = calibration and plan.recipe.compares_streams
        counts = [evaluated_tokens if self.propagates and not both else wide, wide if self.propagates else evaluated_tokens]
        counts += [self.unseen] if plan.recipe.is_requantized and self.measures else []
        self.compute_dtype = dtype = getattr(torch, self.config.dtype)
        self.bytes = sum(counts) * self.config.hidden_size * dtype.itemsize
        self.on_disk = self.bytes // ranks.size > options.memory
        folder = options.folder if self.on_disk else None
        self.streams = [
            HiddenStates(count, self.config.hidden_size, dtype, folder, f"{name}-{ranks.rank}")
            for count, name in zip(counts, ("reference", "quantized", "served"), strict=False)
        ]
        self.reference, self.quantized, *served = self.streams
        self.served = served[0] if served else None

    def embed(self, tables: Sequence[torch.Tensor]) -> None:
        """Initializes both streams from the word embeddings [vocabulary, hidden] and any position embeddings."""
        for stream in self.streams:
            for batch in [*self.held_out, *self.calibration]:
                if batch.tokens.stop <= len(stream.states):
                    ids = self.ids[batch.tokens].view(batch.count, batch.length)
                    stream.write(batch, embed(ids.to(tables[0].device), tables))

    def calibrate(self, index: int, layer: TransformerLayer, static: Sequence[LinearSpec]) -> Calibrated:
        """Runs the reference through `layer`, which has its original weights, and collects the amax of its activations.

        `static` are the linears whose inputs have a static scale. With `propagate: quantized`, calibration sequences
        come from the quantized stream. Raises CheckpointError for activations that are not finite, and for a static
        linear that saw no token and has no other expert to take its scale from.
        """
        linears, where = self.plan.linears(index), megatron_layer(index).rstrip(".")
        seen = observed(linears, static)
        for expert in {linear.module.rpartition(".")[0] for linear in seen if linear.expert is not None}:
            weigh_output(layer.get_submodule(expert))
        cached = {form: layout.cached(index) for form, layout in self.plan.layouts.items()}
        of_cache = tuple(dict.fromkeys(chain.from_iterable(cached.values())))
        modules = [linear.module for linear in seen]
        observers = ActivationQuantizers(layer, modules, of_cache, self.plan.recipe.calibration, where)
        coverage = ExpertCoverage(linears)
        # The output of a layer with its original weights is only needed where the reference calibrates.
        if modules or of_cache or coverage.experts or not self.propagates:
            with coverage.counting(layer):
                observers.calibrate(self._collect)
        # Without calibration data, the report counts the held-out tokens of each expert.
        with nullcontext() if self.calibrates else coverage.counting(layer):
            for batch in self.held_out:
                self.reference.write(batch, self._run(layer, self.reference, batch))
        coverage.join(self.options.ranks.all_gather(coverage.tokens))
        magnitudes = self._largest(observers.magnitudes())
        amax = {name: floored(found) for name, found in magnitudes.items()}
        modules = [linear.module for linear in static]
        experts = coverage.complete(amax, self.options.moe_min_tokens, modules)
        for name in (*modules, *of_cache):
            if name not in amax:
                raise CheckpointError(f"{where}.{name}: no token of the calibration data was routed to it: use more data")
        for name in of_cache:
            amax[name] = _representable(amax[name], self.compute_dtype)
        # The quantized stream uses the numbers that the first format stores.
        return Calibrated(observers, amax, tuple(dict.fromkeys((*modules, *cached[self.plan.formats[0]]))), experts)

    def _largest(self, magnitudes: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Returns the maximum of each magnitude over all ranks, without those that are None on every rank."""
        nothing = torch.tensor(-1.0, device=self.options.device)
        found = [nothing if one is None else one for one in magnitudes.values()]
        together = self.options.ranks.all_reduce_max(torch.stack(found) if found else nothing[None][:0])
        return {name: one for name, one in zip(magnitudes, together, strict=True) if one >= 0}

    def _collect(self, layer: torch.nn.Module) -> None:
        """Runs the calibration sequences through a layer with its original weights."""
        source = self.quantized if self.propagates else self.reference
        for batch in self.calibration:
            out = self._run(layer, source, batch)
            if not self.propagates:  # else `compare` writes the outputs of the quantized layer
                source.write(batch, out)

    def inputs(self, layer: torch.nn.Module, wanted: Sequence[LinearSpec], later: Collection[str]) -> Collected:
        """Returns the inputs of the linears `wanted` in the quantized stream, whose `later` linears have not run yet.

        They are by module and number of the batch, among all ranks' batches.
        """
        found = LinearInputs(wanted, later, self.plan.recipe.compares_streams)
        with found.collecting(layer):
            for found.number, batch in self._numbered():
                with suppress(Reached):
                    self._run(layer, self.quantized, batch)
        return found.rows

    def reference_inputs(self, layer: torch.nn.Module, wanted: Sequence[LinearSpec]) -> Collected:
        """Runs the reference's calibration tokens through a layer with its original weights; returns the same of them."""
        found = LinearInputs(wanted, residuals=True)
        with found.collecting(layer):
            for found.number, batch in self._numbered():
                self.reference.write(batch, self._run(layer, self.reference, batch))
        return found.rows

    def _numbered(self) -> Iterator[tuple[int, Batch]]:
        """Yields the rank's calibration batches with their numbers among those of all ranks."""
        ranks = self.options.ranks
        return zip(count(ranks.rank, ranks.size), self.calibration, strict=False)

    def compare(self, index: int, layer: TransformerLayer, calibrated: Calibrated) -> dict[str, float] | None:
        """Runs the quantized stream through `layer`, now with quantized weights, and compares it with the reference.

        Returns None without held-out tokens. Raises CheckpointError for activations that are not finite.
        """
        deviation = Deviation()
        calibrated.observers.round_with({name: calibrated.amax[name] for name in calibrated.rounded})
        for batch in self.held_out:
            out = self._run(layer, self.quantized, batch)
            self.quantized.write(batch, out)
            deviation.add(self.reference.read(batch, out.device), out)
        for batch in self.calibration if self.propagates else ():
            self.quantized.write(batch, self._run(layer, self.quantized, batch))
        mine, deviation = deviation, Deviation()
        deviation.join(self.options.ranks.all_gather(mine))
        if not deviation.finite:
            raise CheckpointError(f"layer {index}: the held-out data produces activations that are not finite")
        if not self.measures:
            return None
        return {
            "hidden_relative_error": deviation.relative_error,
            "hidden_cosine": deviation.cosine,
            "hidden_token_error": deviation.token_error,
        }

    def outputs(self, layer: TransformerLayer) -> list[torch.Tensor]:
        """Returns the outputs of `layer` as it is now for the held-out tokens of the quantized stream, by batch."""
        return [self._run(layer, self.quantized, batch) for batch in self.held_out]

    def change(self, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> float:
        """Returns the mean over all ranks' held-out tokens of the squared change of outputs, relative to what they were."""
        mine = [(token_error(*pair), pair[0].shape[:-1].numel()) for pair in zip(before, after, strict=True)]
        found = [*chain.from_iterable(self.options.ranks.all_gather(mine))]
        tokens: int = sum(count for _, count in found)
        return math.fsum(error for error, _ in found) / tokens

    def serve(self, layer: TransformerLayer) -> None:
        """Runs the served stream through `layer`, now with the weights that Blackwell's loaders make."""
        assert self.served is not None
        for batch in self.held_out:
            if batch.tokens.stop <= len(self.served.states):
                self.served.write(batch, self._run(layer, self.served, batch))

    def finish(self, norm: Sequence[torch.Tensor], head: torch.Tensor) -> dict[str, Any] | None:
        """Compares next-token distributions on the held-out sequences (None without any), and closes both streams.

        `norm` [hidden] are the final norm's weight and, if it has one, its bias; `head` [padded vocabulary, hidden] is
        the output layer's weight. Raises CheckpointError for distributions that are not finite, or that give the
        held-out tokens a probability of zero.
        """
        norm = [weight.to(self.options.device) for weight in norm]
        head = head[: self.config.vocab_size].to(self.options.device).float()
        mine = {"held_out": NextTokens(), "unseen": NextTokens(), "served": NextTokens()}
        for sequence in self.sequences:
            compared = {"unseen" if sequence.start >= self.unseen else "held_out": self.quantized}
            if self.served is not None and sequence.start < self.unseen:
                compared["served"] = self.served
            for name, stream in compared.items():
                predicting = slice(sequence.start, sequence.tokens.stop - 1)
                pieces = chunks(predicting, max(1, LOGITS // self.config.vocab_size))
                mine[name].add(self._piece(stream, piece, norm, head) for piece in pieces)
        self.close()
        if not self.measures:
            return None
        documents, ranks = dict[str, Any](), self.options.ranks.all_gather(mine)
        for name in mine:
            found = NextTokens()
            found.join(one[name] for one in ranks)
            if found and not found.finite:
                raise CheckpointError("output layer: the held-out data produces log probabilities that are not finite")
            documents[name] = found.document if found else None
        return {**documents.pop("held_out"), **documents}

    def save(self, path: Path) -> None:
        """Writes the rank's batches of both streams at their offsets in a file, from which a run can be resumed."""
        # Created by whichever rank comes first, and truncated by none, because others may have written already.
        with PieceFile(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), "wb") as file:
            file.truncate(self.bytes)
            for place, states in self._bytes():
                file.seek(place)
                left = states
                while left:
                    left = left[file.write(left) or 0 :]

    def load(self, path: Path) -> None:
        """Restores what `save` wrote, on any number of ranks; raises OutputError for a file of the wrong size."""
        if path.stat().st_size != self.bytes:
            raise OutputError(f"{path} does not have the expected size: pass --overwrite instead of --resume to start over")
        with path.open("rb", buffering=0) as file:
            for place, states in self._bytes():
                file.seek(place)
                left = states
                while left:
                    left = left[file.readinto(left) or 0 :]

    def _bytes(self) -> Iterator[tuple[int, memoryview]]:
        """Yields the bytes of each of the rank's batches in both streams, with their offset in the file."""
        start = 0
        for states in (stream.states for stream in self.streams):
            width = states.shape[1] * states.itemsize
            for batch in [*self.held_out, *self.calibration]:
                if batch.tokens.stop <= len(states):
                    rows = states[batch.tokens].view(-1).view(torch.uint8)
                    yield start + batch.start * width, memoryview(rows.numpy())
            start += states.nbytes

    def close(self) -> None:
        """Frees the memory and removes the files."""
        for stream in self.streams:
            stream.close()

    def _run(self, layer: torch.nn.Module, stream: HiddenStates, batch: Batch) -> torch.Tensor:
        return run_layer(layer, self.config, stream.read(batch, self.options.device))

    def _piece(
        self, other: HiddenStates, piece: slice, norm: Sequence[torch.Tensor], head: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns float32 logits of the reference and another stream at the tokens `piece`, and the ids that follow them."""
        left, right = (
            logits(final_norm(stream.states[piece].to(self.options.device), norm, self.config), head)
            for stream in (self.reference, other)
        )
        return left, right, self.ids[piece.start + 1 : piece.stop + 1].to(self.options.device)


def _representable(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the smallest magnitude >= `amax` whose scale (amax / 448) is exact in bfloat16 and normal in `dtype`.

    vLLM keeps the scales of the cache in the model's dtype. For a float16 model they are therefore at least 2 ** -14; a
    cache whose largest magnitude is under 448 times that gets an error of at most 2 ** -24.
    """
    scale = scale_of(amax).clamp(min=torch.finfo(dtype).tiny)
    rounded = scale.bfloat16()
    above = torch.nextafter(rounded, torch.full_like(rounded, math.inf))
    return torch.where(rounded.float() >= scale, rounded, above).float() * E4M3_MAX
