"""Training of the heads that read classes off frozen tokens, on `transformers.Trainer`.

All heads are trained in one pass over the pictures, because the tower costs far more than a head.
They share nothing but its tokens: their losses are added, which leaves each its own gradient, and
AdamW works number by number, so that a head comes out as it would alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments

from kuea_mllm.data.source import as_raised_in_worker
from kuea_mllm.errors import DataError, EnvironmentFailure, KueaError, TowerError, TrainingDiverged
from kuea_mllm.log import LOGGER
from kuea_mllm.probing.patch_checkpoint import PatchCheckpoint
from kuea_mllm.probing.patch_heads import HeadKind, Task, TokenShape, make_head
from kuea_mllm.probing.patch_labels import (
    COCO_STUFF_CLASSES,
    LabelledPictures,
    patch_classes,
    picture_classes,
)
from kuea_mllm.probing.patch_order import EpochOrders
from kuea_mllm.probing.patch_tally import Tally, join, tally

TASKS: tuple[Task, ...] = ("local", "global")
_LOG_EVERY = 100
_FREE = frozenset(("workers", "device", "selection"))  # what no training depends on
_DAMAGED = "The tower's weights are damaged: `kuea-mllm convert TOWER --inspect`."


@dataclass(frozen=True)
class TokenEncoder:
    """A frozen model that turns pictures into tokens.

    Attributes:
        module: Pixels in [0, 1], (n, 3, image_size, image_size), to all tokens of the last block
            after the final norm, (n, prefix + patches, width), those before the patches first.
        shape: Of the tokens.
        image_size: Side of a picture in pixels.
        patch_size: Side of a patch.
        fingerprint: Changes with anything in the model that changes a token.
        description: For people: what it is and where it came from.
    """

    module: nn.Module
    shape: TokenShape
    image_size: int
    patch_size: int
    fingerprint: str
    description: str


@dataclass(frozen=True)
class PatchSettings:
    """How heads are trained; the defaults are those of the benchmark.

    Attributes:
        head: Kind of head.
        tasks: What heads are trained for.
        epochs: Passes over the pictures.
        batch_size: Pictures in one step; a last batch that is not full is left out.
        lr: Highest learning rate.
        last_lr: Where the cosine would end.
        weight_decay: Of AdamW, on all parameters.
        warmup_steps: Steps in which the rate rises from 0 in a straight line.
        seed: Of weights and order.
        device: Where tower and heads are; autocast to bfloat16 on CUDA, float32 elsewhere.
        workers: Processes that decode; 0 decodes in this one.
        selection: Which epoch is scored: the "last", or the "best" on the validation pictures that
            are then scored, as published.
    """

    head: HeadKind = "transformer"
    tasks: tuple[Task, ...] = TASKS
    epochs: int = 5
    batch_size: int = 32
    lr: float = 1e-3
    last_lr: float = 1e-4
    weight_decay: float = 0.01
    warmup_steps: int = 500
    seed: int = 0
    device: str = "cpu"
    workers: int = 4
    selection: Literal["last", "best"] = "last"


def learning_rate(step: int, total: int, how: PatchSettings) -> float:
    """Return the learning rate of a step, counted from 0.

    The cosine counts from the first step, so the rate falls a little where the warm-up ends.
    """
    if step < how.warmup_steps:
        return how.lr * step / how.warmup_steps
    return how.last_lr + (how.lr - how.last_lr) * 0.5 * (1 + math.cos(math.pi * step / total))


def train_heads(
    encoder: TokenEncoder,
    train: LabelledPictures,
    validation: LabelledPictures,
    how: PatchSettings,
    kept: Path | None = None,
) -> list[dict[Task, Tally]]:
    """Train a head for each task and score it after every epoch.

    Pictures are decoded anew in every epoch; at 118,287 pictures the listing takes a few MB, and
    each epoch keeps 9 bytes per validation picture and class (8 MB for 5,000).

    Args:
        encoder: The frozen model; it is moved to the device.
        train: Pictures to train on.
        validation: Pictures to score.
        how: See `PatchSettings`.
        kept: Folder that finished epochs are kept in, and gone on from; None keeps none. A training
            that went on comes to the same numbers as one that was never stopped.

    Returns:
        What was found, for each epoch and task.

    Raises:
        UserError: If `kept` is of another tower, other pictures or settings.
        DataError: If there is no full batch, or a label map is wrong.
        UnreadableImage: If a file is damaged.
        TowerError: If tokens are not finite; names the picture.
        TrainingDiverged: If a head's weights are not finite after an epoch.
    """
    if len(train) < how.batch_size:
        raise DataError(
            f"{len(train)} training pictures are fewer than one batch of {how.batch_size}.",
            "Give more pictures, or lower the batch size.",
        )
    total = how.epochs * (len(train) // how.batch_size)
    if how.warmup_steps >= total:
        LOGGER.warning(
            "patch probe: all %d steps are warm-up (%d steps), the full learning rate is never "
            "reached",
            total,
            how.warmup_steps,
        )
    checkpoint = None
    if kept is not None:
        checkpoint = PatchCheckpoint(kept, _key(encoder, train, validation, how))
    with tempfile.TemporaryDirectory() as folder:
        trainer = _HeadTrainer(encoder, train, validation, how, total, folder, checkpoint)
        try:
            trainer.check_encoder()
            if len(trainer.found) < how.epochs:
                trainer.train()
        except KueaError as error:
            raise as_raised_in_worker(error) from None
    return trainer.found


def _key(
    encoder: TokenEncoder, train: LabelledPictures, validation: LabelledPictures, how: PatchSettings
) -> dict[str, str]:
    """Return all that the numbers depend on, by what to call it."""
    settings = {key: value for key, value in asdict(how).items() if key not in _FREE}
    content = json.dumps(settings, sort_keys=True)
    return {
        "tower": encoder.fingerprint,
        "training pictures": train.content_fingerprint(),
        "validation pictures": validation.content_fingerprint(),
        # Tokens and heads are computed in bfloat16 on CUDA.
        "kind of device": torch.device(how.device).type,
        "settings": hashlib.sha256(content.encode()).hexdigest(),
    }


class PatchExamples(Dataset[dict[str, Tensor]]):
    """Pixels and flags of classes, decoded in worker processes."""

    def __init__(
        self, pictures: LabelledPictures, image_size: int, patch_size: int, tasks: Sequence[Task]
    ) -> None:
        self._pictures, self._side, self._patch = pictures, image_size, patch_size
        self._tasks = tuple(tasks)

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pixels, classes = self._pictures.read(index, self._side)
        example = {"pixels": torch.from_numpy(pixels)}
        if "local" in self._tasks:
            example["local"] = torch.from_numpy(patch_classes(classes, self._patch))
        if "global" in self._tasks:
            flags = picture_classes(classes, self._patch)
            example["global"] = torch.from_numpy(flags[None])  # (1, classes)
        return example


class _Heads(nn.Module):
    """Heads on a frozen encoder, which is no part of the module: nothing trains or moves it."""

    def __init__(self, encoder: TokenEncoder, how: PatchSettings) -> None:
        super().__init__()
        self._encoder = (encoder,)
        self._kind = torch.device(how.device).type
        self.saw_finite = torch.ones((), dtype=torch.bool, device=how.device)
        self.heads = nn.ModuleDict(
            {
                task: make_head(
                    how.head, task, encoder.shape, len(COCO_STUFF_CLASSES), seed=how.seed
                )
                for task in how.tasks
            }
        )

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the logits of each task, float32, of uint8 pixels."""
        with torch.autocast(self._kind, torch.bfloat16, enabled=self._kind == "cuda"):
            with torch.no_grad():
                tokens = self.tokens(pixels)
                # Looked at after the epoch: the host need not wait for every batch.
                self.saw_finite = self.saw_finite & tokens.isfinite().all()
            answers = {task: head(tokens) for task, head in self.heads.items()}
        return {task: answer.float() for task, answer in answers.items()}

    def tokens(self, pixels: Tensor) -> Tensor:
        """Return what the encoder makes of uint8 pixels."""
        tokens: Tensor = self._encoder[0].module(pixels.to(torch.float32) / 255)
        return tokens


class _HeadTrainer(Trainer):
    """A stock trainer, but for the loss, the schedule and what is measured after each epoch."""

    def __init__(
        self,
        encoder: TokenEncoder,
        train: LabelledPictures,
        validation: LabelledPictures,
        how: PatchSettings,
        total: int,
        folder: str,
        checkpoint: PatchCheckpoint | None,
    ) -> None:
        if how.device.startswith("cuda:"):
            torch.cuda.set_device(how.device)
        self.how, self._pictures, self._checkpoint = how, validation, checkpoint
        encoder.module.to(how.device).eval()
        model = _Heads(encoder, how).to(how.device)
        parameters = model.parameters()
        optimizer = torch.optim.AdamW(parameters, lr=how.lr, weight_decay=how.weight_decay)
        schedule = LambdaLR(optimizer, lambda step: learning_rate(step, total, how) / how.lr)
        self._trained = (model.heads, optimizer, schedule)
        self.found = [] if checkpoint is None else checkpoint.read(*self._trained)
        self._steps_before = len(self.found) * (len(train) // how.batch_size)
        if self.found:
            LOGGER.info("patch probe: going on after epoch %d of %d", len(self.found), how.epochs)
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=how.epochs - len(self.found),
            per_device_train_batch_size=how.batch_size,
            max_grad_norm=0.0,
            use_cpu=how.device == "cpu",
            seed=how.seed,
            eval_strategy="epoch",
            save_strategy="no",
            logging_steps=_LOG_EVERY,
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to="none",
        )
        # Several visible GPUs would make Trainer wrap the model in DataParallel.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        parts = [
            PatchExamples(part, encoder.image_size, encoder.patch_size, how.tasks)
            for part in (train, validation)
        ]
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=parts[0],
            eval_dataset=parts[1],
            optimizers=(optimizer, schedule),
        )
        self.remove_callback(PrinterCallback)  # it prints on standard output

    @torch.no_grad()
    def check_encoder(self) -> None:
        """Refuse an encoder whose tokens are not finite, before an epoch is spent on it."""
        heads: Any = self.model
        examples: Any = self.eval_dataset
        count = min(self.how.batch_size, len(examples))
        pixels = torch.stack([examples[index]["pixels"] for index in range(count)])
        self._require_finite(heads.tokens(pixels.to(self.args.device)), 0)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return full batches in an order that only the seed decides."""
        examples: Any = self.train_dataset
        orders = EpochOrders(len(examples), self.how.seed, len(self.found))
        return self._loader(examples, sampler=orders, drop_last=True)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the binary cross entropy over all classes, summed over the heads."""
        del return_outputs, num_items_in_batch
        logits: dict[str, Tensor] = model(inputs["pixels"])
        losses = [
            binary_cross_entropy_with_logits(answer, inputs[task].float())
            for task, answer in logits.items()
        ]
        return torch.stack(losses).sum()

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the heads on all validation pictures and keep what they found."""
        heads: Any = self.model
        if not heads.saw_finite:
            raise TowerError(
                f"the tokens of a training picture hold NaN or infinity ({self.how.device}).",
                _DAMAGED,
            )
        if not all(bool(weight.isfinite().all()) for weight in heads.parameters()):
            raise TrainingDiverged(
                f"the patch probe diverged in epoch {len(self.found) + 1} "
                f"(learning rate {self.how.lr:g}).",
                "Lower its learning rate.",
            )
        heads.eval()
        parts: dict[Task, list[Tally]] = {task: [] for task in self.how.tasks}
        for number, batch in enumerate(self._loader(self.eval_dataset)):
            moved = {key: value.to(self.args.device) for key, value in batch.items()}
            with torch.no_grad():
                logits = heads(moved["pixels"])
            for task in self.how.tasks:
                self._require_finite(logits[task], number)
                parts[task].append(tally(logits[task], moved[task]))
        heads.train()
        self.found.append({task: join(tallies) for task, tallies in parts.items()})
        scores = {task: found.macro_recall for task, found in self.found[-1].items()}
        LOGGER.info(
            "patch probe: epoch %d of %d, macro recall %s",
            len(self.found),
            self.how.epochs,
            ", ".join(f"{task} {score:.2f}" for task, score in scores.items()),
        )
        self._keep()
        return {f"eval_{task}": score for task, score in scores.items()}

    def _keep(self) -> None:
        if self._checkpoint is None:
            return
        try:
            self._checkpoint.write(*self._trained, self.found)
        except EnvironmentFailure as error:
            # What is kept takes far more room than the results, which may well have enough.
            LOGGER.warning(
                "%s Epoch %d is not kept: the training goes on, but could not go on after a stop.",
                error.problem,
                len(self.found),
            )

    def log(self, logs: dict[str, float], *_: Any, **__: Any) -> None:
        """Write the loss to the log; nothing is kept."""
        if "loss" in logs:
            step = self._steps_before + self.state.global_step
            LOGGER.info("patch probe: step %d, loss %.5f", step, logs["loss"])

    def _require_finite(self, values: Tensor, batch: int) -> None:
        is_finite = values.isfinite().all(2).all(1)
        if not is_finite.all():
            bad = batch * self.how.batch_size + int((~is_finite).nonzero()[0])
            raise TowerError(
                f"the tokens of picture {self._pictures.images.name(bad)} hold NaN or infinity.",
                _DAMAGED,
            )

    def _loader(self, dataset: Any, **options: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self.how.batch_size,
            num_workers=self.how.workers,
            pin_memory=self.args.device.type == "cuda",
            persistent_workers=False,
            **options,
        )
