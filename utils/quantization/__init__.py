"""Quantize a float network layer by layer, and export it.

A network of your own takes these lines and its own training loop:

    quantize_modules(model, images, skip_layers=["fc"])  # in place
    calibrate(model, batches)  # normalised images (B, C, H, W)
    fine_tune(model)
    export_onnx(model, "model.onnx", image_size=(32, 32), mean=mean, std=std)
"""

from utils.quantization.calibrate import calibrate
from utils.quantization.export import export_onnx
from utils.quantization.swap import quantize_modules
from utils.quantization.table import layer_table

__all__ = ["calibrate", "export_onnx", "layer_table", "quantize_modules"]
