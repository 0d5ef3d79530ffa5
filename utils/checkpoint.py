"""Checkpoints: one file that rebuilds the model without flags and continues training exactly."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.files import atomic_path

FORMAT = 1
RANGE_SUFFIX = "_quantizer._amax"
COUNTER_SUFFIX = ".num_batches_tracked"
"""BatchNorm's count of batches, of no use to its arithmetic here: files older than it, such as torchvision's, lack it."""


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write atomically: a killed process or a full disk leaves what was there before.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_path(path) as partial, partial.open("wb") as file:
        try:
            torch.save({"format": FORMAT, **checkpoint}, file)
        except RuntimeError as error:  # torch's own, raised over that of a failed write
            raise error.__context__ or error from None


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint written by `save`, or a plain state dict, onto the CPU; runs no code from the file.

    Raises:
        UserError: missing, truncated, or something else.
    """
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        there = sorted(p.name for p in folder.glob("ckpt_*"))
        hint = f"; {folder} holds {', '.join(there)}" if there else ""
        raise UserError(f"no checkpoint at {path}{hint}")
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise zipfile.BadZipFile  # torch does not look at its own checksums
        content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception:  # torch's unpickler raises anything on bytes that no checkpoint is made of
        raise UserError(
            f"{path} is truncated, damaged or not a checkpoint; train again or use an earlier one"
        ) from None
    if isinstance(content, dict) and content.get("format") == FORMAT:
        return content
    if (
        isinstance(content, dict)
        and content
        and all(isinstance(value, Tensor) for value in content.values())
    ):
        return {"state": content}
    raise UserError(f"{path} is not a checkpoint of this project and not a state dict")


def load_whole(path: Path) -> dict[str, Any]:
    """As `load`, but raises UserError for a plain state dict, which does not say how to rebuild its network."""
    content = load(path)
    if "model" not in content:
        raise UserError(
            f"{path} is a bare state dict: a checkpoint that train.py wrote is needed here"
        )
    return content


def by_epoch(folder: Path) -> dict[int, Path]:
    """Each `ckpt_<epoch>` of a folder."""
    return {int(p.name[5:]): p for p in folder.glob("ckpt_*") if p.name[5:].isdigit()}


def latest(path: Path) -> Path:
    """`path` itself if it is a file, otherwise the `ckpt_<epoch>` with the highest epoch in that folder."""
    if not path.is_dir():
        return path
    there = by_epoch(path)
    if not there:
        raise UserError(f"{path} holds no ckpt_<epoch> to resume from")
    return there[max(there)]


def load_weights(
    model: nn.Module, state: dict[str, Tensor], allow_missing_ranges: bool = False
) -> str:
    """Load `state` so that every float weight lands exactly once; returns one line that accounts for all of it.

    Args:
        allow_missing_ranges: `state` may be a float model's, the ranges of `model` are still to be calibrated.

    Raises:
        UserError: unexpected, missing, misshapen or not finite tensors, listed. `model` is unchanged then.
    """
    own = model.state_dict()
    ranges = {key for key in own if key.endswith(RANGE_SUFFIX)}
    missing = {key for key in own.keys() - state.keys() if not key.endswith(COUNTER_SUFFIX)}
    uncalibrated = missing & ranges
    problems = {
        "missing": sorted(missing - ranges if allow_missing_ranges else missing),
        "unexpected": sorted(state.keys() - own.keys()),
        "misshapen": sorted(
            key for key in own.keys() & state.keys() if own[key].shape != state[key].shape
        ),
        "not finite": sorted(key for key, value in state.items() if not value.isfinite().all()),
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{len(keys)} {what}: {_first(keys)}" for what, keys in problems.items() if keys
        )
        hint = ""
        if not allow_missing_ranges and missing and missing <= ranges:
            hint = " (a float checkpoint for a quantized model: add --partial_ckpt)"
        elif any(key.endswith(RANGE_SUFFIX) for key in problems["unexpected"]):
            hint = " (a quantized checkpoint for a float model or other --quant_layers)"
        elif problems["not finite"]:
            hint = " (a training that diverged or a damaged file: use another checkpoint)"
        raise UserError(f"the checkpoint does not fit the model{hint}: {listed}")
    model.load_state_dict(state, strict=False)
    loaded_ranges = len(ranges) - len(uncalibrated)
    return (
        f"{len(state) - loaded_ranges} float tensors and {loaded_ranges} ranges loaded, each exactly once; "
        f"0 unexpected, 0 missing, {len(uncalibrated)} ranges left to calibrate"
    )


def _first(keys: list[str], count: int = 5) -> str:
    return ", ".join(keys[:count]) + (", ..." if len(keys) > count else "")
