"""Tiny data sets in every layout, and tiny models that see and read."""

from __future__ import annotations

import copy
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from kuea_mllm.config.probe import ProbeData

CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": 16,
            "layers": 2,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
        },
        # OpenAI's vocabulary, so that its tokenizer is used, which needs no file.
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 8,
            "heads": 2,
            "layers": 2,
        },
    },
    "preprocess_cfg": {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]},
}


def model_settings() -> dict[str, Any]:
    """Return a copy of the model's settings, to be changed at will."""
    return copy.deepcopy(CONFIG["model_cfg"])


def clip_model(seed: int = 0) -> Any:
    """Return a tiny open_clip model whose embeddings spread."""
    torch.manual_seed(seed)
    settings = {
        key: dict(v) if isinstance(v, dict) else v for key, v in CONFIG["model_cfg"].items()
    }
    model = open_clip.CLIP(**settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in {"logit_scale", "token_embedding.weight"}:
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.token_embedding.weight.normal_()
    return model


def write_clip(directory: Path, seed: int = 0) -> Any:
    """Write a tiny open_clip repository and return its model."""
    model = clip_model(seed)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "open_clip_config.json").write_text(json.dumps(CONFIG))
    save_file(model.state_dict(), directory / "open_clip_model.safetensors")
    return model


def picture(number: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """Return a picture that no other number gives."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def captions_of(number: int, count: int = 5) -> list[str]:
    words = ("dog", "cat", "tree", "boat", "red", "blue", "street", "child", "snow", "table")
    rng = np.random.default_rng([number, 1])
    return [" ".join(rng.choice(words, 6)) + f" number {number} {i}" for i in range(count)]


def write_wds(
    folder: Path,
    split: str,
    texts: Sequence[str],
    *,
    extension: str = "cls",
    shards: int = 2,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    size: tuple[int, int] = (24, 20),
    first: int = 0,
) -> Path:
    """Write a split as clip-benchmark's own exporter lays it out."""
    (folder / split).mkdir(parents=True)
    (folder / split / "nshards.txt").write_text(str(shards))
    if extension == "txt":
        (folder / "dataset_type.txt").write_text("retrieval")
    if class_names is not None:
        (folder / "classnames.txt").write_text("\n".join(class_names))
    if templates is not None:
        (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates))
    for shard, numbers in enumerate(np.array_split(np.arange(len(texts)), shards)):
        with tarfile.open(folder / split / f"{shard}.tar", "w") as archive:
            for number in numbers.tolist():
                stem = f"s{number:07d}"
                _add(archive, f"{stem}.{extension}", texts[number].encode())
                _add(archive, f"{stem}.png", _png(picture(first + number, size)))
    return folder


def write_folder(folder: Path, split: str, classes: Sequence[str], per_class: int = 2) -> Path:
    """Write `split/class/image`."""
    for number, name in enumerate(classes):
        (folder / split / name).mkdir(parents=True)
        for index in range(per_class):
            picture(number * per_class + index).save(folder / split / name / f"{index}.png")
    return folder


def write_karpathy(folder: Path, count: int, *, split: str = "test", missing: int = 0) -> Path:
    """Write Karpathy's split file of Flickr30K and its images, except the last `missing`."""
    (folder / "flickr30k-images").mkdir(parents=True)
    entries = []
    for number in range(count):
        name = f"{number}.png"
        sentences = [{"raw": text} for text in captions_of(number)]
        entries.append({"filename": name, "split": split, "sentences": sentences})
        if number < count - missing:
            picture(number).save(folder / "flickr30k-images" / name)
    entries.append({"filename": "unused.png", "split": "train", "sentences": [{"raw": "a"}]})
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": entries}))
    return folder


def write_like(data: ProbeData, folder: Path, *, classes: int, per_class: int = 1) -> Path:
    """Write a small local data set of the schema that a recipe's entry describes."""
    place = folder / data.key
    splits = [data.split, *([data.train_split] if data.train_split else [])]
    for number, split in enumerate(splits):
        if data.metric == "recall@k":
            texts = ["\n".join(captions_of(i)) for i in range(classes)]
            write_wds(place, split, texts, extension="txt")
            continue
        labels = [str(label) for label in range(classes) for _ in range(per_class)]
        size = (16, 16) if data.name.startswith("CIFAR") else (24, 20)
        write_wds(place, split, labels, size=size, first=1000 * number)
    if data.metric != "recall@k" and data.classnames is None:
        names = "\n".join(f"thing {number}" for number in range(classes))
        (place / "classnames.txt").write_text(names)
    return place


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="png")
    return stream.getvalue()
