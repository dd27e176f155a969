"""A tower of a multi-teacher distillation, seen through its head that imitates CLIP.

The tower's own embedding is held to no text by that objective; AM-RADIO therefore compares images
with texts through the head that learnt to give the original's embeddings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kuea_mllm.data.transforms import ImageTransform
from kuea_mllm.errors import TowerError
from kuea_mllm.io import read_json
from kuea_mllm.probing.embedder import ImageEmbedder, PixelRule
from kuea_mllm.towers.model.encode import TowerEncoder
from kuea_mllm.towers.model.fingerprint import fingerprint_tensors
from kuea_mllm.towers.reading.load import load_tower

HEADS_FILE = "heads.safetensors"

_OF_ORIGINAL = "0."
_REMEDY = "Give the directory heads/ of a run of `kuea-mllm align`, beside its tower/."


class HeadedTower(nn.Module):
    """A tower followed by one of its heads, from pixels in [0, 1] to the embeddings of CLIP.

    Args:
        encoder: The tower.
        head: What imitates the original on top of it.
    """

    def __init__(self, encoder: TowerEncoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, pixels01: Tensor) -> Tensor:
        """Embed images, (n, 3, side, side): (n, CLIP width), not normalised."""
        embedded: Tensor = self.head(self.encoder(pixels01))
        return embedded


def holds_heads(source: str | Path) -> bool:
    """Whether a path is the directory of a run's heads."""
    return (Path(source) / HEADS_FILE).is_file()


def load_headed_tower(source: str | Path) -> tuple[ImageEmbedder, dict[str, Any]]:
    """Load the tower of a run with its head for the original.

    Args:
        source: `heads/` of the run; the tower lies beside it.

    Returns:
        What embeds images, and the content of `kuea.json`.

    Raises:
        TowerError: If a file is missing, damaged, or of another run.
    """
    directory = Path(source)
    manifest = read_json(directory / "kuea.json")
    if not isinstance(manifest, dict) or manifest.get("kind") != "heads":
        raise TowerError(f"{directory / 'kuea.json'} does not describe heads.", _REMEDY)
    if not (directory.parent / "tower").is_dir():
        raise TowerError(f"{directory} has no tower beside it.", _REMEDY)
    tower = load_tower(directory.parent / "tower")
    if (tower.manifest or {}).get("created") != manifest.get("created"):
        raise TowerError(f"{directory} and {tower.source} are not of one run.", _REMEDY)
    encoder = TowerEncoder(tower)
    head = _read_head(directory / HEADS_FILE, encoder.width)
    rule = PixelRule(ImageTransform.from_spec(tower.spec))
    module = HeadedTower(encoder, head).eval().requires_grad_(False)
    settings = json.dumps([tower.spec.to_dict(), rule.fingerprint], sort_keys=True)
    state = sorted(module.state_dict().items())
    embedder = ImageEmbedder(
        module=module,
        fingerprint=fingerprint_tensors([(settings, torch.empty(0)), *state]),
        width=int(list(head.parameters())[-1].shape[0]),
        rule=rule,
        description=f"{tower.source} through its head for {manifest['base_tower']['reference']}",
    )
    return embedder, manifest


def _read_head(path: Path, width: int) -> nn.Module:
    try:
        content = load_file(path)
    except (SafetensorError, OSError) as error:
        raise TowerError(f"{path} is damaged: {error}.", _REMEDY) from error
    state = {
        name.removeprefix(_OF_ORIGINAL): tensor
        for name, tensor in content.items()
        if name.startswith(_OF_ORIGINAL)
    }
    wide = state.get("2.weight")
    if wide is None or wide.ndim != 2:
        raise TowerError(f"{path} holds no head for the original (0.2.weight).", _REMEDY)
    head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, len(wide)))
    try:
        head.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise TowerError(f"{path} does not fit the tower beside it: {reason}", _REMEDY) from error
    return head
