"""Every failure of docs/silent_failures.md is refused or warned of, in the words given there."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from kuea_mllm.adapters.llava.adapter import LlavaAdapter
from kuea_mllm.errors import TowerError, TowerMismatch
from kuea_mllm.miniworld import ASSETS
from kuea_mllm.swapping import inspect_fit, swap_tower_files, verify_model
from kuea_mllm.swapping.report import CompatibilityReport
from kuea_mllm.towers.converting.parity import (
    compare_outputs,
    outputs_in_own_library,
    outputs_of_tower,
)
from kuea_mllm.towers.converting.probe_images import probe_pixels
from kuea_mllm.towers.inspecting.inspect import inspect_source
from kuea_mllm.towers.model.encode import normalise
from kuea_mllm.towers.model.fingerprint import fingerprint_all
from kuea_mllm.towers.model.resize import resize_tower
from kuea_mllm.towers.model.tower import Tower, build_meta_model, build_model
from kuea_mllm.towers.reading.load import load_tower
from kuea_mllm.towers.reading.own_library import open_in_own_library
from kuea_mllm.towers.spec import SIGLIP_MEAN, SIGLIP_STD, TowerSpec
from kuea_mllm.towers.writing.save import export_visual, save_visual

DOCUMENT = Path(__file__).parents[2] / "docs" / "silent_failures.md"
BASE, CLIP = ASSETS / "llava", ASSETS / "clip"
WEIGHTS = "model.safetensors"
ADAPTER = LlavaAdapter()
Change = Callable[[dict[str, Tensor]], Any]
Says = Callable[[object], None]


def documented() -> dict[str, list[str]]:
    """Return the message blocks of the document by the name of the test that stands above them."""
    blocks: dict[str, list[str]] = {}
    found = re.findall(r"^Test: `(\w+)`|^```text\n(.*?)^```", DOCUMENT.read_text(), re.M | re.S)
    for test, block in found:
        if test:
            name = test
            blocks[name] = []
        else:
            blocks[name].append(" ".join(block.split()))
    return blocks


@pytest.fixture
def says(request: pytest.FixtureRequest) -> Iterator[Says]:
    """Compare a message with the document; "..." there stands for anything."""
    expected = list(documented()[request.node.originalname])

    def compare(message: object) -> None:
        text = " ".join(str(message).split())
        pattern = re.escape(expected.pop(0)).replace(r"\.\.\.", ".*")
        assert re.fullmatch(pattern, text), text

    yield compare
    assert not expected


def aligned(
    change: Change | None = None, *, amount: float = 0.01, seed: int = 0, **spec: Any
) -> Tower:
    """Return the base's own tower moved a little, as an alignment leaves it."""
    tower = load_tower(CLIP)
    tower.source = "aligned"
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in tower.canonical_state().values():
            tensor.add_(torch.randn_like(tensor) * amount * tensor.std(correction=0))
        if change is not None:
            change(dict(tower.canonical_state()))
    tower.spec = replace(tower.spec, **spec)
    return tower


def base_with(
    folder: Path, *, config: dict[str, Any] | None = None, weights: Change | None = None
) -> Path:
    """Return a copy of the mini LLaVA with other settings or weights."""
    base = folder / "base"
    shutil.copytree(BASE, base)
    edit(base / "config.json", **(config or {}))
    if weights is not None:
        state = load_file(base / WEIGHTS)
        weights(state)
        save_file(state, base / WEIGHTS, metadata={"format": "pt"})
    return base


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    for key, value in changes.items():
        if value is None:
            del content[key]
        else:
            content[key] = value
    file.write_text(json.dumps(content))


def refusal(folder: Path, tower: Tower, base: Path = BASE) -> str:
    """Return why a swap is refused; nothing may be written."""
    before = sorted(folder.iterdir())
    with pytest.raises(TowerMismatch) as refused:
        swap_tower_files(base, tower, folder / "refused", adapter=ADAPTER)
    assert sorted(folder.iterdir()) == before
    return str(refused.value).replace(str(base), "BASE")


def warning(report: CompatibilityReport, name: str) -> str:
    """Return what a report warns of under a name, as the document writes it."""
    (check,) = (check for check in report.warnings if check.name == name)
    return f"{check.name}: {check.base}; {check.tower.rstrip('.')}. {check.remedy}"


def swapped(folder: Path, tower: Tower | None = None, base: Path = BASE) -> Path:
    out = folder / "out"
    swap_tower_files(base, tower or aligned(), out, adapter=ADAPTER, measure_drift=False)
    assert verify_model(out).is_good
    return out


def problem(out: Path, tower: Tower | None = None) -> str:
    """Return the one thing that is wrong with a directory."""
    (found,) = verify_model(out, tower=tower).problems
    return found.replace(str(out), "OUT")


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_ordinary_swap_gives_no_warning() -> None:
    report = inspect_fit(BASE, aligned(), ADAPTER)
    assert report.verdict == "ok", [check.name for check in report.warnings]


# The wrong computation


def test_gelu_tower_in_a_quick_gelu_model(tmp_path: Path, says: Says) -> None:
    says(refusal(tmp_path, aligned(activation="gelu")))


def test_activation_that_a_file_does_not_state(tmp_path: Path, says: Says) -> None:
    save_visual(aligned(), tmp_path / "final.pt")
    with pytest.raises(TowerError) as refused:
        load_tower(tmp_path / "final.pt", heads=2)
    says(str(refused.value).replace(str(tmp_path), "FOLDER"))


def test_tokens_after_the_final_norm(tmp_path: Path, says: Says) -> None:
    tower = aligned()
    report = inspect_fit(BASE, tower, ADAPTER)
    assert report.drift is not None
    says(report.drift.tap)

    # What the projector of the result really gets, in transformers.
    model: Any = LlavaForConditionalGeneration.from_pretrained(swapped(tmp_path, tower))
    caught: list[Tensor] = []
    model.model.multi_modal_projector.register_forward_hook(
        lambda module, inputs, output: caught.append(inputs[0])
    )
    pixels = probe_pixels(tower.spec, count=2)
    with torch.inference_mode():
        given = normalise(pixels, tower.spec.mean, tower.spec.std)
        model.model.get_image_features(pixel_values=given)
    before_norm = outputs_of_tower(tower, pixels).penultimate
    assert relative(caught[0].reshape(before_norm.shape), before_norm) < 1e-5
    norm = model.model.vision_tower.post_layernorm
    assert relative(norm(before_norm).detach(), before_norm) > 0.3


def test_tokens_that_open_clip_returns(tmp_path: Path, says: Says) -> None:
    tower, file = aligned(), tmp_path / "visual.pt"
    save_visual(tower, file)
    pixels = probe_pixels(tower.spec, count=2)
    spec, layout = tower.spec, "open_clip_visual"
    found = outputs_in_own_library(file, layout=layout, spec=spec, pixels=pixels)
    report = compare_outputs(outputs_of_tower(tower, pixels), found, names=("hf", "visual"))
    report.require_same()
    says(", ".join(row.quantity for row in report.rows))

    visual: Any = open_in_own_library(file, layout=layout, spec=spec).module
    visual.output_tokens = True
    with torch.inference_mode():
        _, tokens = visual(normalise(pixels, spec.mean, spec.std))
    assert relative(tokens, found.last) > 0.3


@pytest.mark.parametrize("layer", [-1, -3])
def test_layer_that_the_projector_was_not_trained_on(
    tmp_path: Path, says: Says, layer: int
) -> None:
    base = base_with(tmp_path, config={"vision_feature_layer": layer})
    says(warning(inspect_fit(base, aligned(), ADAPTER), "config.json: vision_feature_layer"))


def test_layer_that_does_not_exist(tmp_path: Path, says: Says) -> None:
    base = base_with(tmp_path, config={"vision_feature_layer": -7})
    says(refusal(tmp_path, aligned(), base))


def test_class_token_that_is_read_as_a_patch(tmp_path: Path, says: Says) -> None:
    base = base_with(tmp_path, config={"vision_feature_select_strategy": "full"})
    report = inspect_fit(base, aligned(), ADAPTER)
    says(warning(report, "config.json: vision_feature_select_strategy"))


def test_processor_that_counts_one_token_too_few(tmp_path: Path, says: Says) -> None:
    base = base_with(tmp_path)
    edit(base / "processor_config.json", num_additional_image_tokens=None)
    report = inspect_fit(base, aligned(), ADAPTER)
    says(warning(report, "processor_config.json: num_additional_image_tokens"))


def test_number_of_heads_that_no_shape_shows(tmp_path: Path, says: Says) -> None:
    says(refusal(tmp_path, aligned(heads=4)))


def test_images_normalised_in_another_way(tmp_path: Path, says: Says) -> None:
    says(refusal(tmp_path, aligned(mean=SIGLIP_MEAN, std=SIGLIP_STD)))


def test_image_size_of_another_tower(tmp_path: Path, says: Says) -> None:
    says(refusal(tmp_path, resize_tower(aligned(), 48)))


def test_siglip_tower_in_a_clip_slot(tmp_path: Path, says: Says) -> None:
    own = load_tower(CLIP).spec
    spec: TowerSpec = replace(own, family="siglip", embedding_width=own.width)
    names = build_meta_model(spec).state_dict()
    state = {name: torch.zeros(tensor.shape) for name, tensor in names.items()}
    tower = Tower(build_model(spec, state, where="siglip"), spec, "siglip", "hf_directory")
    says(refusal(tmp_path, tower))


def test_projector_of_another_width(tmp_path: Path, says: Says) -> None:
    def widen(state: dict[str, Tensor]) -> None:
        (name,) = (n for n in state if n.endswith("multi_modal_projector.linear_1.weight"))
        state[name] = torch.cat([state[name], state[name][:, :16]], dim=1).contiguous()

    says(refusal(tmp_path, aligned(), base_with(tmp_path, weights=widen)))


# The wrong weights


def test_tower_that_diverged(tmp_path: Path, says: Says) -> None:
    def spoil(state: dict[str, Tensor]) -> None:
        state["encoder.layers.1.mlp.fc1.weight"][0, 0] = float("nan")

    says(refusal(tmp_path, aligned(spoil)))


def test_values_that_the_dtype_of_the_base_cannot_hold(tmp_path: Path, says: Says) -> None:
    def halve(state: dict[str, Tensor]) -> None:
        state.update({name: tensor.half() for name, tensor in state.items()})

    def grow(state: dict[str, Tensor]) -> None:
        state["post_layernorm.bias"][0] = 1e6

    says(refusal(tmp_path, aligned(grow), base_with(tmp_path, weights=halve)))


def test_tower_that_was_rounded_on_the_way(tmp_path: Path, says: Says) -> None:
    def to_half(state: dict[str, Tensor]) -> None:
        for tensor in state.values():
            tensor.copy_(tensor.half())

    tower = aligned(to_half)
    says(warning(inspect_fit(BASE, tower, ADAPTER), "rounding"))
    torch.save(export_visual(tower), tmp_path / "final.pt")
    (said,) = (w for w in inspect_source(tmp_path / "final.pt").warnings if "float16" in w)
    says(said)


def test_base_whose_own_tower_was_tuned_with_lora(tmp_path: Path, says: Says) -> None:
    def merge(state: dict[str, Tensor]) -> None:
        torch.manual_seed(3)
        for name, tensor in state.items():
            if "vision_tower" in name and name.endswith(("q_proj.weight", "v_proj.weight")):
                down, up = torch.randn(4, tensor.shape[1]), torch.randn(tensor.shape[0], 4)
                tensor.add_(up @ down * 0.01)

    own = load_tower(CLIP)
    tower = aligned()
    start = {"reference": "openai/clip", "fingerprints": fingerprint_all(own.model.state_dict())}
    tower.manifest = {"kind": "tower", "base_tower": start}
    assert not inspect_fit(BASE, tower, ADAPTER, measure_drift=False).warnings
    base = base_with(tmp_path, weights=merge)
    says(warning(inspect_fit(base, tower, ADAPTER, measure_drift=False), "lineage"))


def test_lora_weights_that_were_not_merged(tmp_path: Path, says: Says) -> None:
    state = dict(export_visual(aligned()))
    name = "transformer.resblocks.0.attn.out_proj.lora_A.weight"
    state |= {name: torch.zeros(4, 64), name.replace("_A", "_B"): torch.zeros(64, 4)}
    torch.save(state, tmp_path / "tuned.pt")
    with pytest.raises(TowerError) as refused:
        load_tower(tmp_path / "tuned.pt", activation="quick_gelu", heads=2)
    says(str(refused.value).replace(str(tmp_path), "FOLDER"))


def test_tower_of_another_clip(says: Says) -> None:
    def begin_anew(state: dict[str, Tensor]) -> None:
        for tensor in state.values():
            if tensor.ndim > 1:
                tensor.normal_(std=0.1)

    report = inspect_fit(BASE, aligned(begin_anew), ADAPTER)
    says(warning(report, "lineage"))
    assert report.drift is not None
    assert report.drift.tap_relative > 0.5


def test_tower_that_moved_too_far(says: Says) -> None:
    says(warning(inspect_fit(BASE, aligned(amount=0.4), ADAPTER), "drift of the tokens read"))


def test_swap_that_changes_nothing(tmp_path: Path, says: Says) -> None:
    tower = load_tower(CLIP)
    tower.source = "aligned"
    says(refusal(tmp_path, tower))


# The right weights, not in use


def original_layout(folder: Path, tower: str) -> Path:
    """Return the mini LLaVA in the layout of LLaVA's authors, without the tower in its files."""
    base = folder / "original"
    base.mkdir()
    stored = json.loads((BASE / "config.json").read_text())
    config = stored["text_config"] | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_vision_tower": tower,
        "mm_hidden_size": stored["vision_config"]["hidden_size"],
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
    }
    (base / "config.json").write_text(json.dumps(config))
    shutil.copyfile(BASE / "tokenizer.json", base / "tokenizer.json")
    state = {}
    for name, tensor in load_file(BASE / WEIGHTS).items():
        renamed = name.replace("language_model.model.", "model.")
        renamed = renamed.replace("language_model.lm_head.", "lm_head.")
        renamed = renamed.replace("multi_modal_projector.linear_1.", "model.mm_projector.0.")
        renamed = renamed.replace("multi_modal_projector.linear_2.", "model.mm_projector.2.")
        if "vision_tower" not in name:
            state[renamed] = tensor
    save_file(state, base / WEIGHTS, metadata={"format": "pt"})
    return base


def test_stock_tower_that_is_downloaded_again(tmp_path: Path, says: Says) -> None:
    stock = "openai/clip-vit-large-patch14-336"
    says(problem_of_reference(original_layout(tmp_path, stock)))
    shutil.rmtree(tmp_path / "original")

    out = swapped(tmp_path, base=original_layout(tmp_path, str(CLIP)))
    pointed = json.loads((out / "config.json").read_text())["mm_vision_tower"]
    assert Path(pointed) == (out / "clip_vision_tower").resolve()
    edit(out / "config.json", mm_vision_tower=stock)
    says(problem_of_reference(out).replace(str(out.resolve()), "OUT"))


def problem_of_reference(model: Path) -> str:
    (found,) = (p for p in verify_model(model).problems if "mm_vision_tower" in p)
    return found


def test_directory_that_was_copied_elsewhere(tmp_path: Path, says: Says) -> None:
    out = swapped(tmp_path, base=original_layout(tmp_path, str(CLIP)))
    out.rename(tmp_path / "moved")
    found = problem_of_reference(tmp_path / "moved")
    says(found.replace(str(tmp_path.resolve()), "FOLDER"))


def test_old_weights_beside_the_new_ones(
    tmp_path: Path, says: Says, caplog: pytest.LogCaptureFixture
) -> None:
    base = base_with(tmp_path)
    torch.save(load_file(base / WEIGHTS), base / "pytorch_model.bin")
    out = swapped(tmp_path, base=base)
    assert not (out / "pytorch_model.bin").exists()
    (left_out,) = (r.getMessage() for r in caplog.records if "pytorch_model" in r.getMessage())
    says(left_out.replace(str(out), "OUT"))
    shutil.copyfile(base / "pytorch_model.bin", out / "pytorch_model.bin")
    says(problem(out))


def test_weights_that_changed_after_the_swap(tmp_path: Path, says: Says) -> None:
    out = swapped(tmp_path)
    state = load_file(out / WEIGHTS)
    (name,) = (n for n in state if n.endswith("vision_tower.post_layernorm.bias"))
    state[name][0] += 1e-3
    save_file(state, out / WEIGHTS, metadata={"format": "pt"})
    says(problem(out))


def test_weights_of_the_base_that_came_back(tmp_path: Path, says: Says) -> None:
    out = swapped(tmp_path)
    shutil.copyfile(BASE / WEIGHTS, out / WEIGHTS)
    says(problem(out))


def test_another_tower_than_the_one_that_was_meant(tmp_path: Path, says: Says) -> None:
    tower, other = aligned(), aligned(seed=5)
    out = swapped(tmp_path, tower)
    assert verify_model(out, tower=copy.copy(tower)).is_tower
    other.source = "other"
    says(problem(out, other))


def test_settings_that_changed_after_the_swap(tmp_path: Path, says: Says) -> None:
    out = swapped(tmp_path)
    vision = json.loads((out / "config.json").read_text())["vision_config"]
    edit(out / "config.json", vision_config=vision | {"hidden_act": "gelu"})
    says(problem(out))


def test_adapter_that_is_loaded_on_top(tmp_path: Path, says: Says) -> None:
    out = swapped(tmp_path)
    (out / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    says(problem(out))
    # Nor is such a directory a base.
    says(refusal(tmp_path, aligned(seed=5), out))


def test_every_failure_is_documented() -> None:
    tests = {name for name in globals() if name.startswith("test_")}
    assert tests - documented().keys() == {
        "test_every_failure_is_documented",
        "test_ordinary_swap_gives_no_warning",
    }
    assert documented().keys() <= tests
