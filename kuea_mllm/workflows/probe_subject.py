"""What `kuea-mllm probe` scores: a vision tower with its text tower, or the projection baseline."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from kuea_mllm.errors import TowerError
from kuea_mllm.probing.embedder import RAW_PIXELS, TENSOR_RESIZE, ImageEmbedder, tower_embedder
from kuea_mllm.probing.partner import TextPartner, load_partner, open_partner
from kuea_mllm.probing.patch_training import TokenEncoder
from kuea_mllm.probing.patches import tower_tokens
from kuea_mllm.probing.projection import Projection, is_projection, load_projection
from kuea_mllm.towers.model.tower import Tower
from kuea_mllm.towers.reading.load import load_tower

_NAMES_OF_PARTS = frozenset(("tower", "projection", "clip"))


class Subject(Protocol):
    """Something that embeds pictures."""

    @property
    def partner(self) -> TextPartner:
        """The text tower that it is scored with; loaded at the first use."""
        ...

    def embedder(self, faults: Sequence[str] = ()) -> ImageEmbedder:
        """Return what embeds pictures, with faults of the released code if asked for."""
        ...

    def tokens(self) -> TokenEncoder:
        """Return what gives a token for each patch."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what `summary.json` says about the model."""
        ...

    def record(self) -> dict[str, Any]:
        """Return its `kuea.json`, empty if it has none."""
        ...


class TowerSubject:
    """A vision tower.

    Args:
        tower: The tower.
        base: A whole CLIP to take the text tower from; None finds it.
        device: Where texts are embedded.
    """

    def __init__(self, tower: Tower, base: str | None, device: str) -> None:
        self._tower, self._base, self._device = tower, base, device
        # Taken now: an embedder moves the model to a device.
        self._fingerprint = tower.fingerprint
        self._embedders: dict[tuple[str, ...], ImageEmbedder] = {}

    @cached_property
    def partner(self) -> TextPartner:
        """The text tower, found from the tower's record."""
        return load_partner(self._tower, self._base, device=self._device)

    def embedder(self, faults: Sequence[str] = ()) -> ImageEmbedder:
        """Return the tower as an embedder, one for each set of faults."""
        # Others are not about pictures; every embedder hashes all weights once.
        key = tuple(sorted({TENSOR_RESIZE, RAW_PIXELS}.intersection(faults)))
        if key not in self._embedders:
            self._embedders[key] = tower_embedder(self._tower, faults=key)
        return self._embedders[key]

    def tokens(self) -> TokenEncoder:
        """Return the tower as a source of tokens."""
        return self._tokens

    @cached_property
    def _tokens(self) -> TokenEncoder:
        # Kept, because it hashes all weights.
        return tower_tokens(self._tower)

    def describe(self) -> dict[str, Any]:
        """Name the tower, and say what it looks like."""
        tower = self._tower
        return {
            "path": tower.source,
            "name": subject_name(tower.source),
            "adapter": "tower",
            "tower_fingerprint": self._fingerprint,
            "tower": {"source": tower.source, "layout": tower.layout, **tower.spec.to_dict()},
        }

    def record(self) -> dict[str, Any]:
        """Return what is known of its making."""
        return dict(self._tower.manifest or {})


class ProjectionSubject:
    """The projection baseline: a teacher whose embeddings are mapped into CLIP's space.

    Args:
        source: Its directory.
        projection: The loaded baseline.
        device: Where texts are embedded.
    """

    def __init__(self, source: str, projection: Projection, device: str) -> None:
        self._source, self._projection, self._device = source, projection, device

    @cached_property
    def partner(self) -> TextPartner:
        """The text tower of the CLIP whose space it maps into."""
        found = self._projection
        return open_partner(
            found.base,
            width=found.embedder.width,
            of=self._source,
            revision=found.revision,
            activation=found.activation,
            found_by=found.found_by,
            device=self._device,
        )

    def embedder(self, faults: Sequence[str] = ()) -> ImageEmbedder:
        """Return teacher and map.

        Raises:
            TowerError: If pixels are to be treated as in the released code, which knows no such
                model.
        """
        if {TENSOR_RESIZE, RAW_PIXELS}.intersection(faults):
            raise TowerError(
                f"{self._source} is a projection, which the released evaluation never scored.",
                "Leave out --compat released.",
            )
        return self._projection.embedder

    def tokens(self) -> TokenEncoder:
        """Refuse.

        Raises:
            TowerError: Always: a projection maps pooled embeddings only.
        """
        raise TowerError(
            f"{self._source} is a projection: it has no patch tokens to probe.",
            "Leave out the suite patch.",
        )

    def describe(self) -> dict[str, Any]:
        """Name the baseline."""
        return {
            "path": self._source,
            "name": subject_name(self._source),
            "adapter": "projection",
            "tower_fingerprint": self._projection.embedder.fingerprint,
            "tower": {"source": self._source, "description": self._projection.embedder.description},
        }

    def record(self) -> dict[str, Any]:
        """Return what is known of its making."""
        return dict(self._projection.manifest)


def open_subject(
    reference: str,
    *,
    base: str | None = None,
    activation: str | None = None,
    heads: int | None = None,
    teacher: str | None = None,
    device: str = "cpu",
) -> Subject:
    """Load what is to be probed.

    Args:
        reference: Whatever `towers.reading.load.load_tower` opens, or a projection's directory.
        base: A whole CLIP to take the text tower from; None finds it.
        activation: For checkpoint files, which do not state it.
        heads: Likewise.
        teacher: Of a projection, where its teacher lies by now.
        device: Where texts are embedded.

    Raises:
        TowerError: If it cannot be opened.
        TowerMismatch: If the parts of a projection do not belong together.
    """
    if is_projection(reference):
        projection = load_projection(reference, teacher=teacher, base=base)
        return ProjectionSubject(reference, projection, device)
    return TowerSubject(load_tower(reference, activation=activation, heads=heads), base, device)


def subject_name(reference: str) -> str:
    """Return a short name: that of the run where the directory is only called "tower"."""
    path = Path(reference)
    if path.exists():
        path = path.resolve()
        is_part = path.name in _NAMES_OF_PARTS and path.parent.name
        return f"{path.parent.name}/{path.name}" if is_part else path.name
    return reference
