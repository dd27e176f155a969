"""Which release a checkpoint looks like, by clues alone (no weights)."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from kuea_mllm.towers.formats.layouts import LAYOUTS, CheckpointShape
from kuea_mllm.towers.formats.releases import RELEASES, Clues, recognise

VIT_L = CheckpointShape("visual", "clip", 224, 14, 1024, 24, 4096, 768, True, "float32")
FULL = replace(VIT_L, layout="openai")
VIT_H = replace(FULL, width=1280, layers=32, mlp_width=5120, embedding_width=1024)
TRUNK = CheckpointShape("trunk", "siglip", 384, 14, 1152, 27, 4304, 1152, True, "float32")
REPOSITORY = replace(VIT_L, layout="open_clip_directory")
FLOAT32 = frozenset({"float32"})


def names(clues: Clues) -> list[tuple[str, str]]:
    return [(release.name, release.confidence) for release in recognise(clues)]


@pytest.mark.parametrize(
    ("shape", "file", "release"),
    [
        (VIT_L, "fare_eps_2.pt", "FARE / TeCoA (RobustVLM)"),
        (VIT_L, "tecoa_eps_4.pt", "FARE / TeCoA (RobustVLM)"),
        (VIT_L, "openai_vit_l_14_336.ckpt", "un2CLIP"),
        (replace(VIT_H, layout="visual"), "openclip_vit_h_14_224.ckpt", "un2CLIP (LAION ViT-H)"),
        (TRUNK, "siglip_vit_so_14_384.ckpt", "un2CLIP (SigLIP)"),
        (FULL, "OpenAI-ViT-L-14-224.pth", "DIVA"),
        (VIT_H, "DFN-ViT-H-14-378.pth", "DIVA (DFN ViT-H)"),
        (FULL, "longclip-L.pt", "Long-CLIP"),
        (FULL, "l14_fullcc2.5b.pt", "MetaCLIP"),
        (VIT_H, "h14_fullcc2.5b.pt", "MetaCLIP (ViT-H or larger)"),
        (VIT_H, "h14_v1.2_altogether.pt", "MetaCLIP 1.2 (Altogether)"),
        (FULL, "vit_l_14-laion400m_e32-3d133497.pt", "an open_clip training (LAION, DataComp)"),
        (
            FULL,
            "vit_b_32-quickgelu-laion400m_e32-46683a32.pt",
            "LAION-400M with QuickGELU (open_clip)",
        ),
    ],
)
def test_published_file_names_make_a_release_likely(
    shape: CheckpointShape, file: str, release: str
) -> None:
    assert names(Clues(shape, names=(file,), dtypes=FLOAT32)) == [(release, "likely")]


@pytest.mark.parametrize(
    ("hub_id", "release"),
    [
        ("chs20/fare2-clip", "FARE / TeCoA (RobustVLM)"),
        ("openai/clip-vit-large-patch14-336", "OpenAI CLIP"),
        ("timm/vit_large_patch14_clip_224.openai", "OpenAI CLIP"),
        ("facebook/metaclip-l14-fullcc2.5b", "MetaCLIP"),
        ("facebook/metaclip-h14-fullcc2.5b", "MetaCLIP (ViT-H or larger)"),
        ("timm/vit_large_patch14_clip_224.metaclip_2pt5b", "MetaCLIP"),
        ("apple/DFN2B-CLIP-ViT-L-14", "DFN"),
        ("apple/DFN2B-CLIP-ViT-L-14-39B", "DFN (39B samples)"),
        ("apple/DFN5B-CLIP-ViT-H-14-378", "DFN (ViT-H)"),
        ("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", "LAION ViT-L/14 (LAION-2B)"),
        (
            "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K",
            "an open_clip training (LAION, DataComp)",
        ),
        ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "LAION (ViT-H or larger)"),
        ("BeichenZhang/LongCLIP-L", "Long-CLIP"),
    ],
)
def test_hub_ids_make_a_release_certain_and_copies_of_them_likely(
    hub_id: str, release: str
) -> None:
    assert names(Clues(REPOSITORY, hub_id=hub_id)) == [(release, "certain")]
    # config.json's _name_or_path, or the Hub's cache on disk: anyone can have changed the weights.
    assert names(Clues(REPOSITORY, names=(hub_id,))) == [(release, "likely")]


@pytest.mark.parametrize(
    ("hub_id", "release"),
    [
        ("timm/ViT-SO400M-14-SigLIP-384", "SigLIP"),
        ("google/siglip-so400m-patch14-384", "SigLIP"),
        ("timm/ViT-B-16-SigLIP-i18n-256", "SigLIP (multilingual)"),
        ("google/siglip-base-patch16-256-multilingual", "SigLIP (multilingual)"),
        ("timm/ViT-SO400M-14-SigLIP2", "SigLIP 2"),
        ("google/siglip2-so400m-patch14-384", "SigLIP 2"),
    ],
)
def test_siglip_generations_are_told_by_hub_id(hub_id: str, release: str) -> None:
    assert names(Clues(TRUNK, hub_id=hub_id)) == [(release, "certain")]


@pytest.mark.parametrize(
    ("vocabulary", "release"),
    [
        (32_000, ("SigLIP", "likely")),
        (250_000, ("SigLIP (multilingual)", "likely")),
        (256_000, ("SigLIP 2", "likely")),
        (None, ("SigLIP or SigLIP 2", "possible")),
    ],
)
def test_siglip_generations_are_told_by_vocabulary(
    vocabulary: int | None, release: tuple[str, str]
) -> None:
    assert names(Clues(TRUNK, vocabulary=vocabulary, dtypes=FLOAT32)) == [release]


def test_arguments_beside_it_tell_kuea_from_robustvlm() -> None:
    kuea = "Namespace(clip_model_name='ViT-L-14', attack='pgd', kernel_clip='polynomial')"
    clues = Clues(VIT_L, dtypes=FLOAT32, siblings=frozenset({"step_4000.pt", "final.pt"}))
    assert names(replace(clues, arguments=kuea)) == [("KUEA", "likely")]
    robust = "Namespace(clip_model_name='ViT-L-14', attack='pgd', eps=0.0157)"
    assert names(replace(clues, arguments=robust)) == [("FARE / TeCoA (RobustVLM)", "likely")]
    # Without them the two look alike, since one training grew out of the other.
    assert names(clues) == [
        ("KUEA", "possible"),
        ("FARE / TeCoA (RobustVLM)", "possible"),
        ("un2CLIP", "possible"),
    ]
    assert "step_4000.pt" in recognise(clues)[0].evidence


def test_nothing_is_claimed_that_the_evidence_does_not_carry() -> None:
    assert names(Clues(replace(VIT_H, layout="visual"), dtypes=FLOAT32)) == []
    assert names(Clues(VIT_L, dtypes=frozenset({"float16"}))) == []
    assert names(Clues(VIT_H, dtypes=FLOAT32)) == [
        ("an open_clip training (LAION, DataComp)", "possible")
    ]
    assert names(Clues(REPOSITORY, names=("my-tower",))) == []


def test_openai_is_told_by_metadata_and_dtype() -> None:
    metadata = Clues(FULL, keys=frozenset({"input_resolution"}), dtypes=FLOAT32)
    assert names(metadata) == [("OpenAI CLIP", "likely")]
    half = Clues(FULL, dtypes=frozenset({"float16", "float32"}))
    assert names(half) == [("OpenAI CLIP", "possible")]


def test_long_clip_is_told_by_its_positions() -> None:
    both = Clues(FULL, keys=frozenset({"positional_embedding_res"}), text_positions=248)
    assert names(both) == [("Long-CLIP", "certain")]
    converted = Clues(replace(VIT_L, layout="hf_directory"), text_positions=248)
    assert names(converted) == [("Long-CLIP", "likely")]


def test_tecoa_is_told_by_its_wrapping() -> None:
    clues = Clues(replace(VIT_L, layout="robustvlm"), dtypes=FLOAT32)
    assert names(clues) == [("TeCoA (Mao et al.)", "likely")]


def test_activations_of_the_table_agree_with_open_clip() -> None:
    from open_clip import get_pretrained_cfg, list_pretrained

    checked = 0
    for model, tag in list_pretrained():
        config = get_pretrained_cfg(model, tag)
        hub_id = config.get("hf_hub", "").strip("/")
        file = config.get("url", "").rsplit("/", 1)[-1]
        if not model.startswith("ViT-") or "SigLIP" in model or model.endswith("quickgelu"):
            continue
        for clues in (Clues(REPOSITORY, hub_id=hub_id), Clues(REPOSITORY, names=(file,))):
            for release in recognise(clues):
                is_quick = bool(config.get("quick_gelu"))
                assert release.activation == ("quick_gelu" if is_quick else "gelu"), (model, tag)
                is_wide = re.match(r"ViT-(H|g|bigG)-", model) is not None
                assert release.heads == (16 if is_wide else None), (model, tag)
                checked += 1
    assert checked > 40


def test_every_release_has_a_way_to_be_recognised() -> None:
    for release in RELEASES:
        default = release.test is type(release).__dataclass_fields__["test"].default
        assert release.hub or release.files or not default, release.name


def test_every_layout_and_release_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs" / "formats.md").read_text(encoding="utf-8")
    for layout in LAYOUTS:
        assert f"`{layout}`" in text, layout
    for release in RELEASES:
        # Variants in brackets are described in the line of their release.
        assert re.split(r" \(| 1\.2| with| ViT| or ", release.name)[0] in text, release.name
