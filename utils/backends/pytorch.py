"""A torch module as a back end, and the raw images' way into it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from utils.backends.network import BURST, Network, repeated_ms

PAUSE_CYCLES = 100_000_000  # of the GPU's clock: about 50 ms


@contextmanager
def full_precision() -> Iterator[None]:
    """Meanwhile, float32 convolutions on a GPU multiply in float32.

    By default they round their operands to TF32's 11 bits, which moves values across the ties of the next quantizer: a fake
    quantized network would no longer predict what its INT8 engine does.
    """
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class FromImages(nn.Module):
    """`model` behind the normalisation of raw images: (N, H, W, 3) uint8 -> what `model` makes of (N, 3, H, W).

    Args:
        mean, std: of each channel, in units of the full range.
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model = model
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in std]).reshape(3, 1, 1))
        self.register_buffer(
            "offset",
            torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).reshape(3, 1, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        x = images.to(self.scale.dtype).permute(
            0, 3, 1, 2
        )  # TensorRT takes bytes only if a cast is the first to read them
        return self.model(x * self.scale + self.offset)


class TorchNetwork(Network):
    """A module in evaluation mode that takes raw images: (N, H, W, 3) uint8 -> logits (N, classes) float32.

    Args:
        name: of the back end, "torch.compile" to compile it.
    """

    def __init__(self, model: FromImages, device: torch.device, name: str = "pytorch"):
        self.name, self._device = name, device
        model = model.to(
            device,
            memory_format=torch.channels_last if device.type == "cuda" else torch.preserve_format,
        )
        self._model = model.eval()
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
        with full_precision():
            return self._model(torch.from_numpy(images).to(self._device)).float().cpu().numpy()

    @torch.inference_mode()
    def latencies_ms(self, images: np.ndarray) -> np.ndarray:
        """On a GPU the device times of runs that follow each other at once, copies excluded, TF32 allowed.

        They queue behind a pause of the device, or it would wait for Python: as long as the queue has room, about 1000 kernels.
        """
        if self._device.type != "cuda":
            return super().latencies_ms(images)
        batch = torch.from_numpy(images).to(self._device)

        def burst() -> list[float]:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(BURST + 1)]
            torch.cuda._sleep(PAUSE_CYCLES)
            for event in events[:-1]:
                event.record()
                self._model(batch)
            events[-1].record()
            events[-1].synchronize()
            return [start.elapsed_time(end) for start, end in zip(events, events[1:], strict=False)]

        return repeated_ms(burst)
