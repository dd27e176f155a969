"""What every adapter has to fulfil, checked on one (tiny) base model directory of its kind.

from kuea_mllm.adapters.conformance import problems_of
assert problems_of(MyAdapter(), tiny_base) == []

An adapter that tunes its model as well is checked by `tuner_problems_of`, in the same way.

Whether a swap on files and one in memory agree is checked one level up, by
`kuea_mllm.swapping.verify` and the tests of swapping; here the tower's bytes are exchanged by hand.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kuea_mllm.adapters.base import (
    ChatRequest,
    MLLMAdapter,
    MLLMRuntime,
    Tap,
    TowerReference,
    TowerSlot,
)
from kuea_mllm.adapters.registry import read_model_config
from kuea_mllm.adapters.tuner_conformance import findings_of, tuner_problems_of
from kuea_mllm.errors import UserError
from kuea_mllm.model_files import TensorEntry, tensor_entries

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["problems_of", "tuner_problems_of"]

_VISION_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "patch_size",
    "image_size",
    "hidden_act",
    "layer_norm_eps",
)
_NEW_TOKENS = 4


def problems_of(adapter: MLLMAdapter, base: Path, *, answers: bool = True) -> list[str]:
    """Run all checks in float32 on the CPU.

    Args:
        adapter: The adapter to check.
        base: A complete model directory that the adapter supports, small enough to be run.
        answers: Whether the adapter can answer questions with this base. False for what can only be
            swapped: opening it must then be refused in words.

    Returns:
        One line per statement that does not hold; empty for an adapter that conforms.
    """
    checks: list[Callable[[MLLMAdapter, Path], Iterator[str]]] = [
        _recognition,
        _refusal_of_incomplete,
        _slot,
    ]
    checks += [_runtime, _exchange] if answers else [_refusal_to_answer]
    return findings_of(checks, adapter, base)


def _recognition(adapter: MLLMAdapter, base: Path) -> Iterator[str]:
    if not adapter.name:
        yield "the adapter has no name"
    if not adapter.recognises(read_model_config(base)):
        yield "recognises() does not know the base's own config.json"
    for foreign in ({}, {"model_type": "not-a-model-type"}):
        if adapter.recognises(foreign):
            yield f"recognises() claims {json.dumps(foreign)}"


def _refusal_of_incomplete(adapter: MLLMAdapter, base: Path) -> Iterator[str]:
    adapter.check_base(base)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text((base / "config.json").read_text())
        try:
            adapter.check_base(Path(folder))
        except UserError:
            return
        yield "check_base() accepts a directory without weights"


def _slot(adapter: MLLMAdapter, base: Path) -> Iterator[str]:
    slot = adapter.tower_slot(base)
    for key in _VISION_KEYS:
        if slot.vision_config.get(key) is None:
            yield f"tower_slot().vision_config lacks {key}"
    if slot.tap is not None:
        yield from _tap(slot.tap, int(slot.vision_config.get("num_hidden_layers", 0)))
    if slot.projector_width not in (None, slot.vision_config.get("hidden_size")):
        yield (
            f"tower_slot().projector_width is {slot.projector_width}, the tower's tokens are "
            f"{slot.vision_config.get('hidden_size')} wide"
        )
    if slot.reference is not None:
        yield from _reference(slot.reference, base)
        # Its tower is elsewhere; that the weights hold a copy as well is not required.
        return
    try:
        _tower_on_disk(slot, base)
    except UserError as error:
        yield f"tower_slot() does not lead to the tower on disk: {error}"


def _tap(tap: Tap, layers: int) -> Iterator[str]:
    if not tap.layers:
        yield "tower_slot().tap reads no layer; an unknown tap is None"
    for layer in tap.layers:
        # hidden_states holds the embeddings as well, hence one more than there are layers.
        if not -(layers + 1) <= layer <= layers:
            yield f"tower_slot().tap reads layer {layer}, the tower has {layers} layers"


def _reference(reference: TowerReference, base: Path) -> Iterator[str]:
    if not (base / reference.file).is_file():
        yield f"tower_slot().reference names the file {reference.file}, which is not there"
        return
    content = json.loads((base / reference.file).read_text())
    found = content.get(reference.key) if isinstance(content, dict) else None
    if found != reference.value:
        yield (
            f"tower_slot().reference says {reference.value!r}, {reference.file} has {found!r} "
            f"under {reference.key}"
        )


def _refusal_to_answer(adapter: MLLMAdapter, base: Path) -> Iterator[str]:
    try:
        adapter.open_runtime(base, dtype="float32", device="cpu")
    except UserError:
        return
    yield "open_runtime() opens a base that was said not to answer"


def _runtime(adapter: MLLMAdapter, base: Path) -> Iterator[str]:
    from kuea_mllm.towers.model.fingerprint import fingerprint_state

    runtime: object = adapter.open_runtime(base, dtype="float32", device="cpu")
    if not isinstance(runtime, MLLMRuntime):
        yield "open_runtime() does not return an MLLMRuntime"
        return
    for key in ("dtype", "device", "attention"):
        if key not in runtime.describe():
            yield f"describe() lacks {key}"
    json.dumps(runtime.describe(), allow_nan=False)
    slot = adapter.tower_slot(base)
    if slot.reference is None:
        on_disk = fingerprint_state(_tower_on_disk(slot, base))
        if fingerprint_state(runtime.vision_state()) != on_disk:
            yield "vision_state() is not the tower on disk"
    yield from _answers(runtime)


def _exchange(adapter: MLLMAdapter, base: Path) -> Iterator[str]:
    """Exchange the bytes of the tower in a copy: is the copy taken, and is it the one in use?"""
    from kuea_mllm.towers.model.fingerprint import fingerprint_state

    slot = adapter.tower_slot(base)
    if slot.reference is not None:
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(base, copy)
        other = {name: -tensor for name, tensor in _tower_on_disk(slot, base).items()}
        for name, entry in _entries_of_tower(slot, copy).items():
            with (copy / entry.file).open("r+b") as stream:
                stream.seek(entry.start)
                stream.write(_bytes(other[name]))
        adapter.check_base(copy)
        if adapter.tower_slot(copy) != slot:
            yield "tower_slot() depends on the values of the tower"
        runtime = adapter.open_runtime(copy, dtype="float32", device="cpu")
        if fingerprint_state(runtime.vision_state()) != fingerprint_state(other):
            yield "open_runtime() does not use the tower that is in the directory's files"


def _answers(runtime: MLLMRuntime) -> Iterator[str]:
    from PIL import Image

    requests = [
        ChatRequest("What is this?", (Image.new("RGB", (20, 12), "red"),)),
        ChatRequest("Say something."),
        ChatRequest("Is there a longer question than this one?", (Image.new("L", (9, 30), 90),)),
    ]
    together = runtime.generate(requests, max_new_tokens=_NEW_TOKENS)
    alone = [runtime.generate([one], max_new_tokens=_NEW_TOKENS)[0] for one in requests]
    if together != alone:
        yield f"generate() answers {together} in a batch and {alone} one by one"
    if runtime.generate([], max_new_tokens=_NEW_TOKENS) != []:
        yield "generate() does not return an empty list for no requests"


def _entries_of_tower(slot: TowerSlot, base: Path) -> dict[str, TensorEntry]:
    from kuea_mllm.towers.formats.locate import expected_shapes, locate_tensors

    expected = expected_shapes(slot.family, slot.vision_config)
    return locate_tensors(tensor_entries(base), expected, module=slot.module, where=str(base))[1]


def _tower_on_disk(slot: TowerSlot, base: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    state = {}
    for name, entry in _entries_of_tower(slot, base).items():
        with safe_open(base / entry.file, framework="pt") as file:
            state[name] = file.get_tensor(entry.name)
    return state


def _bytes(tensor: Tensor) -> bytes:
    import torch

    content: bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return content
