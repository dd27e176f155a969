"""The zero-shot probe: its folder, its text tower, its accuracy."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
)

from kuea_mllm.alignment.zero_shot import embed_class_names, open_zero_shot
from kuea_mllm.data.transforms import ImageTransform
from kuea_mllm.errors import DataError, TowerError
from kuea_mllm.miniworld import ASSETS
from kuea_mllm.towers.model.encode import TowerEncoder
from kuea_mllm.towers.reading.load import load_tower
from kuea_mllm.towers.writing.save import save_tower

CLIP = str(ASSETS / "clip")
SIZE = 32


@pytest.fixture(scope="module")
def student():
    return TowerEncoder(load_tower(CLIP))


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for name, shade in (("seven", 40), ("three", 120), ("sea_lion", 200)):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for number in range(4):
            noise = random.integers(0, 40, (SIZE, SIZE, 3))
            picture = Image.fromarray((shade + noise).astype(np.uint8))
            picture.save(tmp_path / "classes" / name / f"{number}.png")
    return tmp_path / "classes"


def open_probe(folder, student, **changes):
    settings = {
        "count": 100,
        "source": CLIP,
        "transform": ImageTransform(SIZE),
        "student": student,
        "width": 64,
        "device": torch.device("cpu"),
        "batch_size": 5,
        "precision": "fp32",
    }
    return open_zero_shot(folder, **{**settings, **changes})


class Oracle(nn.Module):
    """Knows the class of a picture by its brightness, and gives the text embedding of a class."""

    def __init__(self, names, answers):
        super().__init__()
        self.classes = embed_class_names(CLIP, names)
        self.answers = torch.tensor(answers)

    def forward(self, pixels01):
        assert pixels01.max() <= 1
        brightness = pixels01.mean((1, 2, 3)) * 255
        return 3 * self.classes[self.answers[torch.bucketize(brightness, torch.tensor([100, 180]))]]


# Dark pictures are "seven", the brightest "sea lion".
NAMES = ["seven", "three", "sea lion"]


@pytest.mark.parametrize(
    ("answers", "expected"), [([0, 1, 2], 1.0), ([0, 1, 0], 8 / 12), ([1, 2, 0], 0.0)]
)
def test_accuracy_is_the_share_of_images_next_to_their_own_class(folder, answers, expected):
    probe = open_probe(folder, Oracle(NAMES, answers))
    assert probe.count == 12
    assert probe.measure() == {"heldout_zero_shot": expected}


def test_probe_agrees_with_the_whole_model(folder, student):
    probe = open_probe(folder, student)
    clip = CLIPModel.from_pretrained(CLIP).eval()
    tokens = AutoTokenizer.from_pretrained(CLIP)(
        [f"a photo of a {name}." for name in ("sea lion", "seven", "three")],
        padding=True,
        return_tensors="pt",
    )
    pixels = probe._pixels.float() / 255
    normalised = (pixels - torch.tensor(student.spec.mean)[:, None, None]) / torch.tensor(
        student.spec.std
    )[:, None, None]
    with torch.no_grad():
        logits = clip(**tokens, pixel_values=normalised).logits_per_image
    expected = (logits.argmax(1) == probe._labels).float().mean().item()
    assert probe.measure()["heldout_zero_shot"] == pytest.approx(expected)


def test_fewer_images_are_spread_over_all_classes(folder, student):
    probe = open_probe(folder, student, count=3)
    assert probe._labels.tolist() == [0, 1, 2]


def test_names_and_prompts_of_files_replace_those_of_folders(folder, student):
    (folder / "classnames.txt").write_text("three\tthree\nseven\tone\nsea_lion\ttwo\n")
    (folder / "templates.txt").write_text("a scan of a {}.\n\na {}\n")
    probe = open_probe(folder, student)
    expected = embed_class_names(CLIP, ["two", "one", "three"], ["a scan of a {}.", "a {}"])
    assert probe._classes.equal(expected)
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(3))
    assert not expected.equal(embed_class_names(CLIP, ["two", "one", "three"]))


BAD_FILES = {
    "line without tab": ("classnames.txt", "three three\n", "line 1"),
    "class without name": ("classnames.txt", "three\tthree\n", "no name for 'sea_lion'"),
    "two classes of one name": (
        "classnames.txt",
        "three\tcrane\nseven\tcrane\nsea_lion\ttwo\n",
        "2 classes are called 'crane'",
    ),
    "prompt without place": ("templates.txt", "a photo\n", "line 1"),
    "no prompt": ("templates.txt", "\n", "no prompt"),
    "not text": ("templates.txt", b"\xff\xfe\x00", "UTF-8"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_text_files_are_named(folder, student, case):
    name, content, expected = BAD_FILES[case]
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=expected) as caught:
        open_probe(folder, student)
    assert name in str(caught.value)


def test_images_outside_of_classes_are_refused(folder, student):
    Image.new("RGB", (SIZE, SIZE)).save(folder / "stray.png")
    with pytest.raises(DataError, match=r"stray\.png lies in no sub-folder"):
        open_probe(folder, student)


def test_a_single_class_is_refused(folder, student):
    for name in ("seven", "three"):
        for path in (folder / name).iterdir():
            path.unlink()
    with pytest.raises(DataError, match="one class only"):
        open_probe(folder, student)


def test_student_without_text_tower_is_named_with_the_remedy(folder, student, tmp_path):
    save_tower(load_tower(CLIP), tmp_path / "tower", manifest={})
    file = tmp_path / "tower" / "model.safetensors"
    for source in (tmp_path / "tower", file):
        with pytest.raises(TowerError, match="has no text tower") as caught:
            open_probe(folder, student, source=str(source))
        assert str(source) in caught.value.problem
        assert "monitor.zero_shot" in caught.value.remedy


def test_student_without_tokenizer_is_named(folder, student, tmp_path):
    CLIPModel.from_pretrained(CLIP).save_pretrained(tmp_path / "clip")
    with pytest.raises(TowerError, match="no tokenizer"):
        open_probe(folder, student, source=str(tmp_path / "clip"))


def test_vision_tower_of_another_width_is_refused(folder, student):
    with pytest.raises(TowerError, match="width 64, its vision tower to 48"):
        open_probe(folder, student, width=48)


TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "max_position_embeddings": 12,
    "vocab_size": 624,
}
VISION = {**TEXT, "image_size": 32, "patch_size": 16}
del VISION["max_position_embeddings"], VISION["vocab_size"]


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_random_text_towers_give_what_the_whole_model_gives(family, tmp_path):
    torch.manual_seed(0)
    if family == "clip":
        ends = {"bos_token_id": 622, "eos_token_id": 623, "pad_token_id": 623}
        model = CLIPModel(
            CLIPConfig(text_config=TEXT | ends, vision_config=VISION, projection_dim=8)
        )
    else:
        ends = {"bos_token_id": 622, "eos_token_id": 623, "pad_token_id": 623}
        model = SiglipModel(SiglipConfig(text_config=TEXT | ends, vision_config=VISION))
    model.eval().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(CLIP)
    tokenizer.save_pretrained(tmp_path)
    encoded = tokenizer(
        ["a photo of a three.", "a photo of a seven."],
        padding="max_length",
        max_length=12,
        return_tensors="pt",
    )
    with torch.no_grad():
        output = model.get_text_features(input_ids=encoded["input_ids"])
    features = output if isinstance(output, torch.Tensor) else output.pooler_output
    expected = torch.nn.functional.normalize(features)
    torch.testing.assert_close(embed_class_names(str(tmp_path), ["three", "seven"]), expected)
