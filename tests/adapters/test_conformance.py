from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from original_llava import make_original, make_tower
from torch import Tensor

from kuea_mllm.adapters.base import ChatRequest, MLLMRuntime, Tap, TowerReference, TowerSlot
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
        return TowerSlot({"image_size": 8}, "elsewhere", Tap((70,), True), slot.family)


def test_findings_are_listed(tiny_llava: Path) -> None:
    problems = "\n".join(problems_of(Careless(), tiny_llava))
    for words in ("claims {}", "without weights", "lacks hidden_size", "reads layer 70", "on disk"):
        assert words in problems


class UnknownTap(LlavaAdapter):
    def tower_slot(self, base: Path) -> TowerSlot:
        return replace(super().tower_slot(base), tap=None)


def test_tap_may_be_unknown(tiny_llava: Path) -> None:
    assert problems_of(UnknownTap(), tiny_llava) == []


class WrongSlot(LlavaAdapter):
    def tower_slot(self, base: Path) -> TowerSlot:
        reference = TowerReference("config.json", "mm_vision_tower", "somewhere/else")
        return replace(
            super().tower_slot(base),
            tap=Tap((), drops_cls=True),
            projector_width=31,
            reference=reference,
        )


def test_findings_about_tap_projector_and_reference_are_listed(tiny_llava: Path) -> None:
    problems = "\n".join(problems_of(WrongSlot(), tiny_llava))
    for words in ("reads no layer", "projector_width is 31, the tower's tokens are 32 wide"):
        assert words in problems
    assert "reference says 'somewhere/else', config.json has None" in problems


def test_reference_that_is_in_the_configuration_conforms(
    tiny_llava: Path, variant: Callable[..., Path]
) -> None:
    class Referring(LlavaAdapter):
        def tower_slot(self, base: Path) -> TowerSlot:
            reference = TowerReference("config.json", "eye", "somewhere/else")
            return replace(super().tower_slot(base), reference=reference)

    assert problems_of(Referring(), variant(eye="somewhere/else")) == []


def test_llava_in_its_original_layout_conforms_without_answers(tmp_path: Path) -> None:
    stock = make_tower(tmp_path / "stock")
    base = make_original(tmp_path / "base", stock)
    assert LlavaAdapter().tower_slot(base).reference is not None
    assert problems_of(LlavaAdapter(), base, answers=False) == []


class Stubborn(LlavaAdapter):
    """Answers with the tower it has always had, as a loader that downloads the stock tower does."""

    stock: Path

    def open_runtime(self, model_dir: Path, *, dtype: str, device: str) -> MLLMRuntime:
        return super().open_runtime(self.stock, dtype=dtype, device=device)


def test_loader_that_does_not_read_the_tower_is_found(tiny_llava: Path) -> None:
    adapter = Stubborn()
    adapter.stock = tiny_llava
    assert problems_of(adapter, tiny_llava) == [
        "open_runtime() does not use the tower that is in the directory's files"
    ]


def test_base_that_should_not_answer_but_does_is_found(tiny_llava: Path) -> None:
    assert problems_of(LlavaAdapter(), tiny_llava, answers=False) == [
        "open_runtime() opens a base that was said not to answer"
    ]


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
