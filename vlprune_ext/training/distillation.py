"""Knowledge distillation: recover a pruned dual encoder by training it against the dense one."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from ..anatomy import Anatomy, describe
from ..anatomy.patch import Patches
from ..data import Data
from ..progress import Progress

TOWERS = ("vision", "text")


@dataclass(frozen=True)
class Weights:
    """Weights of the distillation loss ``L_itc + sim * L_sim + feat * L_feat + hidden * L_hidn``.

    The loss of MoPE-CLIP (arXiv 2403.07839, section 3.2) with the weights of the one public reading of the paper.

    Parameters
    ----------
    sim : float
        Of the soft cross-entropy against the teacher's logits.
    feat : float
        Of the MSE of embeddings.
    hidden : float
        Of the MSE of hidden states.
    """

    sim: float = 1.0
    feat: float = 1000.0
    hidden: float = 1.0


class _Pairs(Dataset):
    """Dataset of one text for every image; where there are several, another one in each epoch."""

    def __init__(self, data: Data, seed: int) -> None:
        self.texts = [(data.image_of_text == image).nonzero().flatten() for image in range(data.n_images)]
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, image: int) -> int:
        own = self.texts[image]
        return int(own[int(torch.randint(len(own), (1,), generator=self.generator))])


@dataclass
class _Embedded:
    """Embeddings and hidden states of one batch."""

    embeddings: dict[str, Tensor]  # tower -> [B, E], normalised
    hidden: dict[str, list[Tensor]]  # tower -> output of every block


def _embed(anatomy: Anatomy, inputs: dict[str, dict[str, Tensor]]) -> _Embedded:
    """Embed one batch with both towers, and collect the output of every block."""
    hidden: dict[str, list[Tensor]] = {tower: [] for tower in TOWERS}
    embeddings = {}
    with Patches() as patches:
        for tower in TOWERS:
            for block in anatomy.tower(tower).blocks:
                patches.hook(block.module, lambda _, __, out, _t=tower: hidden[_t].append(out))
        for tower in TOWERS:
            embeddings[tower] = F.normalize(anatomy.embed(tower, inputs[tower]), dim=-1)
    return _Embedded(embeddings, hidden)


def distillation_loss(
    student: _Embedded,
    teacher: _Embedded,
    scale: Tensor,
    teacher_scale: Tensor,
    kept: dict[str, list[int]],
    weights: Weights,
) -> Tensor:
    """Compute ``L_itc + a L_sim + b L_feat + c L_hidn`` of one batch of pairs.

    L_itc is the symmetric contrastive cross-entropy; L_sim 1/2 [soft cross-entropy against the teacher's image-to-text
    + text-to-image logits]; L_feat 1/2 MSE of the normalised embeddings, summed over towers; L_hidn 1/2 MSE of block
    outputs, summed over kept blocks.

    Parameters
    ----------
    student, teacher : _Embedded
        Embeddings [B, E], normalised, and block outputs of the same batch.
    scale, teacher_scale : Tensor, scalar
        Factors of the cosines (`logit_scale`).
    kept : dict of str to list of int
        Tower -> for each block of the student, the teacher's block it came from (`kept_layers`).
    weights : Weights
        a, b and c.

    Returns
    -------
    Tensor, scalar
    """
    logits = scale * student.embeddings["vision"] @ student.embeddings["text"].T
    wanted = teacher_scale * teacher.embeddings["vision"] @ teacher.embeddings["text"].T
    target = torch.arange(len(logits), device=logits.device)
    itc = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    sim = (F.cross_entropy(logits, wanted.softmax(1)) + F.cross_entropy(logits.T, wanted.T.softmax(1))) / 2
    feat = sum(F.mse_loss(student.embeddings[t], teacher.embeddings[t]) for t in TOWERS) / 2
    hidden = sum(
        F.mse_loss(own, teacher.hidden[t][layer])
        for t in TOWERS
        for layer, own in zip(kept[t], student.hidden[t], strict=True)
    )
    return itc + weights.sim * sim + weights.feat * feat + weights.hidden * hidden / 2


class _DistillTrainer(Trainer):
    """Trainer whose loss compares the student with its teacher."""

    def __init__(
        self,
        model: nn.Module,
        *,
        towers: dict[str, set[str]],
        teacher: nn.Module,
        kept: dict[str, list[int]],
        weights: Weights,
        **kwargs,
    ) -> None:
        super().__init__(model, **kwargs)
        self.teacher, self.kept, self.weights = describe(teacher), kept, weights
        self.student = describe(model)
        self.towers = towers

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the distillation loss of one batch."""
        by_tower = {t: {k: v for k, v in inputs.items() if k in self.towers[t]} for t in TOWERS}
        student = _embed(self.student, by_tower)
        with torch.no_grad():
            teacher = _embed(self.teacher, by_tower)
            teacher_scale = logit_scale(self.teacher)
        loss = distillation_loss(student, teacher, logit_scale(self.student), teacher_scale, self.kept, self.weights)
        return (loss, None) if return_outputs else loss


def logit_scale(anatomy: Anatomy) -> Tensor:
    """Return the factor of the cosines; 1/0.07, CLIP's initial value, for a model without one.

    Parameters
    ----------
    anatomy : Anatomy
        The model.

    Returns
    -------
    Tensor, scalar
    """
    scale = getattr(anatomy.model, "logit_scale", None)
    return torch.tensor(1 / 0.07, dtype=torch.float32, device=anatomy.device) if scale is None else scale.exp()


def kept_layers(student: nn.Module, teacher: nn.Module) -> dict[str, list[int]]:
    """Return, for every block of the student, the teacher's block it came from.

    Parameters
    ----------
    student : nn.Module
        The pruned model, with the record ``vlprune`` that `apply` leaves on it.
    teacher : nn.Module
        The model it was pruned from.

    Returns
    -------
    dict of str to list of int
        Tower -> block of the student -> block of the teacher.

    Raises
    ------
    ValueError
        The record does not fit the teacher.
    """
    kept = {name: list(range(len(tower))) for name, tower in describe(teacher).towers.items()}
    for record in getattr(student, "vlprune", {}).get("plans", []):
        if record["mode"] != "remove":
            continue
        for tower, layers in record["plan"]["layers"].items():
            kept[tower] = [layer for i, layer in enumerate(kept[tower]) if i not in layers]
    for name, tower in describe(student).towers.items():
        if name not in kept or len(kept[name]) != len(tower):
            raise ValueError(
                f"teacher: its tower {name!r} has {len(kept.get(name, []))} blocks where the student's plan keeps "
                f"{len(tower)}; expected the model that the student was pruned from"
            )
    return kept


class _Report(TrainerCallback):
    """Report each step to ``progress``."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args, state, control, **kwargs):
        self.progress(state.global_step, state.max_steps, "distil")


def distill(
    student: nn.Module,
    teacher: nn.Module,
    data: Data,
    *,
    steps: int = 1000,
    batch_size: int = 128,
    learning_rate: float = 2e-5,
    weight_decay: float = 3e-4,
    weights: Weights = Weights(),
    seed: int = 0,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress | None = None,
) -> nn.Module:
    """Train ``student``, a pruned dual encoder, to match ``teacher``, the model it was pruned from; in place.

    AdamW (0.9, 0.98), 10% warm-up, cosine decay, gradients clipped at 1.0: the recipe of the same public reading of
    MoPE-CLIP.

    Parameters
    ----------
    student : nn.Module
        The pruned model.
    teacher : nn.Module
        The dense model; moved to the student's device.
    data : Data
        Training pairs.
    steps : int
        Optimizer steps.
    batch_size : int
        Pairs of a batch, on each device.
    learning_rate : float
        Peak learning rate.
    weight_decay : float
        AdamW's.
    weights : Weights
        Weights of the loss terms.
    seed : int
        Seed of the batches and texts.
    callbacks : sequence of TrainerCallback
        Further callbacks of the Trainer.
    progress : Progress, optional
        Called after each step.

    Returns
    -------
    nn.Module
        ``student``, in evaluation mode.

    Raises
    ------
    ValueError
        ``steps`` below 1, a model that is no dual encoder, or models that do not fit together.
    """
    if steps < 1:
        raise ValueError(f"steps: {steps}, expected at least 1")
    for name, model in (("student", student), ("teacher", teacher)):
        if not describe(model).is_dual_encoder:
            raise ValueError(f"{name}: {type(model).__name__} does not embed images and texts, distillation needs both")
    kept = kept_layers(student, teacher)
    modes = teacher.training
    device = describe(student).device
    teacher.to(device).eval()
    set_seed(seed)
    trainable = [(p, p.requires_grad) for p in student.parameters()]
    with tempfile.TemporaryDirectory() as folder:
        trainer = _DistillTrainer(
            model=student,
            teacher=teacher,
            kept=kept,
            weights=weights,
            towers={"vision": set(data.images), "text": set(data.texts) - {"labels"}},
            train_dataset=_Pairs(data, seed),
            data_collator=lambda rows: {k: v for k, v in data.batch(torch.tensor(rows)).items() if k != "labels"},
            callbacks=[*callbacks, *([_Report(progress)] if progress else [])],
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=batch_size,
                learning_rate=learning_rate,
                weight_decay=weight_decay,
                adam_beta1=0.9,
                adam_beta2=0.98,
                max_grad_norm=1.0,
                warmup_steps=max(1, steps // 10),
                lr_scheduler_type="cosine",
                seed=seed,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
                use_cpu=device.type == "cpu",
            ),
        )
        trainer.train()
    for p, flag in trainable:
        p.requires_grad_(flag)
    teacher.train(modes)
    return student.eval()
