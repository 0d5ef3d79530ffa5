"""ONNX Runtime on the CPU as a back end: an independent check of what an exported graph computes.

It runs INT8 graphs with exact INT8 rounding but in float arithmetic: its accuracy is that of an
INT8 engine, its speed is not. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from utils.backends.network import Network, require_ends
from utils.errors import UserError, first_line
from utils.manifest import INPUT, OUTPUT
from utils.records import allowed_threads


class OnnxRuntimeNetwork(Network):
    """An ONNX file as a network.

    Raises:
        UserError: the file is missing, truncated or not a graph that ONNX Runtime can run.
    """

    name = "onnxruntime"

    def __init__(self, path: Path):
        self.path = path
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = allowed_threads()
        # Its CPU kernels cannot fuse signed INT8 with quantized inputs and float residuals, which
        # TensorRT needs, and would dequantize the weights in every call. Taken literally instead,
        # Q/DQ nodes round and the rest is fast float.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        providers = ["CPUExecutionProvider"]
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=providers)
        except Exception as error:  # onnxruntime's exceptions share no base class but this
            raise UserError(
                f"ONNX Runtime cannot load {path}: {first_line(error)}; export it again"
            ) from None
        ports = [*self._session.get_inputs(), *self._session.get_outputs()]
        ends = [(port.name, port.type, len(port.shape)) for port in ports]
        require_ends(path, ends, ("tensor(uint8)", "tensor(float)"))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        try:
            [logits] = self._session.run([OUTPUT], {INPUT: images})
        except Exception as error:  # images of another size, too little memory
            raise UserError(f"ONNX Runtime cannot run {self.path}: {first_line(error)}") from None
        return logits
