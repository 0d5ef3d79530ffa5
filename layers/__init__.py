"""Quantized layers. This package imports torch alone; `layers.quantized` and what it needs load pytorch-quantization."""

from layers.add import Add

__all__ = ["Add"]
