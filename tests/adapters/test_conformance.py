from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kuea_mllm.adapters.base import ChatRequest, MLLMRuntime, TowerSlot
from kuea_mllm.adapters.conformance import problems_of
from kuea_mllm.adapters.llava.adapter import LlavaAdapter
from kuea_mllm.adapters.registry import list_manifests


def test_llava_conforms(tiny_llava: Path) -> None:
    assert problems_of(LlavaAdapter(), tiny_llava) == []


def test_shipped_manifests_name_their_adapters() -> None:
    for manifest in list_manifests():
        assert manifest.load().name == manifest.name


class Careless(LlavaAdapter):
    def recognises(self, config: Mapping[str, object]) -> bool:
        return True

    def check_base(self, base: Path) -> None:
        pass

    def tower_slot(self, base: Path) -> TowerSlot:
        slot = super().tower_slot(base)
        return TowerSlot({}, ("elsewhere.",), 7, slot.drops_cls, slot.family)


def test_findings_are_listed(tiny_llava: Path) -> None:
    problems = "\n".join(problems_of(Careless(), tiny_llava))
    for words in ("claims {}", "without weights", "lacks hidden_size", "tap_layer is 7", "on disk"):
        assert words in problems


class _Forgetful:
    def __init__(self, runtime: MLLMRuntime) -> None:
        self._runtime = runtime

    def generate(self, requests: Sequence[ChatRequest], **options: Any) -> list[str]:
        return [str(len(requests))] * len(requests)

    def describe(self) -> dict[str, Any]:
        return {}

    def vision_state(self) -> Mapping[str, Tensor]:
        return {name: tensor + 1 for name, tensor in self._runtime.vision_state().items()}


class WrongRuntime(LlavaAdapter):
    def open_runtime(self, model_dir: Path, *, dtype: str, device: str) -> MLLMRuntime:
        return _Forgetful(super().open_runtime(model_dir, dtype=dtype, device=device))


def test_runtime_findings_are_listed(tiny_llava: Path) -> None:
    problems = "\n".join(problems_of(WrongRuntime(), tiny_llava))
    for words in ("describe() lacks dtype", "not the tower on disk", "in a batch"):
        assert words in problems
