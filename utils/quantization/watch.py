"""What a network computes, found by watching one run: its operations, and who reads whose results.

Nothing is traced symbolically, so every network that runs can be watched, whatever its Python does.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from traceback import walk_stack
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from layers.quantized import QuantizedLayer, quantized_form

READS_A_VALUE = (
    "__bool__", "__int__", "__float__", "__complex__", "__index__", "__contains__", "__array__",
    "item", "tolist", "numpy", "equal", "allclose", "is_nonzero",
)  # fmt: skip
OWN_FOLDERS = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))


@dataclass(eq=False)
class Operation:
    """One call of a layer or, outside of layers, of a torch function.

    Args:
        name: the layer's, or that of the module in whose `forward` the function is called.
        module: the layer; None for a function.
        function: the function's name; "" for a layer.
        shapes: of the tensors that it is given; of a function's, parameters and buffers are left
            out.
        shape: of its first result.
        macs: multiply-adds of one image.
        where: file and line of the function's call.
        reads: what made each of these tensors; None for an input, a parameter or a buffer.
        readers: the operations that read its results; one more where the network returns them.
    """

    name: str
    module: nn.Module | None
    function: str
    shapes: list[tuple[int, ...]]
    shape: tuple[int, ...]
    macs: int
    where: str
    reads: list[Operation | None]
    readers: list[Operation] = field(default_factory=list)

    def quantizer(self, operand: int) -> str:
        """The name of what rounds a layer's operand, by its place; "" if nothing does."""
        if not isinstance(self.module, QuantizedLayer):
            return ""
        name = self.module.quantizer_of(operand)
        return f"{self.name}.{name}" if name else ""


class _NoTracker(nullcontext):
    """For `FlopCounterMode`, whose own tracker switches gradients on, as a network might."""

    parents = ("Global",)


class Watch(TorchFunctionMode):
    """Notes the operations of a network while it runs inside of this context.

    Args:
        num_images: how many it is run with.

    Attributes:
        operations: in the order of their calls.
        inputs: name of each module -> arguments of its first call.
        constants: name of each module -> what its calls give it besides tensors, in words.
        value_reads: file and line of each place where Python reads a computed value.
        switch_gradients: names of modules whose `forward` switches gradients on or off.
        parameters_read: those that functions read, outside of their layers.
    """

    def __init__(self, model: nn.Module, num_images: int):
        super().__init__()
        self.operations: list[Operation] = []
        self.inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.constants: dict[str, set[str]] = defaultdict(set)
        self.value_reads: list[str] = []
        self.switch_gradients: set[str] = set()
        self.parameters_read: set[Tensor] = set()
        self._model = model
        self._num_images = num_images
        self._buffers = set(model.buffers())
        # names of the modules whose `forward` is running, the innermost last; None is a layer
        self._running: list[str | None] = []
        self._flops = FlopCounterMode(display=False)
        self._flops.mod_tracker = _NoTracker()
        self._flops_noted = 0
        self._made: dict[Tensor, Operation] = {}
        self._exits = ExitStack()

    def __enter__(self) -> Watch:
        self._hook(self._model, "", set())
        self._exits.enter_context(self._flops)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._exits.close()

    def _hook(self, module: nn.Module, name: str, seen: set[nn.Module]) -> None:
        """Look on at each call of a layer, and at which module's `forward` is running."""
        if module in seen:
            return
        seen.add(module)
        layer = is_layer(module)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._running.append(None if layer else name)
            # copies of the lists, not of the tensors: DenseNet appends to its list later
            self.inputs.setdefault(name, tree_map(lambda value: value, (args, kwargs)))
            given = tree_map_only(Tensor, lambda _: "tensor", (args, kwargs))
            self.constants[name].add(repr(given))

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            if layer:
                self._note(name, module, "", (args, kwargs), out, "")
            self._running.pop()
            if module is self._model:
                self._note_results(out)

        self._exits.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
        self._exits.enter_context(module.register_forward_hook(after, with_kwargs=True))
        # the activation that a BatchNorm may hold is a layer too
        if not layer or isinstance(module, nn.modules.batchnorm._BatchNorm):
            for child_name, child in module.named_children():
                self._hook(child, f"{name}.{child_name}".lstrip("."), seen)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if not self._running or None in self._running:
            return out
        word = getattr(function, "__name__", "")
        if word == "_set_grad_enabled":
            self.switch_gradients.add(self._running[-1])
        where = first_place(walk_stack(sys._getframe()))
        reads_a_value = word in READS_A_VALUE
        if reads_a_value and any(tensor in self._made for tensor in tensors_in((args, kwargs))):
            self.value_reads.append(where)
        else:
            self._note(self._running[-1], None, word, (args, kwargs), out, where)
        return out

    def _note(
        self, name: str, module: nn.Module | None, function: str, given: Any, out: Any, where: str
    ) -> None:
        read, made = tensors_in(given), tensors_in(out)
        if function == "__setitem__":
            # it returns nothing, and changes what it is called on
            made = read[:1]
        if not made:
            return
        parameters = {tensor for tensor in read if isinstance(tensor, nn.Parameter)}
        self.parameters_read |= parameters
        # a layer's operands keep their places
        if module is None:
            read = [t for t in read if t not in parameters and t not in self._buffers]
        flops = self._flops.get_total_flops()
        macs = (flops - self._flops_noted) // 2
        # torch's counter knows no recurrent layers
        if isinstance(module, nn.RNNBase):
            steps = read[0].numel() // module.input_size
            macs = steps * sum(p.numel() for p in module.parameters() if p.ndim == 2)
        operation = Operation(
            name,
            module,
            function,
            shapes=[tuple(tensor.shape) for tensor in read],
            shape=tuple(made[0].shape),
            macs=macs // self._num_images,
            where=where,
            reads=[self._made.get(tensor) for tensor in read],
        )
        for source in operation.reads:
            if source is not None:
                source.readers.append(operation)
        self._flops_noted = flops
        # what works in place returns the tensor that it read: from now on it is this one's
        for tensor in made:
            self._made[tensor] = operation
        self.operations.append(operation)

    def _note_results(self, out: Any) -> None:
        """Whoever calls the network reads what it returns."""
        made = [self._made[tensor] for tensor in tensors_in(out) if tensor in self._made]
        shapes = [operation.shape for operation in made]
        caller = Operation("", None, "return", shapes, (), 0, "", list(made))
        for operation in made:
            operation.readers.append(caller)


def is_quantizable(module: nn.Module | None) -> bool:
    """Whether a layer is quantized or has a quantized form."""
    return isinstance(module, QuantizedLayer) or quantized_form(module) is not None


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one operation: torch's own, a quantizable one, or a BatchNorm."""
    if is_quantizable(module) or isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    return type(module).__module__.startswith("torch.nn") and not any(module.children())


def watch(model: nn.Module, example: Tensor) -> Watch:
    """What `model` computes in evaluation mode of images (B, C, H, W)."""
    with Watch(model, len(example)) as watched:
        run_on(model, example)
    return watched


def run_on(model: nn.Module, images: Tensor) -> Any:
    """What `model` makes in evaluation mode of images (B, C, H, W), on its own device."""
    with evaluating(model):
        # a copy: the first layer may work in place
        return model(images.to(next(model.parameters(), images).device, copy=True))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager: all of `model` is in evaluation mode, and nothing is kept for gradients."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        # a network's own `train` may drop what it computed of its weights for evaluation
        model.train(modes[model])
        for module, training in modes.items():
            module.training = training


def example_images(height: int, width: int, channels: int = 3) -> Tensor:
    """Two images (2, C, H, W) without randomness, as varied as normalised ones."""
    values = torch.arange(2 * channels * height * width, dtype=torch.float32)
    return (values * 0.7).sin().reshape(2, channels, height, width)


def is_plain(module: nn.Module) -> bool:
    """Whether no hook and no `forward` of its own changes what a module's class computes."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def turn_into(old: nn.Module, new: nn.Module) -> None:
    """Let `old` become `new`, under all its names and for whatever else holds it.

    Attributes that `new` lacks stay: a forward may read them.
    """
    old.__class__ = type(new)
    old.__dict__ = {**vars(old), **vars(new)}


def tensors_in(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def first_place(frames: Iterable[tuple[FrameType, int]]) -> str:
    """`net.py:12`, the first that is not torch's or of this folder; "" if there is none."""
    for frame, line in frames:
        file = frame.f_code.co_filename
        # what `modularize` made
        if file.startswith("<forward of"):
            return file.strip("<>")
        if not file.startswith(OWN_FOLDERS):
            return f"{Path(file).name}:{line}"
    return ""
