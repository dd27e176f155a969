"""What is known about a source before anything is done with it, and what that rests on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kuea_mllm.towers.formats.releases import RecognisedRelease


@dataclass(frozen=True)
class Inspection:
    """What a file, directory or Hub id is.

    Attributes:
        source: As it was given.
        layout: A key of `formats.layouts.LAYOUTS`, or "mllm_directory" for a whole MLLM.
        description: The layout in words.
        taken_off: What stood around the state dict, such as a prefix of every key.
        family: "clip" or "siglip"; None for an MLLM whose tower is elsewhere or of another family.
        sizes: image_size, patch_size, width, layers, mlp_width, embedding_width; empty if unknown.
        dtype: Type of the patch embedding ("float32"); of an MLLM, what its configuration says.
        dtypes: Number of vision tensors of each type.
        activation: As in `TowerSpec`, None where the source does not say and nothing implies it.
        activation_evidence: What that rests on, and what to pass if it is None.
        heads: Attention heads, None likewise.
        heads_evidence: As for the activation.
        preprocessing: mean, std and resize that go with the tower, empty for an MLLM that does not
            say.
        preprocessing_evidence: What that rests on.
        has_projection: Whether the family's pooled embedding can be computed.
        has_text_tower: Whether a text half is there as well.
        releases: Published towers that it looks like.
        fingerprint: Of the vision body, "" for an MLLM (`kuea-mllm verify` computes that).
        provenance: Content of `kuea.json`, None without one.
        warnings: What to mind.
    """

    source: str
    layout: str
    description: str
    taken_off: list[str]
    family: str | None
    sizes: dict[str, int]
    dtype: str
    dtypes: dict[str, int]
    activation: str | None
    activation_evidence: list[str]
    heads: int | None
    heads_evidence: list[str]
    preprocessing: dict[str, Any]
    preprocessing_evidence: list[str]
    has_projection: bool
    has_text_tower: bool
    releases: list[RecognisedRelease]
    fingerprint: str
    provenance: dict[str, Any] | None
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)
