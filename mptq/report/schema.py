"""The typed schema of report.json, version 2. scripts/report_reference.py generates docs/report.md from it.

`Report.model_validate(document)` raises pydantic's ValidationError for unknown or missing fields, wrong types, and numbers
that JSON cannot represent. `Report.model_json_schema()` returns the JSON Schema.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mptq.report.manifest_schema import Form

Bytes = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """Base class of the document's parts: no type conversions, no unknown fields, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class SourceCheckpoint(Strict):
    """The checkpoint that the weights were read from."""

    path: str = Field(description="directory of the iteration that was read")
    iteration: int | None = Field(description="training iteration; null if the directory name has none")
    metadata_sha256: str = Field(description="SHA-256 of the checkpoint's metadata file")


class TensorBytes(Strict):
    """Bytes of the model's tensors, without headers and byte items. Each output format (`hf`, ...) has a key."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[Form, Bytes]

    before: Bytes = Field(alias="in", description="size in the checkpoint, bytes")


class Component(TensorBytes):
    """A component of the model (attention, mlp, experts, norms, embedding, ...)."""

    parameters: Count = Field(description="number of parameters")


class Dataset(Strict):
    """A source of calibration documents."""

    name: str = Field(description="name or path as given by the user")
    kind: str = Field(description="format: text, jsonl, parquet, megatron, ...")
    weight: float = Field(ge=0, description="requested weight in the mixture, before normalization")
    documents: Count = Field(description="number of documents used")
    empty: Count = Field(0, description="documents skipped: null, blank, or (without packing) a single token")
    copies: Count = Field(0, description="documents skipped in the calibration set as copies of held-out documents")
    sequences: Count = Field(description="number of sequences with tokens of this dataset")
    tokens: Count = Field(description="number of tokens used")
    sha256: str = Field(description="SHA-256 of the documents used")


class Sequences(Strict):
    """A set of token sequences."""

    sequences: Count = Field(description="number of sequences")
    tokens: Count = Field(description="number of tokens, without padding")
    sha256: str = Field(description="SHA-256 of the token ids, in order")


class Unseen(Sequences):
    """Sequences of a kind of text that never calibrates."""

    name: str = Field(description="the kind of text")


class Calibration(Strict):
    """The data used for calibration and fidelity measurements."""

    datasets: list[Dataset] = Field(description="datasets of the mixture")
    default_data: bool = Field(description="whether mptq's default data was used because no dataset was given")
    tokenizer: str | None = Field(description="name of the tokenizer directory; null if the data was token ids")
    seed: int = Field(description="random seed for the selection and order of documents")
    packed: bool = Field(description="whether a sequence can contain several documents")
    seq_length: Count = Field(description="sequence length, tokens")
    calibration: Sequences = Field(description="sequences for calibrating scales")
    held_out: Sequences = Field(description="sequences for measuring fidelity; disjoint from the calibration set")
    unseen: Unseen | None = Field(
        None, description="sequences of a kind of text that never calibrates; null without calibration or tokenizer"
    )
    activation_bytes: Bytes = Field(description="size of the activations kept between layers, bytes")
    activations_on_disk: bool = Field(description="whether these activations were kept in files instead of memory")
    propagate: Literal["reference", "quantized"] = Field(description="model whose activations calibrate the next layer")
    method: str = Field(description="ModelOpt calibrator for static scales: max or percentile")
    percentile: float | None = Field(None, description="percentage of magnitudes kept; absent for other methods")


class Mean(Strict):
    """A mean over tokens with its standard error."""

    mean: float = Field(description="mean over held-out tokens")
    standard_error: float | None = Field(ge=0, description="standard error of the mean; null for a single sequence")


class Perplexity(Strict):
    """Perplexity of the held-out sequences."""

    reference: float = Field(ge=1, description="perplexity of the model before quantization")
    quantized: float = Field(ge=1, description="perplexity of the quantized model")
    ratio: float = Field(gt=0, description="quantized / reference")
    ratio_standard_error: float | None = Field(ge=0, description="standard error of the ratio; null for a single sequence")


class Predictions(Strict):
    """Difference between the predictions of the quantized and the reference model on some sequences."""

    tokens: Count = Field(description="number of predictions compared")
    sequences: Count = Field(description="number of sequences; each counts as one observation in standard errors")
    kl: Mean = Field(description="KL divergence of the quantized from the reference distribution, nats per token")
    kl_of_sequences: list[float] | None = Field(
        None, description="the same of each sequence, to compare runs on the same text; several ranks interleave them"
    )
    perplexity: Perplexity = Field(description="perplexity before and after")
    top1_agreement: Mean = Field(description="fraction of tokens (0..1) with the same most likely next token")


class Fidelity(Predictions):
    """Fidelity on the held-out sequences, and on those of the unseen kind."""

    unseen: Predictions | None = Field(None, description="the same on text of a kind that never calibrates; null without it")
    served: Predictions | None = Field(
        None,
        description="the same on the held-out sequences, as served on Blackwell: with the blocks of the first output quantized "
        "again to power-of-two scales; null without float32 block scales",
    )


class Gate(Strict):
    """A fidelity limit set by the user."""

    name: Literal["max_kl", "max_ppl_increase"] = Field(description="name of the command-line limit")
    text: Literal["held_out", "unseen"] = Field("held_out", description="the sequences that it was measured on")
    limit: float = Field(description="maximum allowed value: nats per token for max_kl, percent for max_ppl_increase")
    value: float | None = Field(description="measured value in the same unit; null if not measured")
    met: bool = Field(description="whether the limit is met")


class KvCache(Strict):
    """Static scales of a layer's FP8 KV cache."""

    k_scale: float = Field(
        gt=0, description="key = FP8 code * k_scale; for multi-latent attention, the cached latent and shared key"
    )
    v_scale: float = Field(gt=0, description="value = FP8 code * v_scale; for multi-latent attention, the same as k_scale")


class Experts(Strict):
    """Calibration coverage of the experts in a layer."""

    tokens: list[Count] = Field(description="calibration tokens routed to each expert, by expert index")
    fallback: list[Count] = Field(description="indices of experts that use the layer's largest static scale")


class Layer(Strict):
    """A transformer layer. Each format (`hf`, ...) has a key: relative weight error, null without quantized weights."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[Form, Annotated[float, Field(ge=0)] | None]

    layer: Count = Field(description="index of the layer, from 0")
    hidden_relative_error: float | None = Field(
        ge=0, description="norm of the hidden-state error after the layer over the reference norm; null if not measured"
    )
    hidden_token_error: float | None = Field(
        None, ge=0, description="root mean square over tokens of the error relative to the token's norm; null if not measured"
    )
    sensitivity: dict[str, Annotated[float, Field(ge=0)]] | None = Field(
        None,
        description="group of linears -> mean squared change of a token's hidden state after the layer when the group is "
        "quantized, relative to its norm; null without --sensitivity",
    )
    hidden_cosine: float | None = Field(
        description="cosine of the two hidden states, with all tokens as one vector; null if not measured"
    )
    kv_cache: KvCache | None = Field(description="KV cache scales; null if the recipe has none")
    experts: Experts | None = Field(description="expert coverage; null for a dense layer or without calibration")


class Tensor(Strict):
    """A quantized weight of an output."""

    format: Form = Field(description="output format")
    name: str = Field(description="tensor name in the output")
    source: str = Field(description="inner Megatron name of the source weight")
    dtype_before: str = Field(description="dtype in the checkpoint, as named by torch")
    dtype_after: str = Field(description="dtype in the output, as named by torch")
    shape: list[Count] = Field(description="[out, in]")
    amax: float = Field(ge=0, description="largest magnitude before quantization")
    norm: float = Field(ge=0, description="Frobenius norm before quantization")
    relative_error: float = Field(ge=0, description="Frobenius norm of the difference over that of the weight")
    max_abs_error: float = Field(ge=0, description="largest absolute error of an element")
    sqnr_db: float | None = Field(description="-20 log10 of the relative error, dB; null if there is no error")
    scheme: str = Field(description="quantization scheme, as in `schemes`")
    scale_min: float = Field(ge=0, description="smallest scale; weight = FP8 code * scale")
    scale_max: float = Field(ge=0, description="largest scale")
    zeros: Share = Field(description="fraction (0..1) of elements whose FP8 code is zero")
    saturated: Share = Field(description="fraction (0..1) of elements whose FP8 code has the largest magnitude, 448")
    served_error: float | None = Field(
        None, ge=0, description="`relative_error` as served on Blackwell, by every eighth row; null if it is the same"
    )
    input_amax: float | None = Field(ge=0, description="input amax of a static input scale; null without one")
    rounding: Literal["nearest", "scales", "gptq", "qep"] = Field("nearest", description="how the weight was rounded")
    output_error: float | None = Field(
        None,
        ge=0,
        description="relative error of the outputs on withheld inputs; null without them, or without `rounding`",
    )
    output_error_nearest: float | None = Field(None, ge=0, description="the same with rounding to nearest")


class Speed(Strict):
    """Read and write throughput of the run."""

    read: float | None = Field(
        ge=0, description="checkpoint bytes read over time spent reading, bytes per second; null if nothing was read"
    )
    write: float | None = Field(
        ge=0, description="output bytes written over time spent writing, bytes per second; null if nothing was written"
    )


class RankShare(Strict):
    """The share of one process."""

    rank: Count = Field(description="rank of the process")
    units: Count = Field(description="number of units: layers, tensors before and after them, and passed-through tensors")
    bytes: Bytes = Field(description="size of the units' tensors in the outputs, bytes")


class Report(Strict):
    """The whole document."""

    version: Literal[2] = Field(alias="schema", description="version of this schema")
    recipe: dict[str, Any] = Field(description="the recipe: name, description and all other keys")
    recipe_sha256: str = Field(description="SHA-256 of the recipe without name and description")
    source: SourceCheckpoint = Field(description="the source checkpoint")
    model: dict[str, Any] = Field(description="model config: num_layers, hidden_size, vocab_size and others")
    formats: list[Form] = Field(min_length=1, description="output formats")
    bytes: TensorBytes = Field(description="size of the model's tensors, bytes")
    components: dict[str, Component] = Field(description="parameters and bytes by component")
    actions: dict[str, str] = Field(description="component -> action, in words")
    schemes: dict[Form, dict[str, Count]] = Field(
        description="output format -> quantization scheme -> number of Megatron linears; copied linears are listed by dtype"
    )
    excluded: list[str] = Field(description="Hugging Face modules excluded from quantization")
    differing: list[str] = Field(description="inner names of weights whose values differ between the outputs")
    dropped: dict[str, str] = Field(description="checkpoint key that is in no output -> reason")
    predicted_peak_bytes: Bytes = Field(description="predicted peak resident memory, bytes")
    warnings: list[str] = Field(description="warnings, one line each")
    calibration: Calibration | None = Field(description="calibration data; null if no activations were computed")
    fidelity: Fidelity | None = Field(description="fidelity on held-out sequences; null if not measured")
    gates: list[Gate] = Field(description="fidelity limits set by the user")
    relative_error: dict[Form, float | None] = Field(description="output format -> relative error of all quantized weights")
    served_error: dict[Form, float | None] = Field(
        default={},
        description="the same as served on Blackwell, which quantizes blocks with float32 scales again; null if the same",
    )
    layers: list[Layer] = Field(min_length=1, description="one entry per layer, in order")
    tensors: list[Tensor] = Field(description="one entry per quantized weight of an output")
    seconds: dict[str, float] = Field(description="stage -> seconds; `total` is the wall time")
    bytes_per_second: Speed = Field(description="throughput")
    peak_rss_bytes: Bytes = Field(description="peak resident memory of the process, bytes")
    ranks: list[RankShare] = Field(default=[], description="one entry per process that wrote units")
    versions: dict[str, str] = Field(description="package -> version, for Python and the packages that affect the results")

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        """Checks that parts of the document are consistent, and have what the summary needs."""
        written = [*self.components.values(), self.bytes]
        wanted = {
            "recipe: name and description must be strings": all(isinstance(self.recipe.get(key), str) for key in _RECIPE),
            "components: every output must have its bytes": all(
                {*self.formats} == part.__pydantic_extra__.keys() for part in written
            ),
            "actions: every component must have one": self.components.keys() <= self.actions.keys(),
            "relative_error: every output must have one": {*self.formats} <= self.relative_error.keys(),
            "calibration: required if fidelity was measured": self.fidelity is None or self.calibration is not None,
        }
        missing = [rule for rule, met in wanted.items() if not met]
        if missing:
            raise ValueError("; ".join(missing))
        return self


_RECIPE = ("name", "description")
