"""State dicts as other programs save them: in a dictionary, with prefixes, as safetensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from utils.errors import UserError, mendable

State = dict[str, Tensor]

CONTAINERS = ("state_dict", "model_state_dict", "model", "net")
"""Where programs put a state dict beside other things."""
PREFIXES = ("module.", "_orig_mod.", "model.")
"""Of DataParallel, of torch.compile, and of what holds the network as `self.model`."""

SAFETENSORS_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def is_state(content: Any) -> bool:
    """Whether it is a state dict: names and tensors alone, at least one."""
    if not isinstance(content, dict) or not content:
        return False
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())


def unwrapped(content: Any, path: Path) -> State:
    """The state dict in a file's content, alone or in a dictionary; prints what is left aside.

    Raises:
        UserError: there is none, or a dictionary holds several.
    """
    if is_state(content):
        return content
    found = []
    if isinstance(content, dict):
        found = [key for key in CONTAINERS if is_state(content.get(key))]
    if not found:
        raise UserError(f"{path} is not a checkpoint of this project and not a state dict")
    if len(found) > 1:
        what = f"several state dicts ({', '.join(found)})"
        raise UserError(f"{path} holds {what}: save the one by torch.save")
    others = [str(key) for key in content if key != found[0]]
    more = ", ..." if len(others) > 5 else ""
    beside = f"; left aside: {', '.join(others[:5])}{more}" if others else ""
    print(f"{path}: the state dict under {found[0]!r}{beside}")
    return content[found[0]]


def without_prefixes(state: State, own: State) -> tuple[State, str]:
    """`state` without the prefixes that all its names have and the model's `own` lack; those."""
    taken = ""
    fitting = PREFIXES
    while state and fitting:
        fitting = []
        for prefix in PREFIXES:
            everywhere = all(key.startswith(prefix) for key in state)
            if everywhere and not any(key.startswith(prefix) for key in own):
                fitting.append(prefix)
        if fitting:
            state = {key.removeprefix(fitting[0]): value for key, value in state.items()}
            taken += fitting[0]
    return state, taken


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: eight bytes of length, then JSON."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def read_safetensors(path: Path) -> State:
    """The tensors of a safetensors file, by name.

    The format: eight bytes with the length of a header in JSON, the header, then the tensors'
    bytes. The header says of each tensor its type, shape, and first and last byte.

    Raises:
        UserError: the header is damaged, or the tensors do not fill the file without gap or
            overlap.
    """
    state = {}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
            # each begins where the one before it ended, and the last ends where the file does
            begins = [entry["data_offsets"][0] for _, entry in entries]
            ends = [entry["data_offsets"][1] for _, entry in entries]
            if [*begins, path.stat().st_size - 8 - length] != [0, *ends]:
                raise ValueError("tensors overlap or leave a gap, or end elsewhere than the file")
            for name, entry in entries:
                state[name] = _read_tensor(file, name, **entry)
        # JSON of another kind has no such keys and methods, and torch makes no such shape
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            if mendable(error):
                raise
            raise UserError(f"{path} is a damaged safetensors file ({error})") from None
    print(f"{path}: a safetensors file of {len(state)} tensors")
    return state


def _read_tensor(
    file: BinaryIO, name: str, dtype: str, shape: list[int], data_offsets: list[int]
) -> Tensor:
    """The next tensor of a file. That it is long enough is known."""
    if dtype not in SAFETENSORS_TYPES:
        raise ValueError(f"{name[:60]!r} is of type {dtype[:20]}")
    kind = SAFETENSORS_TYPES[dtype]
    begin, end = data_offsets
    if end - begin != math.prod(shape) * kind.itemsize:
        raise ValueError(f"{name[:60]!r} has another number of bytes than its shape")
    tensor = torch.empty(shape, dtype=kind)
    file.readinto(tensor.reshape(-1).view(torch.uint8).numpy())
    return tensor
