"""The numbers of a stage: for the Trainer's log and, where it reports to it, TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments


def of_stage(entry: Mapping[str, Any], thresholds: Mapping[str, float], costs: Mapping[str, float]) -> dict[str, float]:
    """Name -> number, all finite: of an entry of the history, and each mode's threshold and R when it was over."""
    found = {
        "comp/accuracy": entry["accuracy"][1],
        "comp/flops": entry["flops"][1],
        "comp/cost": entry["cost"],
        "comp/explored": float(entry["explored"]),
        **{f"comp/{mode}/threshold": threshold for mode, threshold in thresholds.items()},
        **{f"comp/{mode}/R": cost for mode, cost in costs.items()},
        **{f"comp/tokens/{tower}": sum(shares) / len(shares) for tower, shares in entry["tokens"].items()},
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}


class Board:
    """Writes into TensorBoard, if the Trainer reports to it and this is the first process.

    The Trainer's own callback has its turn first and takes nothing from others. So this one writes beside it, into the
    folder ``comp`` of its run: of several files in one folder TensorBoard may follow only the newest.
    """

    def __init__(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        self.callback: Any = None
        if "tensorboard" not in (args.report_to or ()) or not state.is_world_process_zero:
            return
        from transformers.integrations import TensorBoardCallback

        self.callback = TensorBoardCallback()
        run = self.callback.logging_dir or _latest(Path(args.output_dir or ".", "runs"))
        self.callback.logging_dir = run and str(Path(run, "comp"))
        self.callback.on_train_begin(args, state, control)

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        if self.callback is not None:
            for name, value in scalars.items():
                self.callback.tb_writer.add_scalar(name, value, step)
            self.callback.tb_writer.flush()

    def close(self) -> None:
        if self.callback is not None:
            self.callback.tb_writer.close()


def _latest(runs: Path) -> Path | None:
    """The folder that the Trainer's callback made a moment ago; its name is a time, which is over."""
    found = [path for path in runs.glob("*") if path.is_dir()]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)
