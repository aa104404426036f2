"""A Trainer for CoMP: the loss that suits the model, and runs that can be cut and resumed."""

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
    """Texts of the data: all of them; for a contrastive loss one of each image, another one in each pass."""

    def __init__(self, data: Data, pairs: bool) -> None:
        owner = data.image_of_text
        self.own = [(owner == i).nonzero().flatten() for i in range(data.n_images)] if pairs else None
        self.count = data.n_images if pairs else len(data)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> int:
        if self.own is None:
            return place
        texts = self.own[place]  # of torch's own generator, whose state the Trainer saves
        return int(texts[int(torch.randint(len(texts), ()))])


class WithLoss(nn.Module):
    """A model whose forward is its loss: contrastive for two embeddings, else the next token's."""

    def __init__(self, model: nn.Module, data: Data) -> None:
        super().__init__()
        self.pruned = model
        self.anatomy: Anatomy = describe(model)
        self.pairs = self.anatomy.pairs
        self.of_tower = {"vision": set(data.images), "text": set(data.texts) - {"labels"}}

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
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
        """Of weights that are tied, one: what safetensors can hold."""
        found: dict[tuple, str] = {}
        whole = super().state_dict(*args, **kwargs)
        for name, value in whole.items():
            found.setdefault((value.data_ptr(), value.shape, value.stride()) if value.numel() else (name,), name)
        return {name: whole[name] for name in found.values()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """What `state_dict` gave. Raises RuntimeError for other names."""
        expected = self.state_dict().keys()
        if state_dict.keys() != expected:
            names = ", ".join(sorted(state_dict.keys() ^ expected)[:3])
            raise RuntimeError(f"checkpoint: does not fit {type(self.pruned).__name__}: {names}")
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        return type(found)([], [])


class _Report(TrainerCallback):
    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args, state, control, **kwargs):
        self.progress(state.global_step, state.max_steps, "training")


def last_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The latest checkpoint in a folder that was written to its end."""
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
    """Train a model while ``method`` (a `CoMP`) prunes it, in place; it is smaller in the end, and in evaluation mode.

    AdamW, a twentieth of the steps warm-up, then linear decay to zero; gradients clipped at 1.

    callbacks  have their turn before ``method``: at the end of training they still see all of the model
    out  a folder for checkpoints, one every ``save_steps``; a run that was cut goes on from the last one there, and
         ends as if it had not been. None: none are written

    Raises what `CoMP` raises.
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
