"""Layers, float and quantized. This file imports torch alone, the quantized ones more."""

from layers.add import Add
from layers.cat import Cat
from layers.mul import Mul
from layers.normalize import FromImages, Normalize

__all__ = ["Add", "Cat", "FromImages", "Mul", "Normalize"]
