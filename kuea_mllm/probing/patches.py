"""Patch probing after Covert et al.: can the classes of each patch be read off frozen tokens?

"local" asks it of every patch, "global" of the whole picture. The published number is that of the
best of five epochs, chosen on the pictures that are scored; here the last epoch is, unless
`selection` is "best". Both numbers are noted in any case.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kuea_mllm.probing.column import ProbeColumn, ProbeRow
from kuea_mllm.probing.patch_heads import Task, TokenShape
from kuea_mllm.probing.patch_labels import COCO_STUFF_CLASSES, LabelledPictures
from kuea_mllm.probing.patch_tally import Tally
from kuea_mllm.probing.patch_training import PatchSettings, TokenEncoder, train_heads
from kuea_mllm.towers.model.encode import normalise
from kuea_mllm.towers.model.fingerprint import fingerprint_tensors
from kuea_mllm.towers.model.tower import Tower

SUITE = "patch"
STATISTIC = "macro_recall"
_QUESTIONS: dict[Task, str] = {
    "local": "Which classes does each patch hold?",
    "global": "Which classes does the picture hold?",
}


def probe_patches(
    encoder: TokenEncoder,
    train: LabelledPictures,
    validation: LabelledPictures,
    *,
    how: PatchSettings | None = None,
    kept: Path | None = None,
    details: dict[str, Any] | None = None,
) -> list[ProbeColumn]:
    """Train heads on the tokens of one split and score them on another.

    Args:
        encoder: The frozen model, see `tower_tokens`.
        train: Pictures to train on.
        validation: Pictures to score.
        how: See `PatchSettings`.
        kept: Folder that finished epochs are kept in, see `patch_training.train_heads`.
        details: More to note about how it was made.

    Returns:
        One column per task, named like it, of metric "macro_recall". `details["metrics"]` holds
        the score of every epoch, of the last and of the best.

    Raises:
        DataError: If there is no full batch, or a label map is wrong.
        UnreadableImage: If a file is damaged.
        TowerError: If tokens are not finite.
        TrainingDiverged: If a head's weights are not finite after an epoch.
        UserError: If `kept` is of another tower, other pictures or settings.
    """
    how = how or PatchSettings()
    found = train_heads(encoder, train, validation, how, kept)
    notes = {
        "dataset": _describe(validation),
        "train": _describe(train),
        "encoder": encoder.description,
        "encoder_fingerprint": encoder.fingerprint,
        "settings": asdict(how),
        **(details or {}),
    }
    return [
        _column(task, [epoch[task] for epoch in found], validation, how, notes)
        for task in how.tasks
    ]


def tower_tokens(tower: Tower) -> TokenEncoder:
    """Describe a tower as a source of tokens; a projection is not needed.

    Args:
        tower: The tower; its model is held, not copied.
    """
    spec = tower.spec
    settings = json.dumps(spec.to_dict(), sort_keys=True)
    state = sorted(tower.model.state_dict().items())
    return TokenEncoder(
        module=_FinalTokens(tower),
        shape=TokenShape(spec.width, spec.heads, spec.prefix_tokens, spec.grid**2),
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        fingerprint=fingerprint_tensors([(settings, torch.empty(0)), *state]),
        description=tower.source,
    )


class _FinalTokens(nn.Module):
    """All tokens of a tower's last block, after its final norm."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.model: nn.Module = tower.model
        self.spec = tower.spec

    def forward(self, pixels01: Tensor) -> Tensor:
        body: Any = getattr(self.model, "vision_model", self.model)
        weight = next(self.model.parameters())
        wide = pixels01.to(torch.promote_types(weight.dtype, torch.float32))
        pixels = normalise(wide, self.spec.mean, self.spec.std).to(weight.dtype)
        tokens: Tensor = self.model(pixel_values=pixels).last_hidden_state
        # transformers applies CLIP's final norm to the class token only, SigLIP's to all.
        return body.post_layernorm(tokens) if self.spec.family == "clip" else tokens


def _column(
    task: Task,
    epochs: Sequence[Tally],
    validation: LabelledPictures,
    how: PatchSettings,
    notes: dict[str, Any],
) -> ProbeColumn:
    scores = [epoch.macro_recall for epoch in epochs]
    best = scores.index(max(scores))
    chosen = best if how.selection == "best" else len(scores) - 1
    tally = epochs[chosen]
    metrics = {
        "by_epoch": scores,
        "last": scores[-1],
        "best": scores[best],
        "best_epoch": best + 1,
        "classes_with_positives": int((tally.positives.sum(0) > 0).sum()),
    }
    return ProbeColumn(
        name=task,
        metric=STATISTIC,
        score=scores[chosen],
        statistic=STATISTIC,
        rows=[_row(task, index, tally, validation) for index in range(len(validation))],
        suite=SUITE,
        details={"metrics": metrics, "selection": how.selection, **notes},
    )


def _row(task: Task, index: int, tally: Tally, pictures: LabelledPictures) -> ProbeRow:
    hits, positives = tally.hits[index].tolist(), tally.positives[index].tolist()
    said = tally.claimed[index].nonzero()[0].tolist()
    present = [number for number, count in enumerate(positives) if count]
    return ProbeRow(
        doc_id=index,
        cluster=pictures.images.name(index),
        question=_QUESTIONS[task],
        target=" | ".join(COCO_STUFF_CLASSES[number] for number in present),
        answer=" | ".join(COCO_STUFF_CLASSES[number] for number in said),
        score=None,
        image=pictures.images.name(index),
        counts={COCO_STUFF_CLASSES[n]: [hits[n], positives[n]] for n in present},
    )


def _describe(pictures: LabelledPictures) -> dict[str, Any]:
    return {
        "name": "COCO-Stuff",
        "split": pictures.split,
        "source": str(pictures.labels),
        "images": len(pictures),
        "fingerprint": pictures.fingerprint(),
    }
