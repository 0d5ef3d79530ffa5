"""Networks from elsewhere: torchvision's, timm's, and what a module of the user's own builds."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from torch import nn

from utils.errors import UserError

FORMS = "torchvision/NAME, timm/NAME or package.module:callable"
PROJECT = ("dataset", "layers", "models", "utils")
"""Packages that are imported already: another one of that name cannot be."""


def build(name: str, num_classes: int) -> nn.Module:
    """A freshly initialised network that takes images (N, 3, H, W).

    Importing `package.module` runs its code: whoever calls this has the name from the user.

    Args:
        name: "torchvision/NAME", "timm/NAME", or "package.module:callable", which is importable
            from the working directory and is called with `num_classes=`.

    Raises:
        UserError: no such network, or it cannot be built.
    """
    library, _, network = name.partition("/")
    if library == "torchvision":
        builder = _of_torchvision(network)
    elif library == "timm":
        builder = _of_timm(network)
    elif re.fullmatch(r"[\w.]+:\w+", name):
        builder = _of_module(*name.split(":"))
    else:
        raise UserError(f"--m {name}: a network from elsewhere is {FORMS}")
    try:
        model = builder(num_classes)
    except (Exception, SystemExit) as error:  # it is anyone's code
        raise UserError(
            f"--m {name}: it fails when called with num_classes={num_classes}: {_said(error)}"
        ) from None
    if not isinstance(model, nn.Module):
        raise UserError(f"--m {name}: it returns {type(model).__name__}, not a torch.nn.Module")
    return model


def _of_torchvision(network: str) -> Callable[[int], nn.Module]:
    import torchvision

    _require_name("torchvision", network, torchvision.models.list_models(torchvision.models))
    # googlenet and inception warn unless they are told to initialise, as is their default
    more = {"init_weights": True} if network in ("googlenet", "inception_v3") else {}
    return lambda num_classes: torchvision.models.get_model(
        network, weights=None, num_classes=num_classes, **more
    )


def _of_timm(network: str) -> Callable[[int], nn.Module]:
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise UserError(f"--m timm/{network}: pip install timm first") from None
    # a tag of weights may follow the name; what else timm takes would be downloaded
    _require_name("timm", network.partition(".")[0], timm.list_models())
    return lambda num_classes: timm.create_model(network, pretrained=False, num_classes=num_classes)


def _require_name(library: str, network: str, names: Sequence[str]) -> None:
    if network in names:
        return
    near = difflib.get_close_matches(network, names, n=4, cutoff=0.4)
    hint = f"; near it: {', '.join(near)}" if near else ""
    raise UserError(f"--m {library}/{network}: {library} has no such network{hint}")


def _of_module(module_name: str, attribute: str) -> Callable[[int], nn.Module]:
    module = _imported(module_name)
    what = f"--m {module_name}:{attribute}"
    builder = getattr(module, attribute, None)
    if builder is None:
        near = difflib.get_close_matches(attribute, dir(module), n=4)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise UserError(f"{what}: {module_name} has no {attribute}{hint}")
    if not callable(builder):
        raise UserError(f"{what}: it is {type(builder).__name__}, which cannot be called")
    return lambda num_classes: builder(num_classes=num_classes)


def _imported(name: str) -> ModuleType:
    """A module from the working directory or Python's path."""
    here = str(Path.cwd())
    # as `python -m` has it
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # it is anyone's code
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None or not f"{name}.".startswith(f"{missing}."):
            raise UserError(f"--m: importing {name} fails: {_said(error)}") from None
    top = name.partition(".")[0]
    hint = f"; {top} is a package of this project, give yours another name"
    raise UserError(
        f"--m: no module {missing} in {here} or on Python's path{hint if top in PROJECT else ''}"
    )


def _said(error: BaseException) -> str:
    """An error of code from elsewhere on one line: its type, its text, and where it was raised."""
    if isinstance(error, SystemExit):
        text = "it ends the program; put that behind if __name__ == '__main__'"
    else:
        text = f"{type(error).__name__}: {error}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    # the call itself may be what fails
    return text if frame.filename == __file__ else f"{text} ({frame.filename}, line {frame.lineno})"
