"""What an adapter that tunes has to fulfil, checked on one (tiny) base model directory of its kind.

from kuea_mllm.adapters.tuner_conformance import tuner_problems_of
assert tuner_problems_of(MyAdapter(), tiny_base) == []
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kuea_mllm.adapters.base import MLLMAdapter, MLLMTuner, TuningFormat, TuningParts
from kuea_mllm.adapters.turns import IGNORED

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

_MAX_LENGTH = 256
_TOLERANCE = 1e-4
_RECORDS: tuple[dict[str, Any], ...] = (
    {
        "id": "image",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A cat."},
        ],
    },
    {
        "id": "text",
        "image": None,
        "conversations": [
            {"from": "human", "value": "Say one."},
            {"from": "gpt", "value": "One."},
            {"from": "human", "value": "And two?"},
            {"from": "gpt", "value": "Two."},
        ],
    },
    {
        "id": "tag at the end",
        "image": "b.png",
        "conversations": [
            {"from": "human", "value": "Which colour is it?\n<image>"},
            {"from": "gpt", "value": "Red"},
        ],
    },
)


def tuner_problems_of(adapter: MLLMAdapter, base: Path) -> list[str]:
    """Run all checks in float32 on the CPU.

    Args:
        adapter: The adapter to check.
        base: A complete model directory that it can tune, small enough to be run, with room for 256
            tokens.

    Returns:
        One line per statement that does not hold; empty for an adapter that conforms.
    """
    if not isinstance(adapter, MLLMTuner):
        return ["the adapter does not provide what MLLMTuner asks for"]
    checks: list[Callable[[Any, Path], Iterator[str]]] = [_parts, _format, _model, _states, _graph]
    return findings_of(checks, adapter, base)


def findings_of(
    checks: Sequence[Callable[[Any, Path], Iterator[str]]], adapter: object, base: Path
) -> list[str]:
    """Return what some checks find; a check that fails is a finding too."""
    problems: list[str] = []
    for check in checks:
        try:
            problems.extend(check(adapter, base))
        # Anything an adapter raises here is a finding, not a failure of the suite.
        except Exception as error:
            problems.append(f"{check.__name__.strip('_')}: {type(error).__name__}: {error}")
    return problems


def _parts(adapter: MLLMTuner, base: Path) -> Iterator[str]:
    from kuea_mllm.adapters.targets import linear_targets

    parts, empty = adapter.tuning_parts(base), adapter.build_empty(base)
    if any(not parameter.is_meta for parameter in empty.parameters()):
        yield "build_empty() has weights"
    known = dict(empty.named_modules())
    for path in (parts.language_model, *parts.whole):
        if path not in known:
            yield f"tuning_parts() names {path}, which the model does not have"
        elif not any(True for _ in known[path].parameters()):
            yield f"tuning_parts() names {path}, which has no weights"
    targets = linear_targets(empty, parts)
    if not targets:
        yield "tuning_parts() leaves no linear layer for LoRA"
    for path in targets:
        if any(f"{path}.".startswith(f"{place}.") for place in parts.whole):
            yield f"{path} would take LoRA, outside of the language model"
    head: Any = known[parts.output_head]
    rows = int(head.weight.shape[0])
    if not 0 < parts.vocabulary_size <= rows:
        yield f"tuning_parts().vocabulary_size is {parts.vocabulary_size} of {rows} rows"


def _format(adapter: MLLMTuner, base: Path) -> Iterator[str]:
    import torch

    reading = adapter.tuning_format(base, max_length=_MAX_LENGTH)
    parts = adapter.tuning_parts(base)
    encoder, again = reading.encoder, pickle.loads(pickle.dumps(reading))  # noqa: S301
    for record in _RECORDS:
        encoded = encoder.encode(record)
        if any(_plain(each.encode(record)) != _plain(encoded) for each in (encoder, again.encoder)):
            yield f"encode() gives another sample the next time, or after pickling ({record['id']})"
        yield from _sample(record, encoded, reading, parts)
    pictures = _pictures()
    values = reading.preprocess(pictures)
    size = reading.image_size
    if values.shape != (len(pictures), 3, size, size) or values.dtype != torch.float32:
        yield f"preprocess() gives {tuple(values.shape)} of {values.dtype}, image_size is {size}"
    if not torch.equal(again.preprocess(pictures), values):
        yield "preprocess() differs after pickling"
    if not torch.equal(reading.preprocess(pictures[1:2]), values[1:2]):
        yield "preprocess() depends on the other images"


def _sample(
    record: Mapping[str, Any], encoded: Any, reading: TuningFormat, parts: TuningParts
) -> Iterator[str]:
    ids, labels, what = encoded.input_ids, encoded.labels, f"encode() of {record['id']!r}"
    placeholder = reading.encoder.placeholder
    if ids.count(placeholder) != int(record["image"] is not None):
        yield f"{what} has {ids.count(placeholder)} placeholders"
    if len(ids) != len(labels):
        yield f"{what} has {len(ids)} tokens and {len(labels)} labels"
    learned = [label for label in labels if label != IGNORED]
    if any(pair[1] not in (IGNORED, pair[0]) for pair in zip(ids, labels, strict=False)):
        yield f"{what} has labels that are not its tokens"
    if not learned or len(learned) == len(labels):
        yield f"{what} learns {len(learned)} of {len(labels)} tokens"
    if any(not 0 <= label < parts.vocabulary_size for label in learned):
        yield f"{what} has labels outside of the vocabulary"
    if placeholder >= 0 or reading.image_token_id in ids:
        yield f"{what} has a placeholder that is a token, or tokens of an image beside it"


def _model(adapter: Any, base: Path) -> Iterator[str]:
    parts, model, empty = _loaded(adapter, base)
    if model.training or any(parameter.requires_grad for parameter in model.parameters()):
        yield "load_for_tuning() gives a model in training mode, or one that asks for gradients"
    shapes, expected = (
        {name: parameter.shape for name, parameter in each.named_parameters()}
        for each in (model, empty)
    )
    if shapes != expected:
        yield "load_for_tuning() and build_empty() give different tensors"
    if adapter.vision_module(model) is not model.get_submodule(parts.vision_tower):
        yield f"tuning_parts() takes {parts.vision_tower} for the tower, vision_module() another"


def _states(adapter: MLLMTuner, base: Path) -> Iterator[str]:
    import torch

    parts, model, _ = _loaded(adapter, base)
    reading = adapter.tuning_format(base, max_length=_MAX_LENGTH)
    samples = [_ids(reading, record) for record in _RECORDS]
    pixels = reading.preprocess(_pictures())
    with torch.no_grad():
        alone = []
        for number, row in enumerate(samples):
            own = {"pixel_values": pixels[number // 2 :][:1]} if number != 1 else {}
            alone.append(adapter.hidden_states(model, {**_padded([row]), **own})[0])
        together = adapter.hidden_states(model, {**_padded(samples), "pixel_values": pixels})
        packed = adapter.hidden_states(model, {**_packed(samples), "pixel_values": pixels})[0]
        features = adapter.image_features(model, pixels)
    head: Any = model.get_submodule(parts.output_head)
    if together.dim() != 3 or together.shape[-1] != head.weight.shape[-1]:
        yield f"hidden_states() gives {tuple(together.shape)}, which the output layer cannot read"
        return
    lengths = [len(row) for row in samples]
    parted: Any = torch.split(packed, lengths)
    for name, found in (("a batch", together), ("packed rows", parted)):
        for number, expected in enumerate(alone):
            error = float((found[number][: len(expected)] - expected).abs().max())
            if error > _TOLERANCE * float(expected.abs().max()):
                yield (
                    f"hidden_states() of {name} differ by {error:.1e} from those of sample "
                    f"{_RECORDS[number]['id']!r} alone"
                )
    if features.dim() != 3 or len(features) != len(pixels):
        yield f"image_features() of {len(pixels)} images are {tuple(features.shape)}"
    elif torch.equal(features[0], features[1]):
        yield "image_features() do not depend on the image"


def _graph(adapter: MLLMTuner, base: Path) -> Iterator[str]:
    """Gradients reach every layer that may take LoRA, and nothing of the tower."""
    from kuea_mllm.adapters.targets import linear_targets

    parts, model, _ = _loaded(adapter, base)
    reading = adapter.tuning_format(base, max_length=_MAX_LENGTH)
    model.requires_grad_(True)
    batch = {
        **_padded([_ids(reading, _RECORDS[0])]),
        "pixel_values": reading.preprocess(_pictures()[:1]),
    }
    loss: Any = adapter.hidden_states(model, batch).square().sum()
    loss.backward()
    for path, layer in linear_targets(model, parts).items():
        if layer.weight.grad is None:
            yield f"hidden_states() gives {path} no gradient"
    for path in parts.projector:
        if all(each.grad is None for each in model.get_submodule(path).parameters()):
            yield f"hidden_states() gives {path} no gradient"
    for path in parts.encoders:
        encoder = model.get_submodule(path)
        if any(parameter.grad is not None for parameter in encoder.parameters()):
            yield f"hidden_states() gives {path} a gradient"


def _loaded(adapter: MLLMTuner, base: Path) -> tuple[TuningParts, nn.Module, nn.Module]:
    model = adapter.load_for_tuning(base, dtype="float32", device="cpu")
    return adapter.tuning_parts(base), model, adapter.build_empty(base)


def _plain(encoded: Any) -> tuple[list[int], list[int], int]:
    return encoded.input_ids, encoded.labels, encoded.left_out


def _pictures() -> list[Image]:
    from PIL import Image

    # Gradients: pixels of one colour would hide another crop.
    gradient = Image.linear_gradient("L")
    return [gradient.resize((40, 20)).convert("RGB"), gradient.rotate(90).resize((9, 30))]


def _ids(reading: TuningFormat, record: Mapping[str, Any]) -> list[int]:
    image = [reading.image_token_id] * reading.tokens_per_image
    ids: list[int] = []
    for token in reading.encoder.encode(record).input_ids:
        ids += image if token == reading.encoder.placeholder else [token]
    return ids


def _padded(samples: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    import torch

    width = max(len(row) for row in samples)
    return {
        "input_ids": torch.tensor([[*row, *[0] * (width - len(row))] for row in samples]),
        "attention_mask": torch.tensor(
            [[1] * len(row) + [0] * (width - len(row)) for row in samples]
        ),
    }


def _packed(samples: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    import torch

    return {
        "input_ids": torch.tensor([[token for row in samples for token in row]]),
        "position_ids": torch.tensor([[place for row in samples for place in range(len(row))]]),
    }
