"""Scalars of a stage, for the Trainer's log and, where it reports to it, TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments


def of_stage(entry: Mapping[str, Any], thresholds: Mapping[str, float], costs: Mapping[str, float]) -> dict[str, float]:
    """Return the scalars of a closed stage, those that are finite.

    Parameters
    ----------
    entry : mapping
        The stage's entry of the history.
    thresholds : mapping of str to float
        Mode -> threshold after the stage.
    costs : mapping of str to float
        Mode -> R after the stage.

    Returns
    -------
    dict of str to float
        Tag ("comp/..") -> number.
    """
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
    """Write scalars to TensorBoard, if the Trainer reports to it and this is the first process.

    The Trainer's own callback runs first and takes no scalars from others. So this one writes beside it, into the
    folder ``comp`` of its run: of several files in one folder TensorBoard may follow only the newest.

    Parameters
    ----------
    args, state, control : TrainingArguments, TrainerState, TrainerControl
        The Trainer's, when training begins.
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
        """Write scalars, tag -> number, at a training step."""
        if self.callback is not None:
            for name, value in scalars.items():
                self.callback.tb_writer.add_scalar(name, value, step)
            self.callback.tb_writer.flush()

    def close(self) -> None:
        """Close the writer."""
        if self.callback is not None:
            self.callback.tb_writer.close()


def _latest(runs: Path) -> Path | None:
    """Return the newest folder in ``runs``: its name is a time, and the Trainer's callback has just made it."""
    found = [path for path in runs.glob("*") if path.is_dir()]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)
