"""State dicts as other programs save them: in a dictionary, with prefixes, as safetensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from utils.errors import UserError

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
MOST_HEADER_BYTES = 100_000_000
"""Of a safetensors file, as its specification says."""


def is_state(content: Any) -> bool:
    """Whether it is a state dict: names and tensors alone, at least one."""
    if not isinstance(content, dict) or not content:
        return False
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())


def unwrapped(content: Any, path: Path) -> State | None:
    """The state dict in a file's content, alone or in a dictionary; prints what is left aside.

    Raises:
        UserError: a dictionary holds several.
    """
    if is_state(content):
        return content
    if not isinstance(content, dict):
        return None
    found = [key for key in CONTAINERS if is_state(content.get(key))]
    if len(found) > 1:
        raise UserError(
            f"{path} holds several state dicts ({', '.join(found)}): save the one by torch.save"
        )
    if not found:
        return None
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
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            if length > MOST_HEADER_BYTES:
                raise ValueError("the header is too long")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            spans = _spans(header)
            # each begins where the one before it ended, and the last at the file's end
            end = 0
            for begin, stop, *_ in spans:
                if begin != end:
                    raise ValueError("tensors overlap or leave a gap")
                end = stop
            if 8 + length + end != path.stat().st_size:
                raise ValueError("it is shorter or longer than its header says")
        # JSON of another kind has no such keys and methods
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is a damaged safetensors file ({error})") from None
        state = {}
        for _, _, name, kind, shape in spans:
            state[name] = _read_tensor(file, kind, shape)
    print(f"{path}: a safetensors file of {len(state)} tensors")
    return state


def _spans(header: dict[str, Any]) -> list[tuple[int, int, str, torch.dtype, list[int]]]:
    """First byte, end, name, type and shape of each tensor, in the order of their bytes.

    Raises ValueError, KeyError or TypeError where the header is none.
    """
    spans = []
    for name, entry in header.items():
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        shown = repr(name[:60])
        if entry["dtype"] not in SAFETENSORS_TYPES:
            raise ValueError(f"{shown} is of type {str(entry['dtype'])[:20]}")
        kind = SAFETENSORS_TYPES[entry["dtype"]]
        if not all(type(n) is int and 0 <= n < 2**40 for n in [begin, end, *shape]):
            raise ValueError(f"{shown} has a shape or place that cannot be")
        # a tensor without elements may have any shape, but for torch's 63 bits
        if math.prod(max(n, 1) for n in shape) >= 2**60:
            raise ValueError(f"{shown} has a shape that cannot be")
        if end - begin != math.prod(shape) * kind.itemsize:
            raise ValueError(f"{shown} has another number of bytes than its shape")
        spans.append((begin, end, name, kind, shape))
    return sorted(spans, key=lambda span: span[:2])


def _read_tensor(file: BinaryIO, kind: torch.dtype, shape: list[int]) -> Tensor:
    """The next tensor of a file. That it is long enough is known."""
    tensor = torch.empty(shape, dtype=kind)
    file.readinto(tensor.reshape(-1).view(torch.uint8).numpy())
    return tensor
