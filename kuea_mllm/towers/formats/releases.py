"""Which published tower a checkpoint looks like, and what that rests on.

A table of small recognisers over names, shapes, dtypes, files beside it and configuration. None of
them compares weights, so they tell what something *looks like*:

- "certain": it was fetched from that Hub repository, or holds a part that only that release has;
- "likely": a name, file or dtype that the release has and that others have no reason to have;
- "possible": the layout fits, and others have it too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from kuea_mllm.towers.formats import keys
from kuea_mllm.towers.formats.layouts import LONG_CLIP_POSITIONS, CheckpointShape

Confidence = Literal["certain", "likely", "possible"]
Match = tuple[Confidence, str]

_ORDER: tuple[Confidence, ...] = ("certain", "likely", "possible")
LONG_CLIP_LENGTH = 248
# Wider towers than OpenAI's ViT-L/14 (1024) cannot have begun as one of OpenAI's.
OPENAI_MAX_WIDTH = 1024


@dataclass(frozen=True)
class Clues:
    """What there is to recognise a release by.

    Attributes:
        shape: Layout and sizes.
        hub_id: "owner/name" that it was fetched from, "" for a path.
        names: Other names it goes by: of its file or directory, or in its configuration.
        keys: Names in the checkpoint, text half included.
        dtypes: Types of its tensors ("float32"), text half included.
        text_positions: Length of the text half's position table, None without one.
        vocabulary: Rows of the text half's token table, None without one.
        siblings: Names of the files beside it.
        arguments: Content of an `args.txt` beside it or one level up, "" without one.
        record: Content of a `kuea.json` whose fingerprint is that of the weights, else None.
    """

    shape: CheckpointShape
    hub_id: str = ""
    names: tuple[str, ...] = ()
    keys: frozenset[str] = frozenset()
    dtypes: frozenset[str] = frozenset()
    text_positions: int | None = None
    vocabulary: int | None = None
    siblings: frozenset[str] = frozenset()
    arguments: str = ""
    record: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Release:
    """One line of the table.

    Attributes:
        name: What it is called.
        hub: Pattern of its Hub ids, matched as a whole.
        files: Pattern of its file names (or of copies of its Hub directories), matched as a whole.
        test: Anything else; returns None where it sees nothing.
        activation: What it was trained with, None where its members differ.
        heads: Number of attention heads where it is not width / 64.
        note: What its weights do not say and its configuration does.
    """

    name: str
    hub: str = ""
    files: str = ""
    test: Callable[[Clues], Match | None] = lambda clues: None
    activation: str | None = None
    heads: int | None = None
    note: str = ""

    def match(self, clues: Clues) -> Match | None:
        """Return how sure the evidence makes it, and the evidence."""
        found = [self._match_hub(clues), self._match_files(clues), self.test(clues)]
        matches = [match for match in found if match is not None]
        return min(matches, key=lambda match: _ORDER.index(match[0]), default=None)

    def _match_hub(self, clues: Clues) -> Match | None:
        if self.hub and re.fullmatch(self.hub, clues.hub_id, re.IGNORECASE):
            return "certain", f"fetched from the Hub repository {clues.hub_id}"
        return None

    def _match_files(self, clues: Clues) -> Match | None:
        patterns = [pattern for pattern in (self.files, self.hub) if pattern]
        for name in clues.names:
            if any(re.fullmatch(pattern, name, re.IGNORECASE) for pattern in patterns):
                return "likely", f"it is called {name}"
        return None


@dataclass(frozen=True)
class RecognisedRelease:
    """A release that a checkpoint looks like.

    Attributes:
        name: What it is called.
        confidence: How far the evidence goes; see the module.
        evidence: What it rests on.
        activation: What the release was trained with, None if not known.
        heads: Its attention heads where not width / 64, else None.
        note: What to mind about it.
    """

    name: str
    confidence: Confidence
    evidence: str
    activation: str | None = field(default=None)
    heads: int | None = field(default=None)
    note: str = field(default="")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)


def recognise(clues: Clues) -> list[RecognisedRelease]:
    """Return the releases that the clues point to, of the highest confidence that there is."""
    found = [
        RecognisedRelease(r.name, *match, r.activation, r.heads, r.note)
        for r in RELEASES
        if (match := r.match(clues)) is not None
    ]
    for confidence in _ORDER:
        if best := [release for release in found if release.confidence == confidence]:
            return best
    return []


def _ours(clues: Clues) -> Match | None:
    if clues.record is None:
        return None
    kind = "an alignment" if "objective" in clues.record else "no alignment"
    return "certain", f"kuea.json beside it records these very weights ({kind})"


def _kuea(clues: Clues) -> Match | None:
    if clues.shape.layout not in {"visual", "trunk"}:
        return None
    if "kernel_clip=" in clues.arguments:
        return "likely", "args.txt beside it holds the arguments of KUEA's training (kernel_clip)"
    if _is_bare_openai_size(clues):
        return "possible", "a bare float32 visual dict, as KUEA's training writes" + _steps(clues)
    return None


def _robust(clues: Clues) -> Match | None:
    arguments = clues.arguments
    if clues.shape.layout == "visual" and "attack=" in arguments and "kernel_" not in arguments:
        return "likely", "args.txt beside it holds the arguments of RobustVLM's training (attack)"
    if _is_bare_openai_size(clues):
        return "possible", "a bare float32 visual dict, as RobustVLM releases" + _steps(clues)
    return None


def _un2clip(clues: Clues) -> Match | None:
    if _is_bare_openai_size(clues):
        return "possible", "a bare float32 visual dict, as un2CLIP releases"
    return None


def _is_bare_openai_size(clues: Clues) -> bool:
    shape = clues.shape
    return (
        shape.layout == "visual"
        and shape.width <= OPENAI_MAX_WIDTH
        and clues.dtypes <= {"float32"}
        # Arguments tell exactly which training it was.
        and not clues.arguments
    )


def _steps(clues: Clues) -> str:
    # KUEA's training grew out of RobustVLM's, and both keep these names.
    steps = sorted(n for n in clues.siblings if re.fullmatch(r"(step|fallback)_\d+\.pt", n))
    return f"; {steps[0]} lies beside it, which both KUEA and RobustVLM write" if steps else ""


def _tecoa(clues: Clues) -> Match | None:
    if clues.shape.layout != "robustvlm":
        return None
    return "likely", "the entry vision_encoder_state_dict, as TeCoA's training writes"


def _diva(clues: Clues) -> Match | None:
    if clues.shape.width > OPENAI_MAX_WIDTH:
        return None
    return _full_dict(clues, "as DIVA releases its OpenAI towers")


def _open_clip_training(clues: Clues) -> Match | None:
    return _full_dict(clues, "as open_clip's own trainings are released")


def _full_dict(clues: Clues, who: str) -> Match | None:
    is_plain = clues.shape.layout == "openai" and LONG_CLIP_POSITIONS not in clues.keys
    if not is_plain or clues.keys & set(keys.OPENAI_METADATA) or clues.dtypes - {"float32"}:
        return None
    return "possible", f"a full float32 CLIP dict without metadata entries, {who}"


def _long_clip(clues: Clues) -> Match | None:
    if LONG_CLIP_POSITIONS in clues.keys:
        return "certain", f"its text half has {LONG_CLIP_POSITIONS}, which only Long-CLIP has"
    if clues.text_positions == LONG_CLIP_LENGTH:
        return "likely", f"its text half has {LONG_CLIP_LENGTH} positions instead of 77"
    return None


def _openai(clues: Clues) -> Match | None:
    if clues.shape.layout != "openai":
        return None
    metadata = sorted(clues.keys & set(keys.OPENAI_METADATA))
    if metadata:
        return "likely", f"the metadata entries of OpenAI's archives ({', '.join(metadata)})"
    if "float16" in clues.dtypes:
        return "possible", "a full CLIP dict in float16, as OpenAI released its weights"
    return None


def _siglip(vocabulary: int, name: str) -> Callable[[Clues], Match | None]:
    def test(clues: Clues) -> Match | None:
        if clues.shape.family != "siglip":
            return None
        if clues.vocabulary == vocabulary:
            return "likely", f"its text half has the {vocabulary} tokens of {name}"
        return None

    return test


def _any_siglip(clues: Clues) -> Match | None:
    if clues.shape.family != "siglip":
        return None
    return "possible", "a SigLIP tower; the generations differ in their text halves"


_HALF_MEAN = "It was trained on pixels with mean and deviation 0.5, not with CLIP's."

# File names, ids and activations: the projects' own READMEs, training and evaluation scripts, and
# open_clip 3.3's table of pretrained weights (docs/formats.md names the source of each line).
RELEASES: tuple[Release, ...] = (
    Release("kuea-mllm", test=_ours),
    Release("KUEA", test=_kuea, activation="quick_gelu"),
    Release(
        "FARE / TeCoA (RobustVLM)",
        hub=r"chs20/(fare|tecoa)\d-clip",
        files=r"(fare|tecoa)_eps_\d\.pt",
        test=_robust,
        activation="quick_gelu",
    ),
    Release("TeCoA (Mao et al.)", test=_tecoa, activation="quick_gelu"),
    Release(
        "un2CLIP", files=r"openai_vit_l_14_(224|336)\.ckpt", test=_un2clip, activation="quick_gelu"
    ),
    Release(
        "un2CLIP (LAION ViT-H)", files=r"openclip_vit_h_14_224\.ckpt", activation="gelu", heads=16
    ),
    Release("un2CLIP (SigLIP)", files=r"siglip_vit_so_14_384\.ckpt", activation="gelu", heads=16),
    Release("DIVA", files=r"OpenAI-ViT-L-14-(224|336)\.pth", test=_diva, activation="quick_gelu"),
    Release("DIVA (MetaCLIP ViT-L)", files=r"MetaCLIP-ViT-L-14\.pth", activation="quick_gelu"),
    Release(
        "DIVA (MetaCLIP ViT-H)", files=r"MetaCLIP-ViT-H-14\.pth", activation="quick_gelu", heads=16
    ),
    Release(
        "DIVA (DFN ViT-H)", files=r"DFN-ViT-H-14-(224|378)\.pth", activation="quick_gelu", heads=16
    ),
    Release("DIVA (SigLIP)", files=r"SigLIP-ViT-SO-14-(224|384)\.pth", activation="gelu", heads=16),
    Release(
        "Long-CLIP",
        hub=r"BeichenZhang/LongCLIP-.*",
        files=r"longclip-[BL].*\.pt",
        test=_long_clip,
        activation="quick_gelu",
    ),
    Release(
        "OpenAI CLIP",
        hub=r"openai/clip-.*|timm/vit_.*_clip_.*\.openai",
        test=_openai,
        activation="quick_gelu",
    ),
    Release(
        "MetaCLIP 1.2 (Altogether)",
        hub=r"timm/vit_huge_.*\.metaclip_altogether",
        files=r"h14_v1\.2_altogether\.pt",
        activation="gelu",
        heads=16,
        note="Unlike other MetaCLIP towers it was trained with GELU.",
    ),
    Release(
        "MetaCLIP",
        hub=r"facebook/metaclip-[bl].*|timm/vit_(base|large)_.*\.metaclip_(400m|2pt5b)",
        files=r"(metaclip_)?(b32|b16|l14)_(400m|fullcc2\.5b)\.(pt|bin)",
        activation="quick_gelu",
    ),
    Release(
        "MetaCLIP (ViT-H or larger)",
        hub=r"facebook/metaclip-[hg].*|timm/vit_(huge|gigantic)_.*\.metaclip_2pt5b",
        files=r"(metaclip_)?(h14|g14)_fullcc2\.5b\.(pt|bin)",
        activation="quick_gelu",
        heads=16,
    ),
    Release("DFN (39B samples)", hub=r"apple/DFN2B-CLIP-ViT-L-14-39B", activation="gelu"),
    Release("DFN", hub=r"apple/DFN2B-CLIP-ViT-[BL]-1[46]", activation="quick_gelu"),
    Release(
        "DFN (ViT-H)",
        hub=r"apple/DFN5B-CLIP-ViT-H-14(-378|-384)?",
        activation="quick_gelu",
        heads=16,
        note="It was trained on images squashed to a square, not cropped.",
    ),
    Release(
        "SigLIP",
        hub=r"timm/vit-(?!.*(siglip2|i18n)).*siglip.*|google/siglip-(?!.*multilingual).*",
        test=_siglip(32_000, "SigLIP"),
    ),
    Release(
        "SigLIP (multilingual)",
        hub=r"timm/vit-.*siglip-i18n.*|google/siglip-.*multilingual.*",
        test=_siglip(250_000, "multilingual SigLIP"),
    ),
    Release(
        "SigLIP 2",
        hub=r"timm/vit-.*-siglip2.*|google/siglip2-.*",
        test=_siglip(256_000, "SigLIP 2"),
    ),
    Release("SigLIP or SigLIP 2", test=_any_siglip),
    Release(
        "LAION ViT-L/14 (LAION-2B)",
        hub=r"laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
        activation="gelu",
        note=_HALF_MEAN,
    ),
    Release(
        "an open_clip training (LAION, DataComp)",
        hub=r"laion/CLIP-ViT-(?!L-14-laion2B|H-|g-|bigG-).*|timm/vit_base_patch16.*\.laion400m_.*",
        files=r"(?!.*quickgelu)[^/]*(laion400m|laion2b|datacomp|commonpool)[^/]*",
        test=_open_clip_training,
        activation="gelu",
    ),
    Release(
        "LAION (ViT-H or larger)",
        hub=r"laion/CLIP-ViT-(H|g|bigG)-14-.*",
        activation="gelu",
        heads=16,
    ),
    Release(
        "LAION-400M with QuickGELU (open_clip)",
        files=r".*quickgelu-laion400m.*",
        activation="quick_gelu",
    ),
)
