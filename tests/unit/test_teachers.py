"""Teachers: what is read out, at which size, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from kuea_mllm.errors import TowerError
from kuea_mllm.teachers import Teacher, load_teacher, resize_pixels
from kuea_mllm.towers.spec import CLIP_MEAN, CLIP_STD

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
MLP: dict[str, Any] = {**SIZES, "intermediate_size": 48}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MODELS: dict[str, Any] = {
    "dinov2_reg": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**SIZES, num_register_tokens=4)
    ),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES)),
    "vit": lambda: ViTModel(ViTConfig(**MLP)),
    "clip": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**MLP, projection_dim=24)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**MLP)),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    for index, (name, make) in enumerate(MODELS.items()):
        torch.manual_seed(index)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(root / name)
        settings = {"image_mean": MEAN, "image_std": STD, "size": 28, "crop_size": 28}
        (root / name / "preprocessor_config.json").write_text(json.dumps(settings))
    return {name: root / name for name in MODELS}


def pixels(side: int = 28) -> Tensor:
    return torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(1))


def reference(model_class: Any, directory: Path, images: Tensor) -> Any:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    with torch.no_grad():
        return model_class.from_pretrained(directory)((images - mean) / std)


def test_cls_is_the_class_token_after_the_final_norm(directories: dict[str, Path]) -> None:
    for name, model_class in (("dinov2_reg", Dinov2WithRegistersModel), ("dinov2", Dinov2Model)):
        found = load_teacher(directories[name])(pixels())
        output = reference(model_class, directories[name], pixels())
        torch.testing.assert_close(found, output.last_hidden_state[:, 0])
        torch.testing.assert_close(found, output.pooler_output)
    found = load_teacher(directories["clip"])(pixels())
    bare = CLIPVisionModelWithProjection.from_pretrained(directories["clip"])
    hidden = reference(CLIPVisionModelWithProjection, directories["clip"], pixels())
    expected = bare.vision_model.post_layernorm(hidden.last_hidden_state[:, 0])
    torch.testing.assert_close(found, expected.detach())


def test_mean_patch_skips_class_token_and_registers(directories: dict[str, Path]) -> None:
    for name, model_class, skipped in (
        ("dinov2_reg", Dinov2WithRegistersModel, 5),
        ("dinov2", Dinov2Model, 1),
        ("siglip", SiglipVisionModel, 0),
    ):
        found = load_teacher(directories[name], readout="mean_patch")(pixels())
        tokens = reference(model_class, directories[name], pixels()).last_hidden_state
        torch.testing.assert_close(found, tokens[:, skipped:].mean(1))


def test_pooled_is_the_pooler_or_the_projected_embedding(directories: dict[str, Path]) -> None:
    for name, model_class, key in (
        ("siglip", SiglipVisionModel, "pooler_output"),
        ("clip", CLIPVisionModelWithProjection, "image_embeds"),
        ("vit", ViTModel, "pooler_output"),
    ):
        teacher = load_teacher(directories[name], readout="pooled")
        expected = getattr(reference(model_class, directories[name], pixels()), key)
        torch.testing.assert_close(teacher(pixels()), expected)
        assert teacher.width == expected.shape[1]


def test_teacher_is_frozen_and_stays_in_eval_mode(directories: dict[str, Path]) -> None:
    teacher = load_teacher(directories["dinov2"])
    torch.nn.Sequential(teacher).train()
    assert not teacher.training
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher(pixels().requires_grad_()).requires_grad


def test_other_sizes_are_resized_without_clamping(directories: dict[str, Path]) -> None:
    teacher = load_teacher(directories["dinov2"])
    large = (pixels(42) > 0.5).float()
    torch.testing.assert_close(teacher(large), teacher(resize_pixels(large, 28)))
    assert float(resize_pixels(large, 28).max()) > 1
    assert resize_pixels(large, 42) is large
    with pytest.raises(ValueError, match="square"):
        resize_pixels(torch.zeros(1, 3, 4, 5), 4)


def test_student_normalisation_replaces_the_teachers_own(directories: dict[str, Path]) -> None:
    source = directories["dinov2"]
    own = load_teacher(source)
    student = load_teacher(
        source, normalisation="student", student_mean=CLIP_MEAN, student_std=CLIP_STD
    )
    assert (own.mean, own.std) == (MEAN, STD)
    assert (student.mean, student.std) == (CLIP_MEAN, CLIP_STD)
    assert not torch.allclose(own(pixels()), student(pixels()))
    with pytest.raises(TowerError, match="mean and deviation of its pixels are unknown"):
        load_teacher(source, normalisation="student")


def test_teacher_without_image_processor_needs_the_students(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    Dinov2Model.from_pretrained(directories["dinov2"]).save_pretrained(tmp_path)
    with pytest.raises(TowerError, match="unknown") as caught:
        load_teacher(tmp_path)
    assert "normalisation to student" in caught.value.remedy
    teacher = load_teacher(
        tmp_path, normalisation="student", student_mean=CLIP_MEAN, student_std=CLIP_STD
    )
    assert teacher.image_size == 28


def test_image_size_can_be_chosen_where_the_model_allows(directories: dict[str, Path]) -> None:
    teacher = load_teacher(directories["dinov2_reg"], image_size=14)
    assert teacher.image_size == 14
    assert teacher(pixels()).shape == (3, 32)
    with pytest.raises(TowerError, match="does not take images of 14 pixels"):
        load_teacher(directories["clip"], image_size=14)


def test_fingerprint_covers_all_that_embeddings_depend_on(directories: dict[str, Path]) -> None:
    source = directories["dinov2"]
    teachers: list[Teacher] = [
        load_teacher(source),
        load_teacher(source, readout="mean_patch"),
        load_teacher(source, image_size=14),
        load_teacher(source, normalisation="student", student_mean=CLIP_MEAN, student_std=CLIP_STD),
        load_teacher(directories["dinov2_reg"]),
    ]
    assert len({t.fingerprint for t in teachers}) == len(teachers)
    assert load_teacher(source).fingerprint == teachers[0].fingerprint
    assert len({t.weights_fingerprint for t in teachers}) == 2


def test_double_precision_is_kept(directories: dict[str, Path]) -> None:
    wide = load_teacher(directories["dinov2"], dtype=torch.float64)
    narrow = load_teacher(directories["dinov2"])
    assert wide(pixels()).dtype == torch.float64
    torch.testing.assert_close(wide(pixels()).float(), narrow(pixels()), rtol=1e-4, atol=1e-5)


def test_model_without_class_token_cannot_be_read_as_cls(directories: dict[str, Path]) -> None:
    with pytest.raises(TowerError, match="no class token") as caught:
        load_teacher(directories["siglip"])
    assert "mean_patch" in caught.value.remedy


def test_text_models_are_no_teachers(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertModel(BertConfig(**sizes, intermediate_size=16, vocab_size=10)).save_pretrained(tmp_path)
    with pytest.raises(TowerError, match="is no vision model: its model_type is 'bert'"):
        load_teacher(tmp_path)
    LlamaConfig(**sizes).save_pretrained(tmp_path)
    with pytest.raises(TowerError, match="'llama'"):
        load_teacher(tmp_path)


def test_sources_that_are_no_models_are_refused(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing_known"}')
    with pytest.raises(TowerError, match="does not know the model type 'nothing_known'"):
        load_teacher(tmp_path)
    (tmp_path / "final.pt").touch()
    with pytest.raises(TowerError, match="is a file"):
        load_teacher(tmp_path / "final.pt")
    with pytest.raises(TowerError, match="no file or directory"):
        load_teacher(tmp_path / "gone")
    config = (directories["dinov2"] / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(TowerError, match="cannot be loaded"):
        load_teacher(tmp_path)


def test_missing_weights_are_never_made_up(directories: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for name, gone in (("dinov2", "layernorm.bias"), ("vit", "pooler.dense.bias")):
        weights = load_file(directories[name] / "model.safetensors")
        (key,) = (k for k in weights if k == gone)
        del weights[key]
        target = tmp_path / name
        target.mkdir()
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
        for file in ("config.json", "preprocessor_config.json"):
            (target / file).write_text((directories[name] / file).read_text())
    with pytest.raises(TowerError, match=r"lacks weights: layernorm\.bias"):
        load_teacher(tmp_path / "dinov2")
    with pytest.raises(TowerError, match=r"lacks weights: pooler\.dense\.bias"):
        load_teacher(tmp_path / "vit", readout="pooled")
    one, two = (load_teacher(tmp_path / "vit") for _ in range(2))
    assert one.width == 32
    assert one.fingerprint == two.fingerprint
