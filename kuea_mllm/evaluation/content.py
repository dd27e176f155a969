"""What the documents of a loaded task are recognised by, images included.

A resumed evaluation has to notice that the data under its finished columns have changed. What we
write for a task is hashed when it is written (`task_yaml`); here are the tasks whose data lmms-eval
reads: from a local copy of the hub repository, from the hub, or from the files of a task YAML.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

# Rows of images that are held at once: some 40 MB of photographs.
_ROWS_AT_ONCE = 256


def hash_documents(task: Any, limit: int | None = None) -> str | None:
    """Hash the documents that are asked, as they lie in the data set (SHA-256, hex).

    The rows are hashed, not the files: other splits, a new model card and a cache that was built
    anew change nothing. Of images that are named only, the name counts.

    Args:
        task: lmms-eval's task object, cut down to the documents that were drawn.
        limit: Only the first so many are asked; None asks all.

    Returns:
        None where a task turns its data into something other than rows of a data set.
    """
    documents = task.dataset[task.config.test_split or task.config.validation_split]
    if not hasattr(documents, "with_format"):
        return None
    if limit is not None and limit < len(documents):
        documents = documents.select(range(limit))
    digest = hashlib.sha256()
    rows = documents.with_format("arrow")
    digest.update(_line([len(rows), rows.column_names]))
    for table in rows.iter(batch_size=_ROWS_AT_ONCE):
        for row in table.to_pylist():
            digest.update(_line(row))
    return digest.hexdigest()


def _line(content: Any) -> bytes:
    return (json.dumps(content, default=_plain) + "\n").encode()


def _plain(value: object) -> str:
    """Write what JSON does not know: the bytes of images, dates."""
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else repr(value)
