#!/usr/bin/env python3
"""Which calibrator loses least? Held-out accuracy and signal-to-noise of float checkpoints, calibrated each way.

    python benchmarks/calibrators.py --load_ckpt CKPT [CKPT ...] --record results/calibrators.json

Uses train images to calibrate and the held-out train images to judge, never the test set.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import infer
from dataset.batches import Batches
from utils import checkpoint as ckpt
from utils import flags, records
from utils.errors import UserError, run


@torch.no_grad()
def logits(model: nn.Module, batches: Batches) -> Tensor:
    """(N, classes) in evaluation mode."""
    model.eval()
    return torch.cat([model(images) for images, _ in batches])


def compare(
    path: Path, data_dir: Path, counts: list[int], device: torch.device
) -> list[dict[str, Any]]:
    """One row for each calibrator and number of images."""
    checkpoint = ckpt.load_whole(path)
    info, name = checkpoint["data"], "{name} ({stem} stem)".format(**checkpoint["model"])
    data = infer.load_data(argparse.Namespace(dataset=None, img_size=None, data_dir=data_dir), info)
    train, held_out = (
        Batches(*part, info["mean"], info["std"], 128, device)
        for part in data.split(info["split_seed"])
    )
    model = infer.build_float(checkpoint)
    ckpt.load_weights(model, checkpoint["state"])
    exact = logits(model.to(device), held_out)
    float_pct = 100 * (exact.argmax(1) == held_out.labels).double().mean().item()
    rows = []
    for method in flags.CALIBRATORS:
        for count in counts:
            quantization = {
                "quant_layers": ["*"],
                "skip_layers": [],
                "calibrator": method,
                "calib_images": count,
            }
            quantized = infer.build_quantized({**checkpoint, "quantization": quantization})
            ckpt.load_weights(quantized, checkpoint["state"], allow_missing_ranges=True)
            start = time.perf_counter()
            infer.calibrate_model(quantized.to(device), quantization, train)
            seconds = time.perf_counter() - start
            rounded = logits(quantized, held_out)
            accuracy_pct = 100 * (rounded.argmax(1) == held_out.labels).double().mean().item()
            noise = (rounded - exact).square().sum() / exact.square().sum()
            row = {
                "model": name,
                "calibrator": method,
                "calib_images": count,
                "held_out_float_pct": float_pct,
                "delta_pct": accuracy_pct - float_pct,
                "agreement_pct": 100
                * (rounded.argmax(1) == exact.argmax(1)).double().mean().item(),
                "logits_sqnr_db": -10 * noise.log10().item(),
                "calibration_s": seconds,
            }
            print(
                "  ".join(
                    f"{key} {value:.2f}" if isinstance(value, float) else str(value)
                    for key, value in row.items()
                )
            )
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--load_ckpt", type=Path, nargs="+", required=True, help="float checkpoints"
    )
    parser.add_argument("--data_dir", type=Path, default=Path("data"))
    parser.add_argument("--calib_images", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    if min(args.calib_images) < 1:
        raise UserError("--calib_images: at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [
        row
        for path in args.load_ckpt
        for row in compare(path, args.data_dir, args.calib_images, device)
    ]
    if args.record:
        record = {
            "kind": "calibrators",
            "commit": records.commit(),
            "environment": records.environment(),
            "rows": rows,
        }
        records.write(args.record, record)


if __name__ == "__main__":
    run(main)
