"""Quantized layers. This package imports torch alone; `layers.quantized` and what it needs load pytorch-quantization."""

from layers.add import Add
from layers.mul import Mul

__all__ = ["Add", "Mul"]
