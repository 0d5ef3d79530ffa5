"""Networks from elsewhere: torchvision's, timm's, and what a module of the user's own builds."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import nn

from utils.errors import UserError

FORMS = "torchvision/NAME, timm/NAME or package.module:callable"
OWN_PACKAGES = ("dataset", "layers", "models", "utils")


def build(name: str, num_classes: int) -> nn.Module:
    """A freshly initialised network that takes images (N, 3, H, W).

    Args:
        name: as `find` takes it.

    Raises:
        UserError: no such network, or it cannot be built.
    """
    builder = find(name)
    try:
        model = builder(num_classes=num_classes)
    except (Exception, SystemExit) as error:  # it is anyone's code
        raise UserError(
            f"--m {name}: it cannot be built with num_classes={num_classes}: {_said(error)}"
        ) from None
    if not isinstance(model, nn.Module):
        raise UserError(f"--m {name}: it returns {type(model).__name__}, not a torch.nn.Module")
    return model


def find(name: str) -> Callable[..., nn.Module]:
    """What builds a network, called with `num_classes=`.

    Importing `package.module` runs its code: whoever calls this has the name from the user.

    Args:
        name: "torchvision/NAME", "timm/NAME", or "package.module:callable", which is importable
            from the working directory.

    Raises:
        UserError: no such network, or its module cannot be imported.
    """
    library, _, network = name.partition("/")
    if library == "torchvision":
        return _of_torchvision(network)
    if library == "timm":
        return _of_timm(network)
    if re.fullmatch(r"[\w.]+:\w+", name):
        return _of_module(name)
    raise UserError(f"--m {name}: a network from elsewhere is {FORMS}")


def _of_torchvision(network: str) -> Callable[..., nn.Module]:
    import torchvision

    _require_name("torchvision", network, torchvision.models.list_models(torchvision.models))
    # googlenet and inception warn unless they are told to initialise, as is their default
    more = {"init_weights": True} if network in ("googlenet", "inception_v3") else {}
    return partial(torchvision.models.get_model, network, weights=None, **more)


def _of_timm(network: str) -> Callable[..., nn.Module]:
    import timm

    # a tag of weights may follow the name; what else timm takes would be downloaded
    _require_name("timm", network.partition(".")[0], timm.list_models())
    return partial(timm.create_model, network, pretrained=False)


def _require_name(library: str, network: str, names: Sequence[str]) -> None:
    if network not in names:
        near = ", ".join(difflib.get_close_matches(network, names, n=4, cutoff=0.4))
        hint = f"; near it: {near}" if near else ""
        raise UserError(f"--m {library}/{network}: {library} has no such network{hint}")


def _of_module(name: str) -> Callable[..., nn.Module]:
    """A callable of a module, which is in the working directory or on Python's path."""
    module_name, attribute = name.split(":")
    _require_other_name(name, module_name)
    here = str(Path.cwd())
    # as `python -m` has it
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:  # it is anyone's code
        if isinstance(error, ImportError):
            _require_other_name(name, error.name or "")
        raise UserError(f"--m {name}: it cannot be imported: {_said(error)}") from None


def _require_other_name(name: str, module: str) -> None:
    """Raises UserError if a module would be looked for in a package of this project."""
    package = module.partition(".")[0]
    if package in OWN_PACKAGES:
        what = f"{module} is looked for in this project's own {package}"
        raise UserError(f"--m {name}: {what}: give your {package} another name")


def _said(error: BaseException) -> str:
    """An error of code from elsewhere on one line: its type, its text, and where it was raised."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error}, neither in {Path.cwd()} nor on Python's path"
    if isinstance(error, SystemExit):
        text = "it ends the program; put that behind if __name__ == '__main__'"
    else:
        text = f"{type(error).__name__}: {error}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    # the call itself may be what fails
    return text if frame.filename == __file__ else f"{text} ({frame.filename}, line {frame.lineno})"
