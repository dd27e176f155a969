"""LoRA weights as the original LLaVA saved them: read, merged, and written back bit for bit.

The set holds what the original training saved at its end (llava/lora/trace.safetensors); it is put
into files here as the original puts it there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_llava import original_directory, tower_directory, tower_of
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from kuea_mllm.adapters.llava.import_original import import_original
from kuea_mllm.adapters.llava.original_lora import export_lora, import_lora
from kuea_mllm.errors import UserError
from kuea_mllm.tuning.merge import merge_adapter

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

GOLDEN = Path(os.environ.get("KUEA_GOLDEN_DIR", Path(__file__).parent)) / "llava"
MODEL = GOLDEN / "model"
TRACE = load_file(GOLDEN / "lora" / "trace.safetensors")
SETTINGS: dict[str, Any] = json.loads((GOLDEN / "lora" / "trace.json").read_text())[
    "hyperparameters"
]
RUNS: dict[str, Any] = json.loads((MODEL / "forward.json").read_text())
RANK, ALPHA = SETTINGS["lora_r"], SETTINGS["lora_alpha"]


def trained(kind: str) -> dict[str, Tensor]:
    start = f"final_{kind}."
    return {name.removeprefix(start): t for name, t in TRACE.items() if name.startswith(start)}


LORA, OTHERS = trained("lora"), trained("non_lora")


def write_release(
    out: Path, *, others: dict[str, Tensor] = OTHERS, pickled: bool = True, **config: Any
) -> Path:
    """The files of the original train script."""
    out.mkdir()
    content = {
        "base_model_name_or_path": "liuhaotian/llava-v1.5-7b",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": ALPHA,
        "lora_dropout": SETTINGS["lora_dropout"],
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": RANK,
        "revision": None,
        "target_modules": sorted({name.split(".")[-3] for name in LORA}),
        "task_type": "CAUSAL_LM",
    }
    (out / "adapter_config.json").write_text(json.dumps(content | config))
    if pickled:
        torch.save(LORA, out / "adapter_model.bin")
    else:
        save_file(LORA, out / "adapter_model.safetensors", metadata={"format": "pt"})
    torch.save(others, out / "non_lora_trainables.bin")
    (out / "config.json").write_bytes((MODEL / "config.json").read_bytes())
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the set in Hugging Face form."""
    folder = tmp_path_factory.mktemp("base")
    state = load_file(MODEL / "weights.safetensors")
    source = original_directory(
        folder / "original",
        state,
        tower_directory(folder / "tower", tower_of(state)),
        tokenizer=RUNS["token_ids_from"],
    )
    import_original(source, folder / "model")
    return folder / "model"


@pytest.mark.parametrize("pickled", [True, False], ids=["bin", "safetensors"])
def test_there_and_back_keeps_every_bit_and_every_setting(tmp_path: Path, pickled: bool) -> None:
    release = write_release(tmp_path / "release", pickled=pickled)
    import_lora(release, tmp_path / "ours")
    export_lora(tmp_path / "ours", tmp_path / "back")
    assert {p.name for p in release.iterdir()} == {p.name for p in (tmp_path / "back").iterdir()}
    for name in ("adapter_config.json", "config.json"):
        found, expected = (json.loads((d / name).read_text()) for d in (tmp_path / "back", release))
        assert found == expected
    if pickled:
        matrices = torch.load(tmp_path / "back" / "adapter_model.bin", weights_only=True)
    else:
        matrices = load_file(tmp_path / "back" / "adapter_model.safetensors")
    others = torch.load(tmp_path / "back" / "non_lora_trainables.bin", weights_only=True)
    for found, expected in ((matrices, LORA), (others, OTHERS)):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name


def test_merged_weights_are_those_of_the_original_merge(base: Path, tmp_path: Path) -> None:
    import_lora(write_release(tmp_path / "release"), tmp_path / "ours")
    receipt = merge_adapter(base, tmp_path / "ours", tmp_path / "merged")
    assert not receipt.is_same_base
    old = load_file(MODEL / "weights.safetensors")
    new: dict[str, Tensor] = {}
    for file in (tmp_path / "merged").glob("*.safetensors"):
        new |= load_file(file)
    for name in LORA:
        if not name.endswith(".lora_A.weight"):
            continue
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b = LORA[name.replace("lora_A", "lora_B")]
        expected = old[f"{layer}.weight"] + (ALPHA / RANK) * (b @ LORA[name])
        found = new[f"language_model.{layer}.weight"]
        assert float((found - expected).abs().max()) <= 1e-6
        assert float((found - old[f"{layer}.weight"]).abs().max()) > 1e-4
    for index, linear in ((0, "linear_1"), (2, "linear_2")):
        for kind in ("weight", "bias"):
            expected = OTHERS[f"base_model.model.model.mm_projector.{index}.{kind}"]
            assert torch.equal(new[f"multi_modal_projector.{linear}.{kind}"], expected)


@torch.no_grad()
def test_peft_and_the_merged_model_agree(base: Path, tmp_path: Path) -> None:
    import_lora(write_release(tmp_path / "release"), tmp_path / "ours")
    merge_adapter(base, tmp_path / "ours", tmp_path / "merged")
    plain = LlavaForConditionalGeneration.from_pretrained(base).eval()
    model = PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(1, 40)[None]
    difference = merged(input_ids=ids).logits - model(input_ids=ids).logits
    assert float(difference.abs().max()) <= 1e-4


def test_frozen_projector_of_the_released_runs_is_read(base: Path, tmp_path: Path) -> None:
    import_lora(write_release(tmp_path / "release", others={}), tmp_path / "ours")
    assert merge_adapter(base, tmp_path / "ours", tmp_path / "merged").tensors_replaced == 0
    record = json.loads((tmp_path / "ours" / "kuea.json").read_text())
    assert record["lora"]["projector"] == "freeze"
    export_lora(tmp_path / "ours", tmp_path / "back")
    back = torch.load(tmp_path / "back" / "non_lora_trainables.bin", weights_only=True)
    assert back == {}


def test_what_is_missing_or_foreign_is_named(tmp_path: Path) -> None:
    release = write_release(tmp_path / "release")
    foreign = dict(OTHERS) | {"base_model.model.model.embed_tokens.weight": torch.ones(2, 2)}
    torch.save(foreign, release / "non_lora_trainables.bin")
    with pytest.raises(UserError, match="embed_tokens"):
        import_lora(release, tmp_path / "ours")
    part = dict(list(OTHERS.items())[:2])
    torch.save(part, release / "non_lora_trainables.bin")
    with pytest.raises(UserError, match="a part of the projector only"):
        import_lora(release, tmp_path / "ours")
    (release / "non_lora_trainables.bin").unlink()
    with pytest.raises(UserError, match=r"no non_lora_trainables\.bin"):
        import_lora(release, tmp_path / "ours")
    leak = {
        name.replace("model.layers", "model.vision_tower.layers"): t for name, t in LORA.items()
    }
    torch.save(leak, release / "adapter_model.bin")
    with pytest.raises(UserError, match="vision_tower"):
        import_lora(release, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


_RAN: list[str] = []


def _run(what: str) -> None:
    _RAN.append(what)


class _Run:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return _run, ("code",)


def test_pickles_are_never_run(tmp_path: Path) -> None:
    release = write_release(tmp_path / "release")
    for name in ("non_lora_trainables.bin", "adapter_model.bin"):
        before = (release / name).read_bytes()
        torch.save({"a": _Run()}, release / name)
        with pytest.raises(UserError, match=name):
            import_lora(release, tmp_path / "ours")
        (release / name).write_bytes(before)
    assert _RAN == []


def test_own_weights_get_the_configuration_of_their_base(base: Path, tmp_path: Path) -> None:
    import_lora(write_release(tmp_path / "release"), tmp_path / "ours")
    record = json.loads((tmp_path / "ours" / "kuea.json").read_text())
    del record["imported"]
    record["base"]["reference"] = str(base)
    (tmp_path / "ours" / "kuea.json").write_text(json.dumps(record))
    export_lora(tmp_path / "ours", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    expected = json.loads((MODEL / "config.json").read_text())
    differing = {key for key in expected if expected[key] != config.get(key)}
    assert differing <= {"mm_vision_tower", "torch_dtype"}
    # Where the base was never in the authors' layout, its settings are put together.
    (base / "kuea.json").rename(base / "kept.json")
    try:
        with pytest.raises(UserError, match="which tower"):
            export_lora(tmp_path / "ours", tmp_path / "made")
        export_lora(tmp_path / "ours", tmp_path / "made", tower=expected["mm_vision_tower"])
    finally:
        (base / "kept.json").rename(base / "kuea.json")
    made = json.loads((tmp_path / "made" / "config.json").read_text())
    for key in made.keys() & expected.keys() - {"torch_dtype"}:
        assert made[key] == expected[key], key
    plain = json.loads((tmp_path / "made" / "adapter_config.json").read_text())
    assert set(plain["target_modules"]) == {name.split(".")[-3] for name in LORA}
