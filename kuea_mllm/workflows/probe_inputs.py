"""What a score was made of, so that a resumed probe can tell that something was replaced since.

Names and sizes of files do not tell two data sets of one shape apart, or an image library that
decodes differently; so some pictures of each split are decoded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from kuea_mllm.data.source import ImageSource
from kuea_mllm.errors import UserError
from kuea_mllm.probing.datasets.content import sample_checksums
from kuea_mllm.probing.datasets.dataset import ProbeDataset
from kuea_mllm.probing.mmvp_vlm import MmvpVlm
from kuea_mllm.probing.patch_labels import LabelledPictures

Split: TypeAlias = ProbeDataset | LabelledPictures | MmvpVlm
Inputs: TypeAlias = Mapping[str, str]
"""Fingerprint of each thing, by what to call it in an error."""

_SHOWN = 16


def inputs_of(splits: Sequence[Split]) -> dict[str, str]:
    """Return the fingerprints of all that a data set gives to a score."""
    found: dict[str, str] = {}
    for split in splits:
        if isinstance(split, MmvpVlm):
            found |= {
                "pictures": _images(split.images),
                "statements": _digest([[pair.ids, pair.statements] for pair in split.pairs]),
                "patterns": _digest([pair.pattern for pair in split.pairs]),
            }
        elif isinstance(split, LabelledPictures):
            fingerprint = split.content_fingerprint()
            found[f"pictures or label maps of split {split.split}"] = fingerprint
        else:
            found |= _dataset(split)
    return found


def require_same_inputs(dataset: str, before: Inputs, now: Inputs) -> None:
    """Refuse to go on with a finished score that would be another one today.

    Args:
        dataset: Name of the data set.
        before: What it was scored with.
        now: What is there.

    Raises:
        UserError: If they differ; names the first difference.
    """
    for what in [*now, *(set(before) - set(now))]:
        if before.get(what) != now.get(what):
            raise UserError(
                f"--resume: the {what} changed since data set {dataset} was scored (fingerprint "
                f"{_shown(now.get(what))}, was {_shown(before.get(what))}).",
                "Restore it, or drop what was scored with --restart.",
            )


def _dataset(split: ProbeDataset) -> dict[str, str]:
    labels = None if split.labels is None else split.labels.tolist()
    parts = {
        "labels": labels,
        "class names": split.class_names,
        "prompts": split.templates,
        "captions": split.captions,
    }
    return {
        f"images of split {split.split}": _images(split.images),
        **{f"{what} of split {split.split}": _digest(part) for what, part in parts.items() if part},
    }


def _images(images: ImageSource) -> str:
    return _digest([images.fingerprint(), sample_checksums(len(images), images.read)])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _shown(fingerprint: str | None) -> str:
    return "not recorded" if fingerprint is None else fingerprint[:_SHOWN]
