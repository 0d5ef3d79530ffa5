#!/usr/bin/env python3
"""Which calibrator loses least? Each one on float checkpoints: accuracy, agreement, noise, time.

    python benchmarks/calibrators.py --load_ckpt CKPT [CKPT ...] --record results/calibrators.json

Train images calibrate and the val part of the train images judges. The test set is never read.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from dataset.batches import Batches
from utils import checkpoint as ckpt
from utils import compare, networks, records
from utils.checkpoint import Checkpoint
from utils.device import full_precision
from utils.errors import UserError, run
from utils.flags import require_named
from utils.metrics import percent_equal, sqnr_db
from utils.specs import CALIBRATORS, Quantization


@dataclass
class Row:
    """One calibrator with so many images, judged on the val part.

    Args:
        delta_pct: accuracy less that of the float network, in points.
        agreement_pct: predictions that equal those of the float network.
        logits_sqnr_db: of the logits against those of the float network.
    """

    model: str
    calibrator: str
    calib_images: int
    val_float_pct: float
    delta_pct: float
    agreement_pct: float
    logits_sqnr_db: float
    calibration_s: float

    def __str__(self) -> str:
        cells = []
        for key, value in asdict(self).items():
            cells.append(f"{key} {value:.2f}" if isinstance(value, float) else str(value))
        return "  ".join(cells)


@torch.no_grad()
def all_logits(model: nn.Module, batches: Batches) -> Tensor:
    """(N, classes) in evaluation mode."""
    model.eval()
    with full_precision():
        return torch.cat([model(images) for images, _ in batches])


def rows_of(path: Path, data_dir: Path, counts: Sequence[int]) -> Iterator[Row]:
    """A row for each calibrator and number of images, of one float checkpoint.

    Raises:
        UserError: not a checkpoint of train.py, or other images than it was trained on.
    """
    checkpoint = ckpt.load_whole(path)
    require_named(checkpoint.network.name, None)
    info = checkpoint.data

    # the checkpoint's own split: it was never trained on the val part
    data = compare.load_data(info.dataset, data_dir, info.img_size, info)
    train_arrays, val_arrays = data.split(info.split_seed)
    train_part = networks.batches_of(*train_arrays, info)
    val = networks.batches_of(*val_arrays, info)

    # what every calibrator is compared with
    model = networks.build_float(checkpoint.network, info.size)
    ckpt.load_weights(model, checkpoint.state)
    exact = all_logits(model.to(val.device), val)  # (N, classes)

    for calibrator in CALIBRATORS:
        for count in counts:
            quantization = Quantization(calibrator=calibrator, calib_images=count)
            yield judge(checkpoint, quantization, train_part, val, exact)


def judge(
    checkpoint: Checkpoint,
    quantization: Quantization,
    train_part: Batches,
    val: Batches,
    exact: Tensor,
) -> Row:
    """Calibrate the checkpoint's network and compare its logits with the float network's, `exact`.

    Args:
        exact: (N, classes), of the N images of `val`.
    """
    model = networks.build_quantized(checkpoint.network, quantization, checkpoint.data.size)
    ckpt.load_weights(model, checkpoint.state, allow_missing_ranges=True)
    model.to(val.device)
    started = time.perf_counter()
    networks.calibrate_model(model, quantization, train_part)
    seconds = time.perf_counter() - started

    rounded = all_logits(model, val)  # (N, classes)
    float_pct = percent_equal(exact.argmax(1), val.labels)
    return Row(
        model=str(checkpoint.network),
        calibrator=quantization.calibrator,
        calib_images=quantization.calib_images,
        val_float_pct=float_pct,
        delta_pct=percent_equal(rounded.argmax(1), val.labels) - float_pct,
        agreement_pct=percent_equal(rounded.argmax(1), exact.argmax(1)),
        logits_sqnr_db=sqnr_db(exact, rounded),
        calibration_s=seconds,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--load_ckpt", type=Path, nargs="+", required=True, help="float checkpoints")
    add("--data_dir", type=Path, default=Path("data"))
    add("--calib_images", type=int, nargs="+", default=[256, 1024, 4096])
    add("--record", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if min(args.calib_images) < 1:
        raise UserError("--calib_images: at least 1")

    rows = []
    for path in args.load_ckpt:
        for row in rows_of(path, args.data_dir, args.calib_images):
            print(row)
            rows.append(asdict(row))
    if args.record:
        record = {
            "kind": "calibrators",
            "commit": records.commit(),
            "environment": records.environment(["pytorch"]),
            "rows": rows,
        }
        records.write(args.record, record)


if __name__ == "__main__":
    run(main)
