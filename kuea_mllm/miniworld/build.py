"""Building the mini world from nothing: CLIP, teacher, LLaVA, and a record of how good they are.

python -m kuea_mllm.miniworld.build --seed 0 --out DIR
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kuea_mllm.errors import DataError
from kuea_mllm.io import atomic_directory, write_json

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import (
        CLIPModel,
        Dinov2WithRegistersModel,
        LlamaTokenizer,
        LlavaForConditionalGeneration,
        PreTrainedModel,
    )

_SCHEMA = 1
_Result = TypeVar("_Result")


def build_world(
    out: Path, *, seed: int, teacher: Path | None = None, progress: bool = True
) -> None:
    """Train the three models and write them as plain Hugging Face directories.

    Writes `clip/`, `teacher/`, `llava/` and `world.json` (seed, versions, minutes, and scores on
    test scans). Takes 10 to 22 minutes on one CPU core, by how busy the machine is; the same seed
    and library versions give the same world.

    Args:
        out: Directory to create; must not exist.
        seed: Decides the CLIP and the LLaVA. The teacher is the same for every seed.
        teacher: A teacher directory of another world to copy, which saves training it again.
        progress: Whether to show progress bars.

    Raises:
        OutputError: If `out` exists or cannot be created.
        DataError: If `teacher` is not a teacher directory.
    """

    from kuea_mllm.miniworld.encoder_eval import evaluate_encoder, evaluate_probes
    from kuea_mllm.miniworld.llava_eval import score_llava
    from kuea_mllm.miniworld.train_clip import train_clip
    from kuea_mllm.miniworld.train_llava import train_llava
    from kuea_mllm.miniworld.train_teacher import TEACHER_SEED, train_teacher
    from kuea_mllm.miniworld.vocabularies import build_clip_tokenizer, build_llava_tokenizer

    if teacher is not None and not (teacher / "model.safetensors").is_file():
        raise DataError(
            f"teacher {teacher} is not a model directory.", "Give the teacher/ folder of a world."
        )
    minutes: dict[str, float] = {}
    with atomic_directory(out) as partial:
        clip_tokenizer, llava_tokenizer = build_clip_tokenizer(), build_llava_tokenizer()
        clip = _timed(
            minutes, "clip", lambda: train_clip(clip_tokenizer, seed=seed, progress=progress)
        )
        save_clip(clip, partial / "clip")
        if teacher is None:
            trained = _timed(minutes, "teacher", lambda: train_teacher(progress=progress))
            save_teacher(trained, partial / "teacher")
        else:
            shutil.copytree(teacher, partial / "teacher")
        llava = _timed(
            minutes,
            "llava",
            lambda: train_llava(clip, llava_tokenizer, seed=seed, progress=progress),
        )
        save_llava(llava, llava_tokenizer, partial / "llava")
        world = {
            "schema": _SCHEMA,
            "seed": seed,
            "teacher_seed": TEACHER_SEED,
            "versions": {name: version(name) for name in ("numpy", "torch", "transformers")},
            "training_minutes": minutes,
            "split": "test",
            "clip": evaluate_encoder(_image_tower(clip), partial / "clip"),
            "teacher": evaluate_probes(load_teacher_tower(partial / "teacher")),
            "llava": score_llava(llava, llava_tokenizer),
        }
        write_json(partial / "world.json", _rounded(world))


def save_clip(clip: CLIPModel, folder: Path) -> None:
    """Write a CLIP with its processor and tokenizer."""
    from kuea_mllm.miniworld.models import make_clip_processor
    from kuea_mllm.miniworld.vocabularies import build_clip_tokenizer

    _save_model(clip, folder)
    processor = make_clip_processor(build_clip_tokenizer())
    processor.image_processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)


def save_teacher(teacher: Dinov2WithRegistersModel, folder: Path) -> None:
    """Write a teacher with its image processor."""
    from kuea_mllm.miniworld.models import make_teacher_processor

    _save_model(teacher, folder)
    make_teacher_processor().save_pretrained(folder)


def save_llava(
    llava: LlavaForConditionalGeneration, tokenizer: LlamaTokenizer, folder: Path
) -> None:
    """Write a LLaVA with its processor and tokenizer."""
    from kuea_mllm.miniworld.models import make_llava_processor

    _save_model(llava, folder)
    processor = make_llava_processor(tokenizer)
    processor.save_pretrained(folder)
    # Older tools look for the image processor and the tokenizer in files of their own.
    processor.image_processor.save_pretrained(folder)


def load_teacher_tower(folder: Path) -> Callable[[Tensor], Tensor]:
    """Load a teacher as a function from CLIP-normalised pixels to its image embedding."""
    import torch
    from transformers import Dinov2WithRegistersModel

    from kuea_mllm.miniworld.models import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
    from kuea_mllm.miniworld.training import in_eval_mode

    teacher = in_eval_mode(Dinov2WithRegistersModel.from_pretrained(folder))
    clip_mean, clip_std, mean, std = (
        torch.tensor(numbers).view(3, 1, 1)
        for numbers in (CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD)
    )

    def embed(pixels: Tensor) -> Tensor:
        output = teacher(pixel_values=(pixels * clip_std + clip_mean - mean) / std)
        embedding: Tensor = output.last_hidden_state[:, 0]
        return embedding

    return embed


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `build_world` from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher", type=Path, help="teacher directory to copy")
    options = parser.parse_args(arguments)
    build_world(options.out, seed=options.seed, teacher=options.teacher)


def _timed(minutes: dict[str, float], name: str, train: Callable[[], _Result]) -> _Result:
    start = time.perf_counter()
    result = train()
    minutes[name] = (time.perf_counter() - start) / 60
    return result


def _image_tower(clip: CLIPModel) -> Callable[[Tensor], Tensor]:
    def embed(pixels: Tensor) -> Tensor:
        embedding: Tensor = clip.visual_projection(clip.vision_model(pixels).pooler_output)
        return embedding

    return embed


def _save_model(model: PreTrainedModel, folder: Path) -> None:
    # The name a model was loaded from would end in its configuration.
    model.config._name_or_path = ""
    model.save_pretrained(folder)
    # safetensors makes files for their owner alone, and an installed package is read by others.
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)


def _rounded(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _rounded(value) for key, value in content.items()}
    return round(content, 2) if isinstance(content, float) else content


if __name__ == "__main__":
    main()
