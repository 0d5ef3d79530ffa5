"""State dicts as other programs save them: in a dictionary, with prefixes, as safetensors."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.errors import UserError, and_more, mendable

State = dict[str, Tensor]

CONTAINERS = ("state_dict", "model_state_dict", "model", "net")
"""Which of several state dicts is the network's, whatever averages stand beside it."""


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
    keys = list(content) if isinstance(content, dict) else []
    found = [key for key in keys if is_state(content[key])]
    if len(found) > 1:
        found = [key for key in found if key in CONTAINERS] or found
    if not found:
        what = "is not a checkpoint of this project and not a state dict"
        has = f" (its keys are {_named(keys)})" if keys else ""
        raise UserError(f"{path} {what}{has}: save model.state_dict() with torch.save")
    if len(found) > 1:
        raise UserError(f"{path} holds several state dicts ({_named(found)}): save one alone")
    others = [key for key in keys if key != found[0]]
    beside = f"; left aside: {_named(others)}" if others else ""
    print(f"{path}: the state dict under {found[0]!r}{beside}")
    return content[found[0]]


def _named(keys: list[Any]) -> str:
    return and_more([str(key) for key in keys], 5)


def without_prefix(state: State, own: State) -> tuple[State, str]:
    """What `state` has under a prefix such as "module.", and a line that says so; or itself.

    It is the prefix, if any, under which the most of the model's `own` names stand, over half.

    Raises:
        UserError: there are several, as of a network and an average of it.
    """
    # of each name, whatever may be a prefix, "" too
    found = Counter()
    for key in state:
        parts = key.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in own:
                found[".".join([*parts[:start], ""])] += 1
    most = max(found.values(), default=0)
    prefixes = sorted(prefix for prefix, count in found.items() if count == most > len(own) / 2)
    if not prefixes or "" in prefixes:
        return state, ""
    if len(prefixes) > 1:
        which = and_more(prefixes, 5)
        raise UserError(
            f"the file has the network under several prefixes ({which}): save one alone"
        )

    prefix = prefixes[0]
    within = {key: value for key, value in state.items() if key in own}
    within |= {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    line = f"the names without their prefix {prefix}"
    beside = [key for key in state if not key.startswith(prefix) and key not in own]
    if beside:
        line += f"; {len(beside)} left aside: {and_more(beside, 5)}"
    return within, line


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: eight bytes of length, then JSON."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def read_safetensors(path: Path) -> State:
    """The tensors of a safetensors file, by name.

    Raises:
        UserError: it is damaged.
    """
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except Exception as error:  # its own, and Python's where the file's numbers make no sense
        if mendable(error):
            raise
        raise UserError(f"{path} is a damaged safetensors file ({error})") from None
    print(f"{path}: a safetensors file of {len(state)} tensors")
    return state
