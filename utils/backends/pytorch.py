"""A torch module as a back end."""

from __future__ import annotations

import numpy as np
import torch

from layers.normalize import FromImages
from utils.backends.network import BURST, Network, repeated_ms
from utils.device import full_precision, memory_format

PAUSE_CYCLES = 100_000_000
"""Of the GPU's clock: about 50 ms."""


class TorchNetwork(Network):
    """A module that takes raw images, in evaluation mode.

    Args:
        name: of the back end; "torch.compile" compiles the module.
    """

    def __init__(self, model: FromImages, device: torch.device, name: str = "pytorch"):
        self.name = name
        self.device_time = device.type == "cuda"
        self._device = device
        self._model = model.to(device, memory_format=memory_format(device, model)).eval()
        if name == "torch.compile":
            # "max-autotune" without Triton's convolutions, which take minutes to compile
            options = {
                "max_autotune": True,
                "triton.cudagraphs": True,
                "max_autotune_conv_backends": "ATEN",
            }
            self._model = torch.compile(self._model, options=options, dynamic=False)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        batch = torch.from_numpy(images).to(self._device)
        with full_precision():
            logits = self._model(batch)
            return logits.float().cpu().numpy()

    @torch.inference_mode()
    def latencies_ms(self, images: np.ndarray) -> np.ndarray:
        """On a GPU the device times of runs that follow each other at once, without copies.

        TF32 is allowed. The runs queue behind a pause of the device, which would otherwise wait
        for Python: this holds as long as the queue has room, about 1000 kernels.
        """
        if self._device.type != "cuda":
            return super().latencies_ms(images)
        batch = torch.from_numpy(images).to(self._device)

        def burst() -> list[float]:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(BURST + 1)]
            torch.cuda._sleep(PAUSE_CYCLES)
            # one event before each run, and one after the last
            for event in events[:-1]:
                event.record()
                self._model(batch)
            events[-1].record()
            events[-1].synchronize()
            pairs = zip(events[:-1], events[1:], strict=True)
            return [start.elapsed_time(end) for start, end in pairs]

        return repeated_ms(burst)
