"""The heads of a multi-teacher distillation, kept beside the tower.

AM-RADIO compares images with texts through the head that imitates CLIP: without it, the row of the
paper's Table 12 could not be scored as it is meant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from kuea_mllm.io import follow_umask, write_json
from kuea_mllm.objectives import DistillTerm, Objective

FOLDER, FILE = "heads", "heads.safetensors"


def save_heads(objective: Objective, directory: Path, *, manifest: dict[str, Any]) -> None:
    """Write `heads/` of a run whose objective has heads on the pooled embedding, else nothing.

    `heads.safetensors` holds `<n>.<layer>.weight` and `.bias`, the original's head being number 0
    and those of the teachers following; `kuea.json` is the tower's, of the kind "heads".

    Args:
        objective: What the run trained.
        directory: The run.
        manifest: Content of the tower's `kuea.json`.
    """
    term = next((each for each in objective.modules() if isinstance(each, DistillTerm)), None)
    if term is None:
        return
    folder = directory / FOLDER
    folder.mkdir()
    state = {name: tensor.cpu().contiguous() for name, tensor in term.heads.state_dict().items()}
    save_file(state, folder / FILE)
    follow_umask(folder / FILE)
    write_json(folder / "kuea.json", {**manifest, "kind": "heads"})
