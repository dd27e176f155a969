"""Which documents of a task are about one image, as far as the task says so without decoding any.

The hint only decides which questions become neighbours; see `answering.preparing.image_key` for the
rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kuea_mllm.evaluation.scores import CLUSTER_KEYS

# Of a pair of images, not of one; and names that are rather those of images.
_NOT_IMAGES = {"pair_index"}
_FIRST = ("image",)


def image_hints(documents: Any) -> Sequence[str | None] | None:
    """Return what each document calls its image, None where the task does not say.

    Args:
        documents: A data set of lmms-eval's (`datasets.Dataset`).
    """
    names = getattr(documents, "column_names", None)
    features = getattr(documents, "features", None)
    if not isinstance(names, list) or features is None:
        return None
    for key in dict.fromkeys((*_FIRST, *CLUSTER_KEYS)):
        # Anything but plain text or numbers could be an image, which would be decoded.
        kind = getattr(features.get(key), "dtype", "")
        if key not in names or key in _NOT_IMAGES or not kind.startswith(("string", "int")):
            continue
        values = [None if value is None else str(value) for value in documents[key]]
        if len(set(values)) > 1:
            return values
    return None
