"""The multimodal model that a tuning recipe names, without weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import nn

from kuea_mllm.adapters.base import MLLMTuner, TuningParts
from kuea_mllm.adapters.registry import adapter_for, get_adapter
from kuea_mllm.errors import RecipeError, UserError


@dataclass(frozen=True)
class TunedModel:
    """What is known of a multimodal model without its weights.

    Attributes:
        name: Hub id or directory.
        adapter: Name of the adapter that knows it.
        config: Its config.json as text.
        parts: Where its parts are.
        tokens_per_image: Tokens that one image takes in a row.
        image_size: Height and width of the pixel values.
    """

    name: str
    adapter: str
    config: str
    parts: TuningParts
    tokens_per_image: int
    image_size: int

    @property
    def tuner(self) -> MLLMTuner:
        """The adapter's side of tuning.

        Raises:
            UserError: If the adapter has none.
        """
        return _tuner(self.adapter, self.name)

    def build_empty(self) -> nn.Module:
        """Return the model on the meta device."""
        with _directory(self.config) as base:
            return self.tuner.build_empty(base)


@cache
def known_mllms() -> dict[str, TunedModel]:
    """Return the multimodal models that come with the package, by Hub id."""
    text = (files("kuea_mllm.planning") / "known_mllms.json").read_text(encoding="utf-8")
    return {name: _known(name, entry) for name, entry in json.loads(text).items()}


def find_mllm(reference: str | Path | None, *, adapter: str | None = None) -> TunedModel:
    """Find a model by Hub id, or in a directory; reads no weights, never goes to the network.

    Args:
        reference: Directory with a config.json and tokenizer files, or a known Hub id.
        adapter: Name of the adapter; None recognises it by the config.json.

    Raises:
        UserError: If nothing here says what the model is made of.
    """
    if reference is None:
        raise RecipeError("key 'model.path' is not set.", "Set it with --set model.path=DIR.")
    directory = Path(reference)
    if not directory.is_dir():
        known = known_mllms().get(str(reference))
        if known is None:
            raise UserError(
                f"key 'model.path': the sizes of {reference} are not known without its files.",
                "Give a model directory (config.json and tokenizer suffice), or one of: "
                f"{', '.join(known_mllms())}.",
            )
        return known
    found = get_adapter(adapter) if adapter else adapter_for(directory)
    tuner = _tuner(found.name, str(directory))
    samples = tuner.tuning_format(directory, max_length=1)
    return TunedModel(
        name=str(directory),
        adapter=found.name,
        config=(directory / "config.json").read_text(encoding="utf-8"),
        parts=tuner.tuning_parts(directory),
        tokens_per_image=samples.tokens_per_image,
        image_size=samples.image_size,
    )


def _known(name: str, entry: dict[str, Any]) -> TunedModel:
    return TunedModel(
        name=name,
        adapter=entry["adapter"],
        config=json.dumps(entry["config"]),
        parts=TuningParts(
            language_model=entry["language_model"],
            projector=tuple(entry["projector"]),
            vision_tower=entry["vision_tower"],
            output_head=entry["output_head"],
            excluded=tuple(entry["excluded"]),
            other_encoders=tuple(entry.get("other_encoders", ())),
            vocabulary_size=entry["vocabulary_size"],
        ),
        tokens_per_image=entry["tokens_per_image"],
        image_size=entry["image_size"],
    )


def _tuner(adapter: str, model: str) -> MLLMTuner:
    found = get_adapter(adapter)
    if not isinstance(found, MLLMTuner):
        raise UserError(
            f"{model} belongs to the adapter {adapter!r}, which cannot tune.",
            "Adapters that can provide kuea_mllm.adapters.base.MLLMTuner.",
        )
    return found


@contextmanager
def _directory(config: str) -> Iterator[Path]:
    """Give a directory that holds a configuration and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(config, encoding="utf-8")
        yield Path(folder)
