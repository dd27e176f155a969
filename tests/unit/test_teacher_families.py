"""Every family of teachers: its embedding and its patch tokens, against its own definition."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.models import _hub as timm_hub
from torch import Tensor, nn

from kuea_mllm.errors import TowerError
from kuea_mllm.teachers import Teacher, load_teacher

SIDE = 28
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 7,
}
MLP: dict[str, Any] = {**VIT, "intermediate_size": 48}
TIMM: dict[str, Any] = {
    "img_size": SIDE,
    "patch_size": 7,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
}


@dataclass(frozen=True)
class Family:
    """A model and what its readouts are by its own definition; None where it has none.

    Attributes:
        make: Builds a tiny random one.
        norm: Name of the final norm that patch tokens go through.
        skipped: Class tokens and registers before the patches.
        has_class: Whether the first token is a class token.
        pooled: Its image embedding, from the model and normalised pixels.
        normed: Whether its last hidden state is normed already.
        grid: Patches per side.
        side: Side of its images.
    """

    make: Callable[[], nn.Module]
    norm: str | None
    skipped: int = 0
    has_class: bool = False
    pooled: Callable[[Any, Tensor], Tensor] | None = None
    normed: bool = True
    grid: int | None = 4
    side: int = SIDE


def hf(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model_class = getattr(transformers, name)
        model: nn.Module = model_class(model_class.config_class(**settings))
        return model

    return make


def named(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **settings)


def pooler(model: Any, pixels: Tensor) -> Tensor:
    result: Tensor = model(pixel_values=pixels).pooler_output
    return result.flatten(1)


def image_embeds(model: Any, pixels: Tensor) -> Tensor:
    result: Tensor = model(pixel_values=pixels).image_embeds
    return result


def without_classifier(model: Any, pixels: Tensor) -> Tensor:
    result: Tensor = model.forward_head(model.forward_features(pixels), pre_logits=True)
    return result


FAMILIES = {
    "dinov2": Family(hf("Dinov2Model", **VIT), "layernorm", 1, True, pooler),
    "dinov2_registers": Family(
        hf("Dinov2WithRegistersModel", **VIT, num_register_tokens=4), "layernorm", 5, True, pooler
    ),
    "dinov3": Family(hf("DINOv3ViTModel", **MLP, num_register_tokens=3), "norm", 4, True, pooler),
    "dinov3_convnext": Family(
        hf("DINOv3ConvNextModel", hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], image_size=64),
        "layer_norm",
        1,
        True,
        pooler,
        grid=2,
        side=64,
    ),
    "mlcd": Family(
        hf("MLCDVisionModel", **MLP, num_key_value_groups=1),
        "post_layernorm",
        1,
        True,
        pooler,
        normed=False,
    ),
    "clip": Family(
        hf("CLIPVisionModelWithProjection", **MLP, projection_dim=24),
        "vision_model.post_layernorm",
        1,
        True,
        image_embeds,
        normed=False,
    ),
    "bare_clip": Family(
        hf("CLIPVisionModel", **MLP), "post_layernorm", 1, True, pooler, normed=False
    ),
    "siglip": Family(hf("SiglipVisionModel", **MLP), "post_layernorm", 0, False, pooler),
    "vit": Family(hf("ViTModel", **MLP), "layernorm", 1, True, pooler),
    "deit": Family(hf("DeiTModel", **MLP), "layernorm", 2, True, pooler),
    "timm_registers": Family(
        named("vit_tiny_patch16_224", **TIMM, reg_tokens=2, num_classes=3),
        "norm",
        3,
        True,
        without_classifier,
    ),
    "timm_average": Family(
        named("vit_tiny_patch16_224", **TIMM, class_token=False, global_pool="avg", fc_norm=False),
        "norm",
        0,
        False,
        without_classifier,
    ),
    "timm_siglip": Family(
        named("vit_base_patch16_siglip_224", **TIMM), "norm", 0, False, without_classifier
    ),
    # Without one token per patch, or without a final norm on the tokens.
    "swin": Family(
        hf("SwinModel", embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, image_size=32),
        None,
        pooled=pooler,
        grid=None,
        side=32,
    ),
    "beit": Family(hf("BeitModel", **MLP), None, pooled=pooler, grid=None),
    "resnet": Family(
        hf("ResNetModel", embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]),
        None,
        pooled=pooler,
        grid=None,
        side=32,
    ),
    "timm_convnext": Family(
        named("test_convnext"), None, pooled=without_classifier, grid=None, side=160
    ),
    "timm_average_norm": Family(
        named("vit_tiny_patch16_224", **TIMM, class_token=False, global_pool="avg"),
        None,
        pooled=without_classifier,
        grid=None,
    ),
}
WITH_GRID = [name for name, family in FAMILIES.items() if family.grid]
WITHOUT_GRID = [name for name in FAMILIES if name not in WITH_GRID]


@dataclass(frozen=True)
class Sample:
    """A family's random model, and the directory it was saved to."""

    family: Family
    model: Any
    directory: Path

    def pixels(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.rand(2, 3, self.family.side, self.family.side, generator=generator)

    def load(self, **options: Any) -> Teacher:
        return load_teacher(self.directory, **options)

    def normalised(self, teacher: Teacher) -> Tensor:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (teacher.mean, teacher.std))
        return (self.pixels() - mean) / std

    def readouts(self) -> list[str]:
        found = ["pooled"] + ["mean_patch"] * bool(self.family.grid)
        return found + ["cls"] * self.family.has_class

    @torch.no_grad()
    def expected(self, teacher: Teacher) -> dict[str, Tensor]:
        """Compute every readout from the family's own modules."""
        pixels, family = self.normalised(teacher), self.family
        assert family.pooled is not None
        found = {"pooled": family.pooled(self.model, pixels)}
        if family.norm is None:
            return found
        norm = self.model.get_submodule(family.norm)
        if isinstance(self.model, transformers.PreTrainedModel):
            tokens = self.model(pixel_values=pixels).last_hidden_state
        else:
            tokens = self.model.forward_features(pixels)
        tokens = tokens if family.normed else norm(tokens)
        found["patches"] = tokens[:, family.skipped :]
        found["mean_patch"] = found["patches"].mean(1)
        found["cls"] = tokens[:, 0]
        return found


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Sample]:
    root = tmp_path_factory.mktemp("families")
    made: dict[str, Sample] = {}

    def sample(name: str) -> Sample:
        if name not in made:
            torch.manual_seed(len(made))
            model: Any = FAMILIES[name].make().eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
            if isinstance(model, transformers.PreTrainedModel):
                model.save_pretrained(root / name)
                side = FAMILIES[name].side
                settings = {"image_mean": MEAN, "image_std": STD, "size": side, "crop_size": side}
                (root / name / "preprocessor_config.json").write_text(json.dumps(settings))
            else:
                timm_hub.save_for_hf(model, str(root / name), safe_serialization=True)
            made[name] = Sample(FAMILIES[name], model, root / name)
        return made[name]

    return sample


@pytest.mark.parametrize("name", FAMILIES)
def test_readouts_are_the_familys_own(name: str, samples: Callable[[str], Sample]) -> None:
    sample = samples(name)
    for readout in sample.readouts():
        teacher = sample.load(readout=readout)
        expected = sample.expected(teacher)[readout]
        torch.testing.assert_close(teacher(sample.pixels()), expected, rtol=1e-5, atol=1e-6)
        assert teacher.width == expected.shape[1]
        assert teacher.image_size == sample.family.side


@pytest.mark.parametrize("name", WITH_GRID)
def test_patches_are_the_familys_own_and_come_with_the_embedding(
    name: str, samples: Callable[[str], Sample]
) -> None:
    sample = samples(name)
    for readout in sample.readouts():
        teacher = sample.load(readout=readout)
        features = teacher.features(sample.pixels(), patches=True)
        expected = sample.expected(teacher)["patches"]
        assert features.patches is not None
        torch.testing.assert_close(features.patches, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(features.pooled, teacher(sample.pixels()))
        assert teacher.features(sample.pixels(), patches=False).patches is None
        assert (teacher.grid, teacher.patch_width) == (sample.family.grid, expected.shape[2])
        assert expected.shape[1] == teacher.grid**2


@pytest.mark.parametrize("name", WITH_GRID)
def test_patches_have_been_through_the_final_norm(
    name: str, samples: Callable[[str], Sample]
) -> None:
    sample = samples(name)
    teacher = sample.load(readout="mean_patch")
    patches = teacher.features(sample.pixels(), patches=True).patches
    norm = sample.model.get_submodule(sample.family.norm)
    # Its weight and bias taken off again, a normed token has mean 0 and deviation 1.
    plain = (patches - norm.bias.detach()) / norm.weight.detach()
    assert float(plain.mean(-1).abs().max()) < 1e-4
    assert float((plain.var(-1, unbiased=False) - 1).abs().max()) < 1e-2


@pytest.mark.parametrize("name", WITHOUT_GRID)
def test_models_without_patch_tokens_say_so(name: str, samples: Callable[[str], Sample]) -> None:
    sample = samples(name)
    teacher = sample.load(readout="pooled")
    assert teacher.grid is None
    assert teacher.patch_width is None
    assert teacher.features(sample.pixels(), patches=False).pooled.shape[0] == 2
    with pytest.raises(TowerError, match="has no patch tokens: ") as caught:
        teacher.features(sample.pixels(), patches=True)
    assert str(sample.directory) in caught.value.problem
    for readout in ("cls", "mean_patch"):
        with pytest.raises(TowerError, match=f"cannot be read as {readout}"):
            sample.load(readout=readout)


@pytest.mark.parametrize("name", ["siglip", "timm_average", "timm_siglip"])
def test_models_without_class_token_cannot_be_read_as_cls(
    name: str, samples: Callable[[str], Sample]
) -> None:
    with pytest.raises(TowerError, match="no class token"):
        samples(name).load()


def test_naflex_siglip2_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "siglip2_vision_model"}')
    with pytest.raises(TowerError, match="NaFlex SigLIP2") as caught:
        load_teacher(tmp_path, readout="pooled")
    assert "fixed resolution" in caught.value.remedy


def test_open_clip_repository_is_a_teacher(tmp_path: Path) -> None:
    import open_clip

    vision = {"image_size": 16, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CLIP(24, vision_cfg=vision, text_cfg=text, quick_gelu=True).eval()
    settings = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    content = {"model_cfg": settings, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    teacher = load_teacher(tmp_path, readout="pooled")
    assert (teacher.mean, teacher.std, teacher.image_size) == (MEAN, STD, 16)
    pixels = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    with torch.no_grad():
        expected = model.encode_image((pixels - mean) / std)
    torch.testing.assert_close(teacher(pixels), expected, rtol=1e-5, atol=1e-6)
    assert (teacher.width, teacher.patch_width, teacher.grid) == (24, 64, 2)


def test_timm_teacher_brings_its_own_pixels_and_takes_another_size(
    samples: Callable[[str], Sample],
) -> None:
    sample = samples("timm_registers")
    teacher = sample.load()
    assert (teacher.mean, teacher.std) == ((0.5,) * 3, (0.5,) * 3)
    large = sample.load(image_size=2 * SIDE)
    assert (large.image_size, large.grid) == (2 * SIDE, 8)
    assert large.fingerprint != teacher.fingerprint
    assert sample.load().fingerprint == teacher.fingerprint
    other = sample.load(normalisation="student", student_mean=MEAN, student_std=STD)
    assert (other.mean, other.std) == (MEAN, STD)
    assert load_teacher(f"hf-hub:{sample.directory}").fingerprint == teacher.fingerprint
    assert samples("timm_convnext").load(readout="pooled", image_size=64).image_size == 64


def test_timm_name_reads_the_weights_of_a_file(tmp_path: Path) -> None:
    model = timm.create_model("test_vit")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    teacher = load_teacher(f"timm:test_vit@{tmp_path / 'weights.pth'}")
    pixels = torch.rand(1, 3, 160, 160)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (teacher.mean, teacher.std))
    with torch.no_grad():
        expected = model.eval().forward_features((pixels - mean) / std)[:, 0]
    torch.testing.assert_close(teacher(pixels), expected)
    with pytest.raises(TowerError, match="there is no file"):
        load_teacher("timm:test_vit@gone.pth")
    with pytest.raises(TowerError, match="timm chooses the revision"):
        load_teacher("timm:test_vit", revision="main")
    with pytest.raises(TowerError, match="knows no model 'test_vitt'") as caught:
        load_teacher("timm:test_vitt")
    assert "test_vit" in caught.value.remedy


def test_timm_weights_are_never_made_up(samples: Callable[[str], Sample], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = samples("timm_registers").directory
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TowerError, match="cannot be loaded by timm with its weights"):
        load_teacher(tmp_path)
    weights = load_file(source / "model.safetensors")
    del weights["blocks.1.norm1.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(TowerError, match=r"Missing key.*blocks\.1\.norm1\.bias"):
        load_teacher(tmp_path)
    # A model without pretrained weights, by name.
    unknown = next(n for n in timm.list_models() if not timm.is_model_pretrained(n))
    with pytest.raises(TowerError, match=f"timm has no weights for {unknown}"):
        load_teacher(f"timm:{unknown}")
