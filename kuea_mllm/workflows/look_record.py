"""What `look.json` says, as plain values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kuea_mllm.data.source import ImageSource
from kuea_mllm.diagnostics import embedding_drift, linear_cka
from kuea_mllm.probing.kernel_views import mean_gap
from kuea_mllm.probing.neighbours import ALIGNED, ORIGINAL, PairSurvey
from kuea_mllm.teachers.teacher import Teacher
from kuea_mllm.towers.model.tower import Tower

Embeddings = dict[str, NDArray[np.float32]]


def compare_embeddings(embeddings: Embeddings) -> dict[str, Any]:
    """Return drift and linear CKA of the embeddings of all images."""
    rows = {name: torch.tensor(values) for name, values in embeddings.items()}
    names = list(rows)
    cka = {
        f"{first}|{second}": linear_cka(rows[first], rows[second])
        for index, first in enumerate(names)
        for second in names[index + 1 :]
    }
    return {"drift": embedding_drift(rows[ALIGNED], rows[ORIGINAL]), "linear_cka": cka}


def gaps(matrices: Embeddings) -> dict[str, float]:
    """Return the mean gap between every two kernel matrices."""
    names = list(matrices)
    return {
        f"{first}|{second}": mean_gap(matrices[first], matrices[second])
        for index, first in enumerate(names)
        for second in names[index + 1 :]
    }


def describe_tower(tower: Tower) -> dict[str, Any]:
    """Name a tower, and say what it looks like."""
    return {
        "source": tower.source,
        "layout": tower.layout,
        "fingerprint": tower.fingerprint,
        "spec": tower.spec.to_dict(),
    }


def describe_teacher(teacher: Teacher) -> dict[str, Any]:
    """Name a teacher, and say how it is read."""
    return {
        "source": teacher.source,
        "fingerprint": teacher.fingerprint,
        "readout": teacher.readout,
        "image_size": teacher.image_size,
    }


def describe_pairs(survey: PairSurvey, images: ImageSource) -> dict[str, Any]:
    """Return what all pairs of images say, the moved ones by the names of their images."""
    return {
        "neighbours": {
            names: {str(k): share for k, share in by_k.items()}
            for names, by_k in survey.overlap.items()
        },
        "chance": {str(k): share for k, share in survey.chance.items()},
        "mean_cosine": survey.mean_cosine,
        "mean_gap": survey.gap,
        "moved": {
            kind: [
                {
                    "first": images.name(pair.first),
                    "second": images.name(pair.second),
                    "cosine": pair.cosine,
                }
                for pair in found
            ]
            for kind, found in survey.moved.items()
        },
    }
