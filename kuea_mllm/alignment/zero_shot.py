"""Zero-shot accuracy during training: does the tower still live in its text tower's space?"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from kuea_mllm.alignment.heldout import EvalMode
from kuea_mllm.data.folder import FolderImages
from kuea_mllm.data.transforms import ImageTransform, unit_pixels
from kuea_mllm.errors import DataError, TowerError
from kuea_mllm.log import LOGGER
from kuea_mllm.towers.files.checkpoints import read_config

CLASS_NAMES, TEMPLATES = "classnames.txt", "templates.txt"
DEFAULT_TEMPLATE = "a photo of a {}."
_REMEDY = (
    "Give the full CLIP or SigLIP model directory (or hub id) as student.model, or leave "
    "monitor.zero_shot out."
)
_TEXTS_AT_ONCE = 256
_LEAST_VOCABULARY = 0.9


class ZeroShotProbe:
    """A labelled set of images and the embedded names of their classes.

    Pixels stay on the host as uint8 (1000 images of 336 pixels: 340 MB).

    Args:
        pixels: uint8, (images, 3, size, size).
        labels: Class of each image, (images,).
        classes: Unit text embeddings, (classes, width).
        student: The trained tower; used in eval mode without gradient.
        device: Where it is.
        batch_size: Images at once.
        precision: The same as in training.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        classes: Tensor,
        *,
        student: torch.nn.Module,
        device: torch.device,
        batch_size: int,
        precision: Literal["fp32", "bf16"],
    ) -> None:
        self._pixels, self._labels = pixels, labels.to(device)
        self._classes = classes.to(device)
        self._student, self._device = student, device
        self._batch_size, self._precision = batch_size, precision

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self._pixels)

    def measure(self) -> dict[str, float]:
        """Return `heldout_zero_shot`, the share of images whose class is the nearest text."""
        right = torch.zeros((), dtype=torch.int64, device=self._device)
        with EvalMode(self._student):
            for start in range(0, self.count, self._batch_size):
                chosen = slice(start, start + self._batch_size)
                pixels = unit_pixels(self._pixels[chosen].to(self._device))
                with torch.autocast(
                    self._device.type, torch.bfloat16, enabled=self._precision == "bf16"
                ):
                    embedded = self._student(pixels)
                # Text embeddings have unit length and an image's length changes no order.
                nearest = (embedded.float() @ self._classes.T).argmax(1)
                right += (nearest == self._labels[chosen]).sum()
        return {"heldout_zero_shot": right.item() / self.count}


def open_zero_shot(
    folder: str | Path,
    *,
    count: int,
    source: str,
    transform: ImageTransform,
    student: torch.nn.Module,
    width: int,
    device: torch.device,
    batch_size: int,
    precision: Literal["fp32", "bf16"],
    revision: str | None = None,
) -> ZeroShotProbe:
    """Read a labelled folder and embed its class names with the student's own text tower.

    A class is called like its sub-folder, with spaces for underscores, unless `classnames.txt` in
    the folder says otherwise (a line `sub-folder<TAB>name` for each class). `templates.txt` may
    hold one prompt per line, with `{}` for the name; all of them are averaged.

    Args:
        folder: One sub-folder of images per class.
        count: Images to use, spread evenly over the sorted listing and so over the classes.
        source: The student as the recipe names it: a directory or hub id of a whole CLIP or SigLIP.
        transform: What the student expects.
        student: The trained tower.
        width: Width of its embedding.
        device: Where it is.
        batch_size: Images at once.
        precision: The same as in training.
        revision: Hub revision of the source.

    Raises:
        DataError: If the folder does not hold sub-folders of images, or its text files are wrong.
        TowerError: If the source has no text tower.
        UnreadableImage: If an image cannot be read.
    """
    folder = Path(folder)
    images = FolderImages(folder)
    labels, folders = _label(images, folder)
    names = _class_names(folder, folders)
    classes = embed_class_names(source, names, _templates(folder), revision=revision)
    if classes.shape[1] != width:
        raise TowerError(
            f"the text tower of {source} embeds to width {classes.shape[1]}, its vision tower to "
            f"{width}, so images and texts cannot be compared.",
            _REMEDY,
        )
    chosen = np.unique(np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int))
    # Threads are enough: Pillow decodes without holding the interpreter lock.
    with ThreadPool() as pool:
        pixels = pool.map(lambda i: torch.from_numpy(transform.to_uint8(images.read(i))), chosen)
    LOGGER.info("zero-shot probe: %d images of %d classes in %s", len(chosen), len(names), folder)
    return ZeroShotProbe(
        torch.stack(pixels),
        torch.tensor([labels[i] for i in chosen]),
        classes,
        student=student,
        device=device,
        batch_size=batch_size,
        precision=precision,
    )


@torch.no_grad()
def embed_class_names(
    source: str,
    names: Sequence[str],
    templates: Sequence[str] = (DEFAULT_TEMPLATE,),
    *,
    revision: str | None = None,
) -> Tensor:
    """Embed class names with the text tower of a whole CLIP or SigLIP; on the CPU, once.

    Args:
        source: Directory or hub id.
        names: The classes.
        templates: Prompts, with `{}` for the name.
        revision: Hub revision.

    Returns:
        Unit vectors, (classes, width), float32: the mean over the templates.

    Raises:
        TowerError: If the source has no text tower or no tokenizer.
    """
    model, tokenizer, length = _open_text_tower(source, revision)
    prompts = [template.replace("{}", name) for name in names for template in templates]
    parts = []
    for start in range(0, len(prompts), _TEXTS_AT_ONCE):
        # Padded to full length: SigLIP was trained so, and CLIP reads its output at the first end
        # token, before any padding. No mask: SigLIP was trained without.
        encoded = tokenizer(
            prompts[start : start + _TEXTS_AT_ONCE],
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        output = model(input_ids=encoded["input_ids"])
        pooled = getattr(output, "text_embeds", None)
        parts.append((output.pooler_output if pooled is None else pooled).float())
    embedded = normalize(torch.cat(parts)).view(len(names), len(templates), -1)
    return normalize(embedded.mean(1))


def _open_text_tower(source: str, revision: str | None) -> tuple[Any, Any, int]:
    from transformers import (
        AutoConfig,
        AutoTokenizer,
        CLIPTextModelWithProjection,
        SiglipTextModel,
    )

    path = Path(source)
    if path.is_file():
        raise _no_text_tower(source, "it is a checkpoint file")
    if path.is_dir():
        read_config(path)  # says what is wrong with a directory that is none of a model
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:  # such as an open_clip repository on the Hub
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise _no_text_tower(source, f"transformers cannot read it: {reason}") from error
    classes: dict[str, Any] = {"clip": CLIPTextModelWithProjection, "siglip": SiglipTextModel}
    if config.model_type not in classes:
        raise _no_text_tower(source, f"its model type is {config.model_type!r}")
    text_config = config.text_config
    if config.model_type == "clip":
        # The whole model goes by the outer number; the inner one may be a default of 512.
        text_config.projection_dim = config.projection_dim
    # Both classes read the text half alone, and leave the vision weights on the disk. Their report
    # of everything that was left out would bury the log.
    with _quiet("transformers"):
        model, report = classes[config.model_type].from_pretrained(
            source,
            config=text_config,
            revision=revision,
            dtype=torch.float32,
            output_loading_info=True,
        )
    if wrong := sorted({*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])}):
        raise _no_text_tower(source, f"{wrong[0]} ({len(wrong)} tensors) is missing or misshapen")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise _no_tokenizer(source, "none could be loaded") from error
    # Without its files, transformers makes up a tokenizer of a few tokens and says nothing.
    if len(tokenizer) < _LEAST_VOCABULARY * text_config.vocab_size:
        raise _no_tokenizer(
            source, f"it knows {len(tokenizer)} of the text tower's {text_config.vocab_size} tokens"
        )
    return model.eval(), tokenizer, int(model.config.max_position_embeddings)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Hold back the warnings of one logger of a library."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _no_tokenizer(source: str, reason: str) -> TowerError:
    return TowerError(
        f"student {source} has no tokenizer, which monitor.zero_shot needs: {reason}.",
        "Copy its tokenizer files beside the weights, or leave monitor.zero_shot out.",
    )


def _no_text_tower(source: str, reason: str) -> TowerError:
    return TowerError(
        f"student {source} has no text tower, which monitor.zero_shot needs: {reason}.", _REMEDY
    )


def _label(images: FolderImages, folder: Path) -> tuple[list[int], list[str]]:
    """Return the class of each image, and the sub-folders in their order."""
    folders = []
    for index in range(len(images)):
        inside = Path(images.name(index)).relative_to(folder).parts
        if len(inside) < 2:
            raise DataError(
                f"image {images.name(index)} lies in no sub-folder of {folder}.",
                "monitor.zero_shot takes a folder with one sub-folder of images per class.",
            )
        folders.append(inside[0])
    order = sorted(set(folders))
    if len(order) < 2:
        raise DataError(
            f"folder {folder} holds one class only, {order[0]!r}; every guess would be right.",
            "monitor.zero_shot takes a folder with one sub-folder of images per class.",
        )
    numbers = {name: number for number, name in enumerate(order)}
    return [numbers[name] for name in folders], order


def _class_names(folder: Path, folders: Sequence[str]) -> list[str]:
    path = folder / CLASS_NAMES
    if not path.exists():
        names = [name.replace("_", " ") for name in folders]
        where = f"sub-folders of {folder}"
    else:
        given: dict[str, str] = {}
        for number, line in enumerate(_lines(path), start=1):
            key, tab, name = line.partition("\t")
            if not tab or not name.strip():
                raise DataError(f"line {number} of {path} is not `sub-folder<TAB>name`: {line!r}.")
            given[key] = name.strip()
        if absent := [name for name in folders if name not in given]:
            raise DataError(
                f"{path} gives no name for {absent[0]!r} ({len(absent)} of {len(folders)} "
                "sub-folders are missing)."
            )
        names, where = [given[name] for name in folders], str(path)
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        # Real in ImageNet's first list ("crane" twice); no image of the second could be right.
        raise DataError(
            f"{where}: {times} classes are called {name!r}, so they cannot be told apart.",
            f"Give each class a name of its own in {path}.",
        )
    return names


def _templates(folder: Path) -> list[str]:
    path = folder / TEMPLATES
    if not path.exists():
        return [DEFAULT_TEMPLATE]
    templates = _lines(path)
    for number, line in enumerate(templates, start=1):
        if "{}" not in line:
            raise DataError(f"line {number} of {path} has no {{}} for the class name: {line!r}.")
    if not templates:
        raise DataError(f"{path} holds no prompt.", "Write one per line, with {} for the name.")
    return templates


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason}.") from error
    return [line.strip("\r") for line in text.split("\n") if line.strip()]
