"""What every adapter has to fulfil, checked on one (tiny) base model directory of its kind.

from kuea_mllm.adapters.conformance import problems_of
assert problems_of(MyAdapter(), tiny_base) == []
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kuea_mllm.adapters.base import ChatRequest, MLLMAdapter, MLLMRuntime, TowerSlot
from kuea_mllm.adapters.checkpoint import tensor_entries
from kuea_mllm.adapters.registry import read_model_config
from kuea_mllm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

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


def problems_of(adapter: MLLMAdapter, base: Path) -> list[str]:
    """Run all checks in float32 on the CPU.

    Args:
        adapter: The adapter to check.
        base: A complete model directory that the adapter supports, small enough to be run.

    Returns:
        One line per statement that does not hold; empty for an adapter that conforms.
    """
    checks: tuple[Callable[[MLLMAdapter, Path], Iterator[str]], ...] = (
        _recognition,
        _refusal_of_incomplete,
        _slot,
        _runtime,
    )
    problems: list[str] = []
    for check in checks:
        try:
            problems.extend(check(adapter, base))
        # Anything an adapter raises here is a finding, not a failure of the suite.
        except Exception as error:
            problems.append(f"{check.__name__.strip('_')}: {type(error).__name__}: {error}")
    return problems


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
    layers = int(slot.vision_config.get("num_hidden_layers", 0))
    # hidden_states holds the embeddings as well, hence one more than there are layers.
    if not -(layers + 1) <= slot.tap_layer <= layers:
        yield f"tower_slot().tap_layer is {slot.tap_layer}, the tower has {layers} layers"
    if not _tower_on_disk(slot, base):
        yield f"no tensor on disk begins with one of {slot.key_prefixes}"


def _runtime(adapter: MLLMAdapter, base: Path) -> Iterator[str]:
    from kuea_mllm.towers.fingerprint import fingerprint_state

    runtime: object = adapter.open_runtime(base, dtype="float32", device="cpu")
    if not isinstance(runtime, MLLMRuntime):
        yield "open_runtime() does not return an MLLMRuntime"
        return
    for key in ("dtype", "device", "attention"):
        if key not in runtime.describe():
            yield f"describe() lacks {key}"
    json.dumps(runtime.describe(), allow_nan=False)
    on_disk = fingerprint_state(_tower_on_disk(adapter.tower_slot(base), base))
    if fingerprint_state(runtime.vision_state()) != on_disk:
        yield "vision_state() is not the tower on disk"
    yield from _answers(runtime)


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


def _tower_on_disk(slot: TowerSlot, base: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    entries = tensor_entries(base)
    for prefix in slot.key_prefixes:
        state = {}
        for name, entry in entries.items():
            if name.startswith(prefix):
                with safe_open(base / entry.file, framework="pt") as file:
                    state[name.removeprefix(prefix)] = file.get_tensor(name)
        if any(name.startswith("encoder.layers.") for name in state):
            return state
    return {}
