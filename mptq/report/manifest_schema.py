"""The typed schema of manifest.json, used to validate it on writing and on reading. Does not import torch."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from mptq.formats import FORMATS
from mptq.formats.hf.quantization_config import DIALECTS
from mptq.types import DTYPE_BYTES

Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def _within(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise ValueError("file outside of the output directory")
    return name


def _format(name: str) -> str:
    if name not in FORMATS:
        raise ValueError(f"unknown format, expected one of {', '.join(FORMATS)}")
    return name


Form = Annotated[str, AfterValidator(_format)]
"""The name of an output format."""


def _known(dtype: str) -> str:
    if dtype not in DTYPE_BYTES:
        raise ValueError("unknown dtype")
    return dtype


class Part(BaseModel):
    """Base class of the manifest's parts: no type conversions."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class Item(Part):
    """A tensor of an output."""

    name: str
    dtype: Annotated[str, AfterValidator(_known)]
    shape: list[Count]


class Place(Part):
    """The place of a source tensor in the checkpoint: its key, and its index in a stack."""

    key: str
    index: list[Count] = []


class Entry(Part):
    """A source tensor: places in the checkpoint, scheme by format, and its tensors under the name of each format."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[Form, list[Item]]

    places: list[Place] = Field(alias="from")
    scheme: dict[Form, str] = {}

    @model_validator(mode="after")
    def _matrices_have_schemes(self) -> Self:
        for form, items in self.__pydantic_extra__.items():
            quantized = [item for item in items if item.dtype == "float8_e4m3fn"]
            if quantized and form not in self.scheme:
                raise ValueError(f"its {form} output is in FP8 but has no scheme")
            if any(len(item.shape) != 2 for item in quantized):
                raise ValueError("FP8 tensor is not a matrix")
        return self


class File(Part):
    """A file of the output."""

    size: Count = Field(alias="bytes")
    sha256: Sha256


class Source(Part):
    """The checkpoint that the output was made from."""

    iteration: int | None
    metadata_sha256: Sha256


class Recipe(Part):
    """The recipe; recipe.py checks its other fields when they are used."""

    name: str


class Manifest(Part):
    """The whole document."""

    version: Literal[3] = Field(alias="schema")
    mptq: str
    recipe: Recipe
    source: Source
    options: dict[str, Any]
    formats: list[Form] = Field(min_length=1)
    dialect: str | None
    tensors: dict[str, Entry]
    kv_cache: dict[Form, list[Item]]
    dropped: dict[str, str]
    files: dict[Annotated[str, AfterValidator(_within)], File]

    @model_validator(mode="after")
    def _dialect_is_known(self) -> Self:
        if self.dialect is not None and self.dialect not in DIALECTS:
            raise ValueError(f"unknown dialect {self.dialect!r}, expected one of {', '.join(DIALECTS)}")
        return self


def problems(model: type[BaseModel], document: Any) -> list[str]:
    """Returns the schema violations of a JSON document as `location: message` lines; empty if it is valid."""
    from pydantic import ValidationError

    try:
        model.model_validate(document)
    except ValidationError as error:
        return [f"{'.'.join(map(str, item['loc'])) or 'document'}: {item['msg']}" for item in error.errors()]
    return []
