"""Identifies directories that are not torch_dist checkpoints and says what to do with them. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from mptq.errors import CheckpointError

_WRITTEN = ("*.distcp", ".metadata.tmp")  # files that exist before a save is complete


def require_torch_dist(directory: Path) -> None:
    """Raises CheckpointError, naming the format if recognized, unless `directory` is a whole torch_dist checkpoint."""
    backend = _backend(directory / "metadata.json")
    whole = (directory / ".metadata").is_file()
    if any(directory.glob("mp_rank_*")):
        _refuse(directory, "a legacy checkpoint (mp_rank_*)", "load it in Megatron-LM with --ckpt-convert-format torch_dist")
    if backend == "zarr" or any(directory.glob("*/.zarray")):
        _refuse(directory, "a zarr checkpoint", "load it with megatron-core 0.12 or earlier and save it as torch_dist")
    if backend not in ("", "torch_dist", None):
        raise CheckpointError(f"{directory} uses the sharded backend {backend[:40]!r}: save it with --ckpt-format torch_dist")
    if backend is None and whole:
        _refuse(
            directory,
            "a checkpoint of format torch_dcp or fsdp_dtensor (.metadata without metadata.json)",
            "save it in Megatron-LM with --ckpt-format torch_dist; if it is torch_dist, copy its metadata.json too",
        )
    if not whole:
        _refuse_without_metadata(directory, backend is not None)


def _refuse_without_metadata(directory: Path, begun: bool) -> None:
    names = sorted(path.name for path in directory.iterdir())
    if not names:
        raise CheckpointError(f"{directory} is empty: pass a checkpoint root or an iter_* directory")
    if begun or any(any(directory.glob(pattern)) for pattern in _WRITTEN):
        raise CheckpointError(
            f"{directory} has no .metadata: saving was interrupted, or the copy is incomplete; use another iteration"
        )
    if "config.json" in names or any(name.endswith(".safetensors") for name in names):
        _refuse(
            directory,
            "a Hugging Face model",
            "mptq reads Megatron checkpoints; convert it with Megatron-Bridge's AutoBridge.import_ckpt",
        )
    if (directory / "model_weights").is_dir() and (directory / "model_config.yaml").is_file():
        _refuse(directory, "an unpacked NeMo 1 archive", "convert it with NeMo's convert_nemo1_to_nemo2.py")
    raise CheckpointError(
        f"{directory} has no .metadata: it is not a torch_dist checkpoint; pass a checkpoint root or an iter_* directory"
        f"{_nested(directory)}"
    )


def _nested(directory: Path) -> str:
    """Suggests checkpoints in subdirectories, which the user may have meant; empty if there are none."""
    found: Iterable[Path] = (path.parent for pattern in ("*", "*/*") for path in directory.glob(f"{pattern}/.metadata"))
    shown = sorted(str(path.relative_to(directory)) for path in found)[:3]
    return f", such as {', '.join(shown)} in it" if shown else ""


def _refuse(directory: Path, what: str, remedy: str) -> None:
    raise CheckpointError(f"{directory} is {what}: {remedy}")


def _backend(config: Path) -> str | None:
    """Returns `sharded_backend` from metadata.json, "" if it is not set there, or None if the file does not exist."""
    try:
        return str(json.loads(config.read_text()).get("sharded_backend", ""))
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{config} is not Megatron's metadata.json ({error}): the checkpoint is damaged") from error
