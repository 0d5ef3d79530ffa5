"""Training in fewer passes over memory: which modules of a network run as one kernel.

A chain is a BatchNorm, perhaps an addition, perhaps an activation, perhaps the rounding of what
reads the result. It is found by watching the network run, so other people's networks have them too,
as far as their BatchNorms are torch's own.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from layers import Add
from layers.quantized import QuantAdd
from layers.quantizers import Quantizer
from utils.quantization.watch import Operation, Watch, is_plain
from utils.training import kernels

Forward = Callable[..., Tensor]

ACTIVATIONS = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu"}


@dataclass
class Chain:
    """Names of the modules that run as one.

    Args:
        operand: of the addition, 0 or 1, that comes from the BatchNorm.
        quantizers: of all that reads the result; none if anything reads it as it is.
    """

    norm: str
    add: str = ""
    operand: int = 0
    activation: str = ""
    quantizers: list[str] = field(default_factory=list)


def fuse(model: nn.Module, example: Tensor) -> None:
    """Let a network on a GPU train in fused kernels, in place.

    Nothing changes but while `utils.training.kernels.fusing`: whatever else runs, and copies,
    compute as before. Classes, names and state dicts stay. Ranges must not change any more.

    Args:
        example: normalised images (B, 3, H, W), which a copy of the model is run with.
    """
    for chain in find_chains(model, example):
        _install(model, chain)
    for module in model.modules():
        if isinstance(module, Quantizer) and module.axis in (None, 0):
            _replace_forward(module, partial(_round, module))


def find_chains(model: nn.Module, example: Tensor) -> list[Chain]:
    """The chains of a network as it trains: what is random then, such as dropout, ends a chain."""
    copied = copy.deepcopy(model).train()
    with torch.no_grad(), Watch(copied, len(example)) as watched:
        copied(example.to(next(model.parameters()).device))
    calls = Counter(op.name for op in watched.operations if op.module is not None)

    found: list[tuple[Chain, Operation]] = []
    for op in watched.operations:
        if _is_plain_norm(op) and calls[op.name] == 1:
            fused_additions = {chain.add for chain, _ in found}
            found.append(_chain_from(op, calls, fused_additions))

    ends = Counter(chain.activation for chain, _ in found)
    for chain, last in found:
        # one ReLU may end several chains; it stays where it also follows something else
        if chain.activation and ends[chain.activation] < calls[chain.activation]:
            chain.activation = ""
        else:
            chain.quantizers = _quantizers_of(model, last, calls)
    return [chain for chain, _ in found]


def _is_plain_norm(operation: Operation) -> bool:
    """Whether an operation is torch's own BatchNorm, with everything that the kernels expect."""
    norm = operation.module
    if type(norm) is not nn.BatchNorm2d or not is_plain(norm):
        return False
    return norm.affine and norm.track_running_stats and norm.momentum is not None


def _chain_from(
    operation: Operation, calls: Counter[str], fused_additions: set[str]
) -> tuple[Chain, Operation]:
    """The chain that a BatchNorm begins, but for quantizers, and its last operation."""
    chain, last = Chain(operation.name), operation
    reader = _only_reader(last)
    if reader is not None and isinstance(reader.module, Add) and is_plain(reader.module):
        operand = reader.reads.index(last)
        free = calls[reader.name] == 1 and reader.name not in fused_additions
        if reader.quantizer(operand) or not free:
            return chain, last
        chain.add, chain.operand, last = reader.name, operand, reader
        reader = _only_reader(last)
    if reader is not None and type(reader.module) in ACTIVATIONS and is_plain(reader.module):
        chain.activation, last = reader.name, reader
    return chain, last


def _only_reader(operation: Operation) -> Operation | None:
    return operation.readers[0] if len(operation.readers) == 1 else None


def _quantizers_of(model: nn.Module, operation: Operation, calls: Counter[str]) -> list[str]:
    """The quantizers of all that reads a result, if all round it, and to one range."""
    names = []
    for reader in operation.readers:
        for operand, source in enumerate(reader.reads):
            if source is operation:
                names.append(reader.quantizer(operand) if calls[reader.name] == 1 else "")
    if not all(names):
        return []
    ranges = {float(model.get_submodule(name)._amax) for name in names}
    return names if len(ranges) == 1 else []


def _install(model: nn.Module, chain: Chain) -> None:
    """The addition, or else the BatchNorm, runs the kernel; the others return their input."""
    from layers.fused import fused_batch_norm

    norm = model.get_submodule(chain.norm)
    fused = partial(fused_batch_norm, norm=norm)
    if chain.activation:
        activation = model.get_submodule(chain.activation)
        fused = partial(fused, activation=ACTIVATIONS[type(activation)])
        _replace_forward(activation, _return_input)
    for name in chain.quantizers:
        quantizer = model.get_submodule(name)
        fused = partial(fused, amax=quantizer._amax)  # they have one range
        _replace_forward(quantizer, _return_input)
    if chain.add:
        add = model.get_submodule(chain.add)
        _replace_forward(add, partial(_add, add, chain.operand, fused))
        fused = _return_input
    _replace_forward(norm, fused)


def _replace_forward(module: nn.Module, fused: Forward) -> None:
    """Let a module compute `fused` while kernels are fused; one that several chains share, once.

    Only methods and partial functions are kept, which a copy of the module binds to itself.
    """
    if "forward" not in vars(module):
        module.forward = partial(_either, module.forward, fused)


def _either(plain: Forward, fused: Forward, *args: Tensor, **named: Tensor) -> Tensor:
    if kernels.are_fusing():
        return fused(*args, *named.values())  # of one tensor, or of two that we name ourselves
    return plain(*args, **named)


def _return_input(x: Tensor) -> Tensor:
    return x


def _add(add: Add, operand: int, normalise: Forward, x: Tensor, other: Tensor) -> Tensor:
    """The addition of a chain: `normalise`, one kernel, does its BatchNorm and adds.

    The BatchNorm module itself returns its input, so that operand comes here as it was before.
    """
    operands = [x, other]
    second = 1 - operand
    if isinstance(add, QuantAdd) and (name := add.quantizer_of(second)):
        operands[second] = add.get_submodule(name)(operands[second])
    return normalise(operands[operand], other=operands[second])


def _round(quantizer: Quantizer, x: Tensor) -> Tensor:
    from layers.fused import fused_fake_quantize

    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return fused_fake_quantize(x, quantizer._amax, quantizer.code_min, dtype)
