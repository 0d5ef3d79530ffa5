"""Training in fewer passes over memory: which modules of a network run as one kernel.

A chain is a BatchNorm, perhaps an addition, perhaps an activation, perhaps the rounding of what
reads the result. It is found by watching the network run, so any network has them.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from layers import Add
from layers.quantized import QuantAdd
from layers.quantizers import CODE_MAX, Quantizer
from utils.quantization.watch import Operation, Watch

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

    Only training under CUDA's autocast is changed: whatever else runs computes as before. Classes,
    names and state dicts stay. Ranges must not change any more.

    Args:
        example: normalised images (B, 3, H, W), which a copy of the model is run with.
    """
    try:
        from layers.fused import fused_batch_norm, fused_fake_quantize
    except ImportError:  # Triton comes with torch only where it can run
        return
    for chain in find_chains(model, example):
        _install(model, chain, fused_batch_norm)
    for module in model.modules():
        if isinstance(module, Quantizer) and module.axis in (None, 0):
            _install_rounding(module, fused_fake_quantize)


def find_chains(model: nn.Module, example: Tensor) -> list[Chain]:
    """The chains of a network as it trains: what is random then, such as dropout, ends a chain."""
    twin = copy.deepcopy(model).train()
    with torch.no_grad(), Watch(twin, len(example)) as watched:
        twin(example.to(next(model.parameters()).device))
    calls = Counter(op.name for op in watched.operations if op.module is not None)

    found: list[tuple[Chain, Operation]] = []
    ends: Counter[str] = Counter()
    for op in watched.operations:
        if not _is_plain_norm(op) or calls[op.name] > 1:
            continue
        taken = {chain.add for chain, _ in found}
        chain, last = _chain_from(op, calls, taken)
        ends[chain.activation] += 1
        found.append((chain, last))

    for chain, last in found:
        # one ReLU may end several chains; it stays where it also follows something else
        if chain.activation and ends[chain.activation] < calls[chain.activation]:
            chain.activation = ""
        else:
            chain.quantizers = _quantizers_of(model, last, calls)
    return [chain for chain, _ in found]


def _is_plain_norm(operation: Operation) -> bool:
    norm = operation.module
    if type(norm) is not nn.BatchNorm2d:
        return False
    return norm.affine and norm.track_running_stats and norm.momentum is not None


def _chain_from(
    operation: Operation, calls: Counter[str], taken: set[str]
) -> tuple[Chain, Operation]:
    """The chain that a BatchNorm begins, but for quantizers, and its last operation."""
    chain, last = Chain(operation.name), operation
    reader = _only_reader(last)
    if reader is not None and isinstance(reader.module, Add):
        operand = reader.reads.index(last)
        free = calls[reader.name] == 1 and reader.name not in taken
        if reader.quantizer(operand) or not free or reader.reads.count(last) > 1:
            return chain, last
        chain.add, chain.operand, last = reader.name, operand, reader
        reader = _only_reader(last)
    if reader is not None and type(reader.module) in ACTIVATIONS:
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
    if not names or not all(names):
        return []
    ranges = {float(model.get_submodule(name)._amax) for name in names}
    return names if len(ranges) == 1 else []


def _fusing() -> bool:
    return torch.is_grad_enabled() and torch.is_autocast_enabled("cuda")


def _install(model: nn.Module, chain: Chain, fused: Callable[..., Tensor]) -> None:
    """Give the modules of a chain a `forward` of their own: the first that can does all."""
    norm = model.get_submodule(chain.norm)
    plain_norm = norm.forward
    word = ""
    if chain.activation:
        activation = model.get_submodule(chain.activation)
        word = ACTIVATIONS[type(activation)]
        _pass_on_while_fusing(activation)
    amax = None
    for name in chain.quantizers:
        quantizer = model.get_submodule(name)
        amax = quantizer._amax
        _pass_on_while_fusing(quantizer)
    if not chain.add:
        norm.forward = lambda x: fused(x, norm, None, word, amax) if _fusing() else plain_norm(x)
        return

    add = model.get_submodule(chain.add)
    plain_add = add.forward
    _pass_on_while_fusing(norm)

    def forward(x: Tensor, other: Tensor) -> Tensor:
        if not _fusing():
            return plain_add(x, other)
        operands = [x, other]
        second = 1 - chain.operand
        if isinstance(add, QuantAdd) and (name := add.quantizer_of(second)):
            operands[second] = add.get_submodule(name)(operands[second])
        return fused(operands[chain.operand], norm, operands[second], word, amax)

    add.forward = forward


def _pass_on_while_fusing(module: nn.Module) -> None:
    """Another module of the chain does this one's work; one that ends several is changed once."""
    if "forward" in vars(module):
        return
    plain = module.forward
    module.forward = lambda x: x if _fusing() else plain(x)


def _install_rounding(quantizer: Quantizer, fused: Callable[..., Tensor]) -> None:
    if "forward" in vars(quantizer):
        return
    plain = quantizer.forward
    code_min = -CODE_MAX if quantizer.narrow_range else -CODE_MAX - 1

    def forward(x: Tensor) -> Tensor:
        if not _fusing():
            return plain(x)
        return fused(x, quantizer._amax, code_min, torch.get_autocast_dtype("cuda"))

    quantizer.forward = forward
