"""What a vision tower can do: zero-shot, retrieval and probes, on held-out scans.

A tower is scored by its projected embedding, the one that CLIP compares with text. Texts are
embedded by the CLIP that the tower came from, so a tower that left that space scores low in the
zero-shot and retrieval columns whatever it can see; the probes tell the two apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kuea_mllm.errors import DataError
from kuea_mllm.miniworld.captions import PREFIXES, caption_scene, describe
from kuea_mllm.miniworld.models import CLIP_MEAN, CLIP_STD
from kuea_mllm.miniworld.rendering import Images, render_scenes
from kuea_mllm.miniworld.scans import SPLIT_SIZES
from kuea_mllm.miniworld.scenes import COLOURS, DIGITS, TEXTURES, Scene, sample_scenes
from kuea_mllm.miniworld.train_clip import embed_text, tokenize_captions
from kuea_mllm.miniworld.training import in_eval_mode, normalise_pixels

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

Tower = Callable[[Tensor], Any]
"""Pixels (n, 3, 32, 32) to embeddings (n, projection), or to an output with `image_embeds`."""

# Set name -> style of drawing; every set but "multi" shows one digit.
ZERO_SHOT_SETS = {
    "single": "natural",
    "tiny": "tiny",
    "large": "large",
    "shift": "shift",
    "sketch": "sketch",
    "gray": "gray",
    "invert": "invert",
    "noisy": "noisy",
    "blur": "blur",
    "multi": "natural",
}
_SEED = 77  # of the evaluation pictures, the same for every tower
_PROBE_TRAIN = 3000
_Labels = NDArray[np.int64]
_Features = NDArray[np.float32]


@dataclass
class EncoderScores:
    """Everything `score_encoder` measures.

    Attributes:
        metrics: Percentages by name: `zero_shot/<set>`, `zero_shot/average` (mean of the ten
            digit sets), `zero_shot/texture`, `retrieval/i2t_r5`, `retrieval/t2i_r5` and
            `probe/<name>`.
        samples: Score of every picture in [0, 1], float32, by the name of its metric. The pictures
            of a split are the same for every tower, so two towers can be compared in pairs.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    samples: dict[str, _Features] = field(default_factory=dict)

    def add(self, name: str, scores: NDArray[Any]) -> None:
        """Record one score per picture under `name`, and their mean in percent."""
        self.samples[name] = scores.astype(np.float32)
        self.metrics[name] = 100 * float(scores.mean())


def evaluate_encoder(
    vision: Tower, clip_dir: Path, *, split: str = "test", per_set: int = 1000
) -> dict[str, float]:
    """Score a tower; see `EncoderScores.metrics` for the names.

    Args:
        vision: A `CLIPVisionModelWithProjection`, or any function from pixels to embeddings.
        clip_dir: The mini CLIP whose text tower and tokenizer are used.
        split: Split of the scans in the evaluation pictures; "validation" is for choosing
            settings. Probes are always fitted on pictures of "train" scans.
        per_set: Pictures in each zero-shot set; "multi" has twice as many.
    """
    return score_encoder(vision, clip_dir, split=split, per_set=per_set).metrics


def score_encoder(
    vision: Tower, clip_dir: Path, *, split: str = "test", per_set: int = 1000
) -> EncoderScores:
    """Score a tower like `evaluate_encoder`, and keep the score of every picture.

    Raises:
        DataError: If there is no such split.
    """
    from transformers import CLIPModel, CLIPTokenizer

    if split not in SPLIT_SIZES:
        raise DataError(f"split {split!r} does not exist; choose from {', '.join(SPLIT_SIZES)}.")
    clip = in_eval_mode(CLIPModel.from_pretrained(clip_dir))
    tokenizer = CLIPTokenizer.from_pretrained(clip_dir)
    scores = EncoderScores()
    with torch.inference_mode():
        _score_zero_shot(scores, vision, clip, tokenizer, split, per_set)
        _score_retrieval(scores, vision, clip, tokenizer, split)
        _score_probes(scores, vision, split, per_set)
    return scores


def embed_images(vision: Tower, images: Images, *, batch: int = 500) -> Tensor:
    """Embed uint8 pictures with a tower, (n, projection), not normalised."""
    parts: list[Tensor] = []
    for start in range(0, len(images), batch):
        pixels = normalise_pixels(images[start : start + batch], CLIP_MEAN, CLIP_STD)
        output = vision(pixels)
        parts.append(output if isinstance(output, Tensor) else output.image_embeds)
    return torch.cat(parts)


def evaluate_probes(vision: Tower, *, split: str = "test", per_set: int = 1000) -> dict[str, float]:
    """Score only the probes, which need no text; see `EncoderScores.metrics`."""
    scores = EncoderScores()
    with torch.inference_mode():
        _score_probes(scores, vision, split, per_set)
    return scores.metrics


@lru_cache(maxsize=64)
def _pictures(
    name: str, split: str, count: int, objects: tuple[int, int], style: str
) -> tuple[list[Scene], Images]:
    # One seed per set and split; the letters of both give the numbers.
    seed = [_SEED, *f"{split}/{name}".encode()]
    scenes = sample_scenes(
        count, split, seed=int(np.random.SeedSequence(seed).generate_state(1)[0]), objects=objects
    )
    return scenes, render_scenes(scenes, np.random.default_rng(seed), style)


def _score_zero_shot(
    scores: EncoderScores,
    vision: Tower,
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    split: str,
    per_set: int,
) -> None:
    classes = _class_vectors(clip, tokenizer, [([name], None) for name in DIGITS])
    for name, style in ZERO_SHOT_SETS.items():
        is_multi = name == "multi"
        objects = (1, 4) if is_multi else (1, 1)
        scenes, images = _pictures(name, split, per_set * (1 + is_multi), objects, style)
        logits = (_unit(embed_images(vision, images)) @ classes.T).numpy()
        scores.add(f"zero_shot/{name}", _share_of_top(logits, scenes))
    sets = [scores.metrics[f"zero_shot/{name}"] for name in ZERO_SHOT_SETS]
    scores.metrics["zero_shot/average"] = sum(sets) / len(sets)
    textures = _class_vectors(
        clip,
        tokenizer,
        [([digit], texture) for texture in TEXTURES for digit in DIGITS],
        len(DIGITS),
    )
    scenes, images = _pictures("single", split, per_set, (1, 1), "natural")
    guesses = (_unit(embed_images(vision, images)) @ textures.T).argmax(1).numpy()
    scores.add("zero_shot/texture", guesses == np.array([scene.texture for scene in scenes]))


def _share_of_top(logits: NDArray[Any], scenes: Sequence[Scene]) -> NDArray[Any]:
    """For each picture, the share of its digits among as many best-scored classes."""
    order = np.argsort(-logits, axis=1, kind="stable")
    shares = [
        len(scene.digits.intersection(ranked[: len(scene.objects)].tolist())) / len(scene.objects)
        for ranked, scene in zip(order, scenes, strict=True)
    ]
    return np.array(shares)


def _class_vectors(
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    classes: Sequence[tuple[list[str], str | None]],
    group: int = 1,
) -> Tensor:
    """Average the unit embeddings of every prompt of a class; `group` descriptions make one."""
    prompts = [
        describe(digits, texture, prefix) for digits, texture in classes for prefix in PREFIXES
    ]
    embedded = _unit(embed_text(clip, tokenize_captions(tokenizer, prompts)))
    return _unit(embedded.view(-1, group * len(PREFIXES), embedded.shape[-1]).mean(1))


def _score_retrieval(
    scores: EncoderScores, vision: Tower, clip: CLIPModel, tokenizer: CLIPTokenizer, split: str
) -> None:
    scenes, images = _pictures("retrieval", split, 400, (1, 4), "natural")
    rng = np.random.default_rng(_SEED)
    captions = [caption_scene(scene, rng, is_noisy=False) for scene in scenes]
    text = _unit(embed_text(clip, tokenize_captions(tokenizer, captions)))
    similarity = _unit(embed_images(vision, images)) @ text.T  # (pictures, captions)
    # Captions name digits only, so every picture with the same digits is right as well.
    is_right = torch.tensor([[a.digits == b.digits for b in scenes] for a in scenes])
    for name, table, right in (
        ("retrieval/i2t_r5", similarity, is_right),
        ("retrieval/t2i_r5", similarity.T, is_right.T),
    ):
        top = table.topk(5, dim=1).indices
        scores.add(name, right.gather(1, top).any(1).float().numpy())


def _score_probes(scores: EncoderScores, vision: Tower, split: str, per_set: int) -> None:
    single = _probe_features(vision, split, (1, 1), per_set)
    several = _probe_features(vision, split, (1, 4), per_set)
    scores.add("probe/digit", _probe_class(single, lambda scene: scene.objects[0].digit))
    scores.add("probe/colour", _probe_class(single, lambda scene: scene.objects[0].colour))
    scores.metrics["probe/position_r2"] = 100 * _probe_position(single)
    digits = _presence([scene.digits for scene in several.all_scenes], len(DIGITS))
    colours = _presence(
        [frozenset(item.colour for item in scene.objects) for scene in several.all_scenes],
        len(COLOURS),
    )
    scores.add("probe/digits", _probe_presence(several, digits))
    scores.add("probe/colours", _probe_presence(several, colours))
    scores.add("probe/count", _probe_class(several, lambda scene: len(scene.objects)))


@dataclass(frozen=True)
class _Probe:
    train: _Features
    test: _Features
    train_scenes: list[Scene]
    test_scenes: list[Scene]

    @property
    def all_scenes(self) -> list[Scene]:
        return self.train_scenes + self.test_scenes


def _probe_features(vision: Tower, split: str, objects: tuple[int, int], count: int) -> _Probe:
    name = f"probe-{objects[1]}"
    train_scenes, train = _pictures(f"{name}-fit", "train", _PROBE_TRAIN, objects, "natural")
    test_scenes, test = _pictures(name, split, count, objects, "natural")
    fitted = embed_images(vision, train).double().numpy()
    scored = embed_images(vision, test).double().numpy()
    mean, scale = fitted.mean(0), fitted.std(0) + 1e-6
    return _Probe((fitted - mean) / scale, (scored - mean) / scale, train_scenes, test_scenes)


def _probe_class(probe: _Probe, label: Callable[[Scene], int]) -> NDArray[Any]:
    from sklearn.linear_model import LogisticRegression

    model: Any = LogisticRegression(C=1.0, max_iter=300, tol=1e-3)
    model.fit(probe.train, [label(scene) for scene in probe.train_scenes])
    guesses = model.predict(probe.test)
    correct: NDArray[Any] = guesses == np.array([label(scene) for scene in probe.test_scenes])
    return correct


def _probe_presence(probe: _Probe, labels: _Labels) -> NDArray[Any]:
    """Balanced accuracy of one yes/no probe per label, spread over the pictures.

    A picture's score weighs present and absent labels so that the mean over pictures is the mean
    over labels of the balanced accuracy; chance is 50.
    """
    from sklearn.linear_model import LogisticRegression

    fitted, truth = labels[: len(probe.train)], labels[len(probe.train) :]
    total = np.zeros(len(truth))
    for column in range(labels.shape[1]):
        model: Any = LogisticRegression(C=1.0, max_iter=300, tol=1e-3, class_weight="balanced")
        model.fit(probe.train, fitted[:, column])
        correct = model.predict(probe.test) == truth[:, column]
        share = np.where(
            truth[:, column] == 1, truth[:, column].mean(), 1 - truth[:, column].mean()
        )
        total += correct / (2 * np.maximum(share, 1e-9))
    weighted: NDArray[Any] = total / labels.shape[1]
    return weighted


def _probe_position(probe: _Probe) -> float:
    from sklearn.linear_model import Ridge

    def places(scenes: Sequence[Scene]) -> NDArray[Any]:
        return np.array([(scene.objects[0].row, scene.objects[0].column) for scene in scenes])

    model: Any = Ridge(alpha=1.0)
    model.fit(probe.train, places(probe.train_scenes))
    return float(model.score(probe.test, places(probe.test_scenes)))


def _presence(groups: Sequence[frozenset[int]], classes: int) -> _Labels:
    return np.array([[int(index in group) for index in range(classes)] for group in groups])


def _unit(vectors: Tensor) -> Tensor:
    unit: Tensor = vectors / vectors.norm(dim=-1, keepdim=True)
    return unit
