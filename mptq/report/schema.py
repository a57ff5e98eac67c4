"""The typed schema of report.json, version 2. docs/report.md is made from it (scripts/report_reference.py).

`Report.model_validate(document)` raises pydantic's ValidationError for an unknown field, a missing one, one of another
type, and for numbers that JSON cannot hold. `Report.model_json_schema()` is the JSON Schema.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mptq.report.manifest_schema import Form

Bytes = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """A part of the document: no conversions, no unknown fields, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class SourceCheckpoint(Strict):
    """Where the weights came from."""

    path: str = Field(description="directory of the iteration that was read")
    iteration: int | None = Field(description="training iteration, null where the directory does not say it")
    metadata_sha256: str = Field(description="SHA-256 of the checkpoint's metadata file")


class TensorBytes(Strict):
    """Bytes of the model's tensors, headers and byte items not counted; under the name of each format (`hf`), its output's."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[Form, Bytes]

    before: Bytes = Field(alias="in", description="in the checkpoint, bytes")


class Component(TensorBytes):
    """A component of the model (attention, mlp, experts, norms, embedding, ...)."""

    parameters: Count = Field(description="number of parameters")


class Dataset(Strict):
    """A source of calibration documents."""

    name: str = Field(description="name or path, as the user gave it")
    kind: str = Field(description="how it was read: text, jsonl, parquet, megatron, ...")
    weight: float = Field(ge=0, description="share of the mixture that was asked for, before normalization")
    documents: Count = Field(description="documents that were used")
    empty: Count = Field(0, description="documents left out: null, blank or, where each is a sequence, of a single token")
    copies: Count = Field(0, description="documents left out of the calibration set as copies of held-out ones")
    sequences: Count = Field(description="sequences that hold tokens of it")
    tokens: Count = Field(description="tokens that were used")
    sha256: str = Field(description="SHA-256 of the documents that were used")


class Sequences(Strict):
    """A set of token sequences."""

    sequences: Count = Field(description="number of sequences")
    tokens: Count = Field(description="number of tokens, padding not counted")
    sha256: str = Field(description="SHA-256 of the token ids, in order")


class Calibration(Strict):
    """The data that activations were measured on."""

    datasets: list[Dataset] = Field(description="the mixture")
    default_data: bool = Field(description="whether the data that mptq ships was used, for want of any other")
    tokenizer: str | None = Field(description="name of the tokenizer's directory, null where the data were token ids")
    seed: int = Field(description="seed of the choice and order of documents")
    packed: bool = Field(description="whether several documents share a sequence")
    seq_length: Count = Field(description="tokens of a full sequence")
    calibration: Sequences = Field(description="what scales were computed from")
    held_out: Sequences = Field(description="what fidelity was measured on; disjoint from the calibration set")
    activation_bytes: Bytes = Field(description="bytes of the activations kept between two layers")
    activations_on_disk: bool = Field(description="whether these were kept in files instead of memory")
    propagate: Literal["reference", "quantized"] = Field(description="which model's activations calibrated the next layer")
    method: str = Field(description="ModelOpt's calibrator of static scales: max or percentile")
    percentile: float | None = Field(None, description="share of magnitudes kept, percent; absent for other methods")


class Mean(Strict):
    """A mean over tokens with its standard error."""

    mean: float = Field(description="mean over held-out tokens")
    standard_error: float | None = Field(ge=0, description="standard error of that mean; null for a single sequence")


class Perplexity(Strict):
    """Perplexity of the held-out sequences."""

    reference: float = Field(ge=1, description="of the model before quantization")
    quantized: float = Field(ge=1, description="of the quantized model")
    ratio: float = Field(gt=0, description="quantized / reference")
    ratio_standard_error: float | None = Field(ge=0, description="standard error of the ratio; null for a single sequence")


class Fidelity(Strict):
    """How far the quantized model's predictions are from the reference's, on held-out sequences."""

    tokens: Count = Field(description="number of predictions compared")
    sequences: Count = Field(description="number of sequences that they are in; each is one observation of the standard errors")
    kl: Mean = Field(description="Kullback-Leibler divergence of the quantized distribution from the reference's, nats a token")
    perplexity: Perplexity = Field(description="perplexity before and after")
    top1_agreement: Mean = Field(description="share of tokens (0..1) whose most likely successor is the same")


class Gate(Strict):
    """A limit that the user set on fidelity."""

    name: Literal["max_kl", "max_ppl_increase"] = Field(description="the limit's name in the recipe and on the command line")
    limit: float = Field(description="largest value that passes: nats a token for max_kl, percent for max_ppl_increase")
    value: float | None = Field(description="the measured value, in the same unit; null where it was not measured")
    met: bool = Field(description="whether the run passes")


class KvCache(Strict):
    """Static scales of a layer's FP8 KV cache."""

    k_scale: float = Field(
        gt=0, description="key = FP8 code * k_scale; of multi-latent attention the cached latent and shared key"
    )
    v_scale: float = Field(gt=0, description="value = FP8 code * v_scale; of multi-latent attention the same as k_scale")


class Experts(Strict):
    """How calibration covered the experts of a layer."""

    tokens: list[Count] = Field(description="calibration tokens routed to each expert, by its index")
    fallback: list[Count] = Field(description="indices of experts whose static scale came from the layer's largest")


class Layer(Strict):
    """A transformer layer. Under the name of each format (`hf`), the relative error of its weights; null for none quantized."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[Form, Annotated[float, Field(ge=0)] | None]

    layer: Count = Field(description="index of the layer, from 0")
    hidden_relative_error: float | None = Field(
        ge=0, description="norm of the error of the hidden state after it, over the norm of the reference's; null: not measured"
    )
    hidden_cosine: float | None = Field(
        description="cosine of the two hidden states, all tokens as one vector; null: not measured"
    )
    kv_cache: KvCache | None = Field(description="its KV cache scales, null where the recipe has none")
    experts: Experts | None = Field(description="its experts, null for a dense layer or without calibration")


class Tensor(Strict):
    """A quantized weight of an output."""

    format: Form = Field(description="the output that it is in")
    name: str = Field(description="its name there")
    source: str = Field(description="inner Megatron name of the weight that it was made from")
    dtype_before: str = Field(description="dtype in the checkpoint, by torch's name")
    dtype_after: str = Field(description="dtype in the output, by torch's name")
    shape: list[Count] = Field(description="[out, in]")
    amax: float = Field(ge=0, description="largest magnitude before")
    norm: float = Field(ge=0, description="Frobenius norm before")
    relative_error: float = Field(ge=0, description="Frobenius norm of the difference over that of the weight")
    max_abs_error: float = Field(ge=0, description="largest difference of an element")
    sqnr_db: float | None = Field(description="-20 log10 of the relative error, dB; null for no error at all")
    scheme: str = Field(description="how it was quantized, as in `schemes`")
    scale_min: float = Field(ge=0, description="smallest scale; the weight is FP8 code * scale")
    scale_max: float = Field(ge=0, description="largest scale")
    zeros: Share = Field(description="share (0..1) of elements whose FP8 code is zero")
    saturated: Share = Field(description="share (0..1) of elements whose FP8 code has the largest magnitude, 448")
    input_amax: float | None = Field(ge=0, description="largest magnitude of its input behind a static scale; null without one")


class Speed(Strict):
    """Throughput of the run's input and output."""

    read: float | None = Field(
        ge=0, description="checkpoint bytes over the time spent reading, bytes a second; null where this run read nothing"
    )
    write: float | None = Field(
        ge=0, description="output bytes over the time spent writing, bytes a second; null where this run wrote nothing"
    )


class RankShare(Strict):
    """What one process made."""

    rank: Count = Field(description="its number")
    units: Count = Field(description="layers, what stands before and after them, and each tensor that is carried over")
    bytes: Bytes = Field(description="size of their tensors in the outputs, bytes")


class Report(Strict):
    """The document."""

    version: Literal[2] = Field(alias="schema", description="version of this schema")
    recipe: dict[str, Any] = Field(description="the recipe as it was read: name, description and its other keys")
    recipe_sha256: str = Field(description="SHA-256 of the recipe without name and description")
    source: SourceCheckpoint = Field(description="where the weights came from")
    model: dict[str, Any] = Field(description="the model's config: num_layers, hidden_size, vocab_size and so on")
    formats: list[Form] = Field(min_length=1, description="the outputs that were written")
    bytes: TensorBytes = Field(description="size of the model's tensors, bytes")
    components: dict[str, Component] = Field(description="parameters and bytes by component")
    actions: dict[str, str] = Field(description="component -> what happened to it, in words")
    schemes: dict[Form, dict[str, Count]] = Field(
        description="output -> how linears were quantized -> number of Megatron's linears; copied ones by their dtype"
    )
    excluded: list[str] = Field(description="Hugging Face modules that keep their precision")
    differing: list[str] = Field(description="inner names of weights that the outputs hold with different numbers")
    dropped: dict[str, str] = Field(description="key of the checkpoint that no output has -> why")
    predicted_peak_bytes: Bytes = Field(description="peak resident memory that the plan predicted, bytes")
    warnings: list[str] = Field(description="what the user should know, one line each")
    calibration: Calibration | None = Field(description="calibration data, null where the recipe needs none")
    fidelity: Fidelity | None = Field(description="predictions before and after, null where not measured")
    gates: list[Gate] = Field(description="limits that the user set, empty for none")
    relative_error: dict[Form, float | None] = Field(description="output -> relative error of all its quantized weights")
    layers: list[Layer] = Field(min_length=1, description="one entry a layer, in order")
    tensors: list[Tensor] = Field(description="one entry a quantized weight of an output")
    seconds: dict[str, float] = Field(description="stage -> seconds spent in it; total: wall time")
    bytes_per_second: Speed = Field(description="throughput")
    peak_rss_bytes: Bytes = Field(description="peak resident memory of the process, bytes")
    ranks: list[RankShare] = Field(default=[], description="what each process of the run did, one entry a process that did any")
    versions: dict[str, str] = Field(description="package -> version, of what the figures depend on")

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        """What one part of the document says of another, and what the summary takes from it."""
        written = [*self.components.values(), self.bytes]
        wanted = {
            "recipe: its name and description are text": all(isinstance(self.recipe.get(key), str) for key in _RECIPE),
            "components: every output has its bytes": all(
                {*self.formats} == part.__pydantic_extra__.keys() for part in written
            ),
            "actions: every component has one": self.components.keys() <= self.actions.keys(),
            "relative_error: every output has one": {*self.formats} <= self.relative_error.keys(),
            "calibration: a fidelity was measured on data": self.fidelity is None or self.calibration is not None,
        }
        missing = [rule for rule, met in wanted.items() if not met]
        if missing:
            raise ValueError("; ".join(missing))
        return self


_RECIPE = ("name", "description")
