"""Layers, float and quantized. This file imports torch alone, the quantized ones more."""

from layers.add import Add
from layers.mul import Mul
from layers.normalize import FromImages, Normalize

__all__ = ["Add", "FromImages", "Mul", "Normalize"]
