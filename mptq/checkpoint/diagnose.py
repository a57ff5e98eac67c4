"""What a directory is when it is no torch_dist checkpoint, and what to do with it. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from mptq.errors import CheckpointError

_WRITTEN = ("*.distcp", ".metadata.tmp")  # what there is before the saving ends


def require_torch_dist(directory: Path) -> None:
    """Raise CheckpointError, naming the format where it can be told, unless `directory` is a whole torch_dist checkpoint."""
    backend = _backend(directory / "metadata.json")
    whole = (directory / ".metadata").is_file()
    if any(directory.glob("mp_rank_*")):
        _refuse(directory, "a legacy checkpoint (mp_rank_*)", "load it in Megatron-LM with --ckpt-convert-format torch_dist")
    if backend == "zarr" or any(directory.glob("*/.zarray")):
        _refuse(directory, "a zarr checkpoint", "load it with megatron-core 0.12 or earlier and save it as torch_dist")
    if backend not in ("", "torch_dist", None):
        raise CheckpointError(f"{directory} has the sharded backend {backend[:40]!r}: save it with --ckpt-format torch_dist")
    if backend is None and whole:
        _refuse(
            directory,
            "a checkpoint of format torch_dcp or fsdp_dtensor (.metadata without metadata.json)",
            "save it in Megatron-LM with --ckpt-format torch_dist, or copy metadata.json if it was one",
        )
    if not whole:
        _refuse_without_metadata(directory, backend is not None)


def _refuse_without_metadata(directory: Path, begun: bool) -> None:
    names = sorted(path.name for path in directory.iterdir())
    if not names:
        raise CheckpointError(f"{directory} is empty: give a checkpoint root or an iter_* directory")
    if begun or any(any(directory.glob(pattern)) for pattern in _WRITTEN):
        raise CheckpointError(
            f"{directory} has no .metadata: its saving was cut short, or it was not copied whole; take another iteration"
        )
    if "config.json" in names or any(name.endswith(".safetensors") for name in names):
        _refuse(
            directory,
            "a Hugging Face model",
            "mptq reads Megatron checkpoints; Megatron-Bridge's AutoBridge.import_ckpt makes one of it",
        )
    if (directory / "model_weights").is_dir() and (directory / "model_config.yaml").is_file():
        _refuse(directory, "an unpacked NeMo 1 archive", "convert it with NeMo's convert_nemo1_to_nemo2.py")
    raise CheckpointError(
        f"{directory} has no .metadata: it is not a torch_dist checkpoint; give a checkpoint root or an iter_* directory"
        f"{_nested(directory)}"
    )


def _nested(directory: Path) -> str:
    """Directories below that are checkpoints, which may be meant."""
    found: Iterable[Path] = (path.parent for pattern in ("*", "*/*") for path in directory.glob(f"{pattern}/.metadata"))
    shown = sorted(str(path.relative_to(directory)) for path in found)[:3]
    return f", such as {', '.join(shown)} in it" if shown else ""


def _refuse(directory: Path, what: str, remedy: str) -> None:
    raise CheckpointError(f"{directory} is {what}: {remedy}")


def _backend(config: Path) -> str | None:
    """`sharded_backend` of metadata.json, "" where it says none, or None where there is no such file."""
    try:
        return str(json.loads(config.read_text()).get("sharded_backend", ""))
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{config} is not Megatron's metadata.json ({error}): the checkpoint is damaged") from error
