"""Trainer for CoMP: the loss that suits the model, and runs that resume from their last checkpoint."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from ..anatomy import Anatomy, describe
from ..data import Data
from ..objectives import LMLoss
from ..progress import Progress
from .distillation import logit_scale


class _Rows(Dataset):
    """Dataset of all texts; for a contrastive loss, of one text for each image, another one in each epoch."""

    def __init__(self, data: Data, pairs: bool) -> None:
        owner = data.image_of_text
        self.own = [(owner == i).nonzero().flatten() for i in range(data.n_images)] if pairs else None
        self.count = data.n_images if pairs else len(data)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> int:
        if self.own is None:
            return place
        texts = self.own[place]  # drawn by torch's global generator, whose state the Trainer saves
        return int(texts[int(torch.randint(len(texts), ()))])


class WithLoss(nn.Module):
    """Wrap a model so that its forward returns its loss: contrastive for a dual encoder, else next-token.

    Parameters
    ----------
    model : nn.Module
        The model to train.
    data : Data
        The training data; its input names tell images from texts.
    """

    def __init__(self, model: nn.Module, data: Data) -> None:
        super().__init__()
        self.pruned = model
        self.anatomy: Anatomy = describe(model)
        self.pairs = self.anatomy.is_dual_encoder
        self.of_tower = {"vision": set(data.images), "text": set(data.texts) - {"labels"}}

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Return {"loss": the mean loss of a batch of model inputs}."""
        if not self.pairs:
            objective = LMLoss()
            tower = objective.towers(self.anatomy)[0]
            return {"loss": -objective.outputs(self.anatomy, tower, inputs).mean()}
        image, text = (
            F.normalize(self.anatomy.embed(tower, {k: v for k, v in inputs.items() if k in names}), dim=-1)
            for tower, names in self.of_tower.items()
        )
        logits = logit_scale(self.anatomy) * image @ text.T
        target = torch.arange(len(logits), device=logits.device)
        return {"loss": (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the state without duplicates of tied weights, as safetensors requires."""
        found: dict[tuple, str] = {}
        whole = super().state_dict(*args, **kwargs)
        for name, value in whole.items():
            found.setdefault((value.data_ptr(), value.shape, value.stride()) if value.numel() else (name,), name)
        return {name: whole[name] for name in found.values()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` returned; raise RuntimeError for other names."""
        expected = self.state_dict().keys()
        if state_dict.keys() != expected:
            names = ", ".join(sorted(state_dict.keys() ^ expected)[:3])
            raise RuntimeError(f"checkpoint: does not fit {type(self.pruned).__name__}: {names}")
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        return type(found)([], [])


class _Report(TrainerCallback):
    """Report each step to ``progress``."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args, state, control, **kwargs):
        self.progress(state.global_step, state.max_steps, "training")


def last_checkpoint(folder: str | os.PathLike) -> Path | None:
    """Return the latest complete checkpoint in a folder, or None.

    Parameters
    ----------
    folder : path
        A Trainer's output folder.

    Returns
    -------
    Path or None
    """
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        number = path.name.rpartition("-")[2]
        try:
            json.loads((path / "trainer_state.json").read_text())  # written last
        except (OSError, ValueError):
            continue
        if number.isdigit():
            found.append((int(number), path))
    return max(found)[1] if found else None


def train(
    model: nn.Module,
    method: TrainerCallback,
    data: Data,
    *,
    steps: int = 2000,
    batch_size: int = 64,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.01,
    out: str | os.PathLike | None = None,
    save_steps: int = 100,
    seed: int = 0,
    report_to: Sequence[str] = (),
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress | None = None,
) -> nn.Module:
    """Train a model while ``method`` prunes it, in place.

    AdamW, warm-up over a twentieth of the steps, then linear decay to zero; gradients clipped at 1.

    Parameters
    ----------
    model : nn.Module
        The dense model.
    method : TrainerCallback
        A `CoMP` or one of its baselines.
    data : Data
        Training data.
    steps : int
        Optimizer steps.
    batch_size : int
        Rows of a batch, on each device.
    learning_rate : float
        Peak learning rate.
    weight_decay : float
        AdamW's.
    out : path, optional
        Folder for checkpoints. An interrupted run resumes from the last one there, with the result of an uninterrupted
        run. None: no checkpoints.
    save_steps : int
        Steps between checkpoints.
    seed : int
        Seed of the batches and texts.
    report_to : sequence of str
        Integrations of the Trainer, such as "tensorboard".
    callbacks : sequence of TrainerCallback
        Further callbacks; they run before ``method``, so that at the end of training they still see the whole model.
    progress : Progress, optional
        Called after each step.

    Returns
    -------
    nn.Module
        ``model``, pruned, in evaluation mode.

    Raises
    ------
    ValueError
        ``steps`` below 1, and what `CoMP` raises.
    """
    if steps < 1:
        raise ValueError(f"steps: {steps}, expected at least 1")
    loss = WithLoss(model, data)
    device = describe(model).device
    set_seed(seed)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) if out is None else Path(out)
        stack.callback(getattr(method, "detach", lambda: None))
        arguments: dict[str, Any] = {
            "output_dir": str(folder),
            "max_steps": steps,
            "per_device_train_batch_size": batch_size,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "max_grad_norm": 1.0,
            "warmup_steps": max(1, steps // 20),
            "lr_scheduler_type": "linear",
            "seed": seed,
            "save_strategy": "no" if out is None else "steps",
            "save_steps": save_steps,
            "save_total_limit": 2,
            "logging_strategy": "steps" if report_to else "no",
            "logging_steps": 10,
            "report_to": list(report_to),
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "use_cpu": device.type == "cpu",
        }
        trainer = Trainer(
            loss,
            TrainingArguments(**arguments),
            train_dataset=_Rows(data, loss.pairs),
            data_collator=lambda rows: data.batch(torch.tensor(rows)),
            callbacks=[*callbacks, method, *([_Report(progress)] if progress else [])],
        )
        before = None if out is None else last_checkpoint(folder)
        trainer.train(resume_from_checkpoint=None if before is None else str(before))
    return model.eval()
