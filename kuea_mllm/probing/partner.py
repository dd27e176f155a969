"""The text tower that a vision tower is scored with: the one of the CLIP that it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kuea_mllm.errors import TowerError, TowerMismatch
from kuea_mllm.io import read_json
from kuea_mllm.log import LOGGER
from kuea_mllm.manifest import recorded_source
from kuea_mllm.towers.files import checkpoints
from kuea_mllm.towers.model.tower import Tower
from kuea_mllm.towers.reading.load import load_tower
from kuea_mllm.towers.reading.text_half import TOKENIZER_FILES
from kuea_mllm.towers.reading.text_tower import TextTower, has_text_tower, load_text_tower

_REMEDY = (
    "Give --base: the full CLIP or SigLIP that the tower was made from, such as "
    "openai/clip-vit-large-patch14."
)
_LONGEST_LINE = 16


@dataclass(frozen=True)
class TextPartner:
    """A frozen text tower, and why it is the right one.

    Attributes:
        text: The tower.
        found_by: What led to it: "--base", "the tower's own weights" or "kuea.json".
    """

    text: TextTower
    found_by: str

    @property
    def source(self) -> str:
        """Where it was loaded from."""
        return self.text.source

    @property
    def fingerprint(self) -> str:
        """Hash of everything that an embedding depends on."""
        return self.text.fingerprint

    @property
    def width(self) -> int:
        """Width of an embedding."""
        return self.text.width

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: (n, width), float32, on the CPU, not normalised."""
        return self.text.encode(texts)

    def describe(self) -> dict[str, Any]:
        """Return what a results file says about it."""
        return {
            "source": self.source,
            "found_by": self.found_by,
            "fingerprint": self.fingerprint,
            "context_length": self.text.context_length,
        }


def load_partner(tower: Tower, base: str | None = None, *, device: str = "cpu") -> TextPartner:
    """Load the text tower that belongs to a vision tower.

    It is looked for in `base`, else in the tower's own weights (a whole CLIP), else in the towers
    that its `kuea.json` says it was made from, one after the other.

    Args:
        tower: The vision tower.
        base: A whole CLIP or SigLIP; see `towers.reading.text_tower.load_text_tower`.
        device: Where texts are embedded.

    Raises:
        TowerError: If the tower has no embedding to compare with texts, or there is no text tower.
        TowerMismatch: If the text tower embeds in another width, or what `kuea.json` names is
            another CLIP by now.
    """
    if not tower.has_projection:
        raise TowerError(
            f"{tower.source} holds no visual_projection.weight, so its images cannot be compared "
            "with texts.",
            "Take the tower from a full CLIP model, not from the vision half of an MLLM.",
        )
    reference, revision, found_by = _find(tower, base)
    # A state dict file does not state its activation; the vision tower's is that of its CLIP.
    activation = tower.spec.activation if tower.spec.family == "clip" else None
    text = load_text_tower(reference, revision=revision, activation=activation)
    partner = TextPartner(text.to(device), found_by)
    require_width(partner, tower.spec.embedding_width, tower.source)
    LOGGER.info("text tower of %s, found by %s", partner.source, found_by)
    return partner


def open_partner(
    base: str,
    *,
    width: int,
    of: str,
    revision: str | None = None,
    activation: str | None = None,
    found_by: str = "--base",
    device: str = "cpu",
) -> TextPartner:
    """Load a text tower for an image embedder that is no tower of a known format.

    Args:
        base: A whole CLIP or SigLIP.
        width: Width of the image embeddings.
        of: What to call the embedder in errors.
        revision: Of `base` on the Hub, None for the newest.
        activation: For a state dict file, which does not state it; OpenAI's if left out.
        found_by: What led to `base`.
        device: Where texts are embedded.

    Raises:
        TowerError: If there is no text tower.
        TowerMismatch: If it embeds in another width.
    """
    text = load_text_tower(base, revision=revision, activation=activation)
    partner = TextPartner(text.to(device), found_by)
    require_width(partner, width, of)
    return partner


def require_width(partner: TextPartner, width: int, of: str) -> None:
    """Refuse a text tower whose embeddings cannot be compared with those of images.

    Raises:
        TowerMismatch: If the widths differ.
    """
    if partner.width != width:
        raise TowerMismatch(
            f"{of} embeds images in {width} numbers, the text tower of {partner.source} texts in "
            f"{partner.width}.",
            "Give --base: the CLIP that the tower was made from.",
        )


def require_recorded(
    start: Mapping[str, Any], of: str, *, activation: str | None = None, heads: int | None = None
) -> None:
    """Refuse a CLIP that is not the one that a record was written about.

    A path may hold another model by now, and one of equal width would be taken without a word.

    Args:
        start: `base_tower` of a `kuea.json`; one without fingerprints is not checked.
        of: What to call the owner of the record in errors.
        activation: For a state dict file, which does not state it.
        heads: Likewise.

    Raises:
        TowerMismatch: If the vision tower is another one.
    """
    rounded = start.get("fingerprints")
    known = {*(rounded.values() if isinstance(rounded, Mapping) else ()), start.get("fingerprint")}
    known.discard(None)
    if not known:
        return
    reference = recorded_source(start)
    is_file = Path(reference).is_file()
    found = load_tower(
        reference,
        revision=start.get("revision"),
        activation=activation if is_file else None,
        heads=heads if is_file else None,
    ).fingerprint
    if found not in known:
        raise TowerMismatch(
            f"{reference} is not the CLIP that {of} was made from: its fingerprint is "
            f"{found[:12]}, kuea.json says {str(start.get('fingerprint'))[:12]}.",
            "Give --base: the right one.",
        )


def _find(tower: Tower, base: str | None) -> tuple[str, str | None, str]:
    if base is not None:
        _require_text(base, None)
        return base, None, "--base"
    if has_text_tower(checkpoints.resolve_source(tower.source, also=TOKENIZER_FILES)):
        return tower.source, None, "the tower's own weights"
    last = None
    for start in _ancestors(tower.manifest):
        reference, revision = recorded_source(start), start["revision"]
        try:
            path = checkpoints.resolve_source(reference, revision=revision, also=TOKENIZER_FILES)
        except TowerError as error:
            raise TowerError(
                f"{tower.source} has no text tower, and {reference}, which its kuea.json says it "
                f"was made from, is not to be had: {error.problem}",
                _REMEDY,
            ) from error
        if has_text_tower(path):
            spec = tower.spec
            require_recorded(start, tower.source, activation=spec.activation, heads=spec.heads)
            return reference, revision, "kuea.json"
        last = reference
    where = f"nor has {last}, which it was made from" if last else "and no kuea.json names a CLIP"
    raise TowerError(f"{tower.source} has no text tower, {where}.", _REMEDY)


def _require_text(base: str, revision: str | None) -> None:
    path = checkpoints.resolve_source(base, revision=revision, also=TOKENIZER_FILES)
    if not has_text_tower(path):
        raise TowerError(f"--base {base} has no text tower.", _REMEDY)


def _ancestors(record: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield what records say about what a tower was made from, nearest first."""
    for _ in range(_LONGEST_LINE):
        start = (record or {}).get("base_tower")
        reference = start.get("reference") if isinstance(start, Mapping) else None
        if not isinstance(start, Mapping) or not isinstance(reference, str):
            return
        revision = start.get("revision")
        yield {**start, "revision": revision if isinstance(revision, str) else None}
        path = Path(recorded_source(start)) / "kuea.json"
        content = read_json(path) if path.is_file() else None
        record = content if isinstance(content, Mapping) else None
