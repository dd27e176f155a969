"""LLaVA-1.5 end to end against the original code: authors' layout -> Hugging Face -> swap.

The set holds a model in the original layout and what the original code computed with it (runs A to
F, see llava/index.json). Positions that are only padding are left out: the original puts zero
vectors there, transformers the embedding of its padding token.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_llava import TOWER_PREFIX, original_directory, tower_directory, tower_of
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from kuea_mllm.adapters.llava.adapter import LlavaAdapter
from kuea_mllm.adapters.llava.import_original import import_original
from kuea_mllm.swapping import swap_tower_files
from kuea_mllm.towers.model.tower import Tower
from kuea_mllm.towers.reading.load import load_tower

GOLDEN = Path(os.environ.get("KUEA_GOLDEN_DIR", Path(__file__).parent)) / "llava"
MODEL = GOLDEN / "model"
FORWARD = load_file(MODEL / "forward.safetensors")
RUNS: dict[str, Any] = json.loads((MODEL / "forward.json").read_text())
FEATURES = load_file(GOLDEN / "swap" / "features.safetensors")
VISION: dict[str, Any] = json.loads((MODEL / "vision_tower_config.json").read_text())
VOCABULARY: int = json.loads((MODEL / "config.json").read_text())["vocab_size"]
IMAGE_ID, PAD_ID = VOCABULARY, VOCABULARY + 1
PATCHES = (VISION["image_size"] // VISION["patch_size"]) ** 2
TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the set as its authors would have saved it."""
    folder = tmp_path_factory.mktemp("original")
    state = load_file(MODEL / "weights.safetensors")
    return original_directory(
        folder / "model",
        state,
        tower_directory(folder / "tower", tower_of(state)),
        tokenizer=RUNS["token_ids_from"],
    )


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with another tower, both in its weights and where its configuration points."""
    folder = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(0)
    state = {
        name: tensor + 0.3 * torch.randn_like(tensor) if name.startswith(TOWER_PREFIX) else tensor
        for name, tensor in load_file(MODEL / "weights.safetensors").items()
    }
    return original_directory(
        folder / "model",
        state,
        tower_directory(folder / "tower", tower_of(state)),
        tokenizer=RUNS["token_ids_from"],
    )


@pytest.fixture(scope="module")
def converted(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "model"
    import_original(original, out)
    return out


@pytest.fixture(scope="module")
def golden_tower() -> Tower:
    return load_tower(
        GOLDEN / "swap" / "open_clip_visual.safetensors",
        activation=VISION["hidden_act"],
        heads=VISION["num_attention_heads"],
    )


@pytest.fixture(scope="module")
def swapped(foreign: Path, golden_tower: Tower, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted with the other tower, then swapped."""
    folder = tmp_path_factory.mktemp("swapped")
    import_original(foreign, folder / "base")
    swap_tower_files(folder / "base", golden_tower, folder / "out", adapter=LlavaAdapter())
    return folder / "out"


@pytest.fixture(scope="module")
def swapped_original(
    foreign: Path, golden_tower: Tower, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Swapped in the original layout, then converted."""
    folder = tmp_path_factory.mktemp("swapped_original")
    swap_tower_files(foreign, golden_tower, folder / "out", adapter=LlavaAdapter())
    import_original(folder / "out", folder / "converted")
    return folder / "converted"


def load(directory: Path) -> Any:
    loader: Any = LlavaForConditionalGeneration
    model, report = loader.from_pretrained(directory, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[problem], (problem, report[problem])
    assert model.dtype == torch.float32
    return model.eval()


@pytest.fixture(scope="module")
def model(converted: Path) -> Any:
    return load(converted)


@pytest.fixture(scope="module")
def models(converted: Path, swapped: Path, swapped_original: Path) -> dict[str, Any]:
    paths = {"converted": converted, "swapped": swapped, "swapped original": swapped_original}
    return {name: load(path) for name, path in paths.items()}


def rows_of(run: str) -> list[list[int]]:
    """The token ids of each sample without padding, images as in transformers 5."""
    source = "B" if run in "CD" else run
    mask = FORWARD.get(f"{source}.attention_mask", torch.ones_like(FORWARD[f"{source}.input_ids"]))
    rows = [
        [
            new
            for old, is_token in zip(ids.tolist(), kept.tolist(), strict=True)
            if is_token
            for new in ([IMAGE_ID] * PATCHES if old == -200 else [old])
        ]
        for ids, kept in zip(FORWARD[f"{source}.input_ids"], mask, strict=True)
    ]
    longest = RUNS[run].get("tokenizer_model_max_length")
    return [row[:longest] for row in rows]


def inputs_of(run: str) -> dict[str, Tensor]:
    rows = rows_of(run)
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), PAD_ID)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if run == "D" else slice(0, len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    pixels = FORWARD.get(f"{'B' if run in 'CD' else run}.pixel_values")
    if pixels is not None:
        # A text-only sample carries a zero image in the original, none in transformers 5.
        inputs["pixel_values"] = pixels[[IMAGE_ID in row for row in rows]]
    return inputs


@torch.no_grad()
def logits_of(model: Any, run: str) -> Tensor:
    logits: Tensor = model(**inputs_of(run)).logits
    return logits


def logit_error(model: Any, run: str) -> float:
    logits, mask = logits_of(model, run)[..., :VOCABULARY], inputs_of(run)["attention_mask"].bool()
    expected = FORWARD.get(f"{run}.logits")
    if expected is None:
        expected, logits, mask = FORWARD[f"{run}.logits_every_8th"], logits[:, ::8], mask[:, ::8]
    assert logits.shape == expected.shape
    return float((logits - expected)[mask].abs().max())


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each predicted token and whether it counts, over the original vocabulary."""
    predicted = logits[:, :-1, :VOCABULARY].transpose(1, 2)
    losses = torch.nn.functional.cross_entropy(predicted, labels[:, 1:], reduction="none")
    return losses, labels[:, 1:] != -100


def test_expanded_ids_are_those_of_the_set() -> None:
    for run in "AB":
        assert torch.equal(inputs_of(run)["input_ids"], FORWARD[f"{run}.hf_expanded_input_ids"])
    for run in "ABCD":
        mask = FORWARD[f"{run}.spliced_attention_mask"].long()
        assert torch.equal(inputs_of(run)["attention_mask"], mask)


def test_configuration_means_what_the_set_says(model: Any) -> None:
    expected = json.loads((MODEL / "config_transformers_5_23.json").read_text())
    found = model.config.to_dict()
    for section in ("text_config", "vision_config"):
        # Chosen otherwise, or (projection_dim) without effect on a tower without projection.
        free = {"dtype", "pad_token_id", "projection_dim", "architectures", "id2label"}
        for key in expected[section].keys() - free:
            assert found[section][key] == expected[section][key], key
    for key in (
        *("image_token_index", "image_seq_length", "projector_hidden_act", "model_type"),
        *("vision_feature_layer", "vision_feature_select_strategy", "tie_word_embeddings"),
        "multimodal_projector_bias",
    ):
        assert found[key] == expected[key], key


def test_every_tensor_is_the_original_one(model: Any) -> None:
    mapping = json.loads((MODEL / "key_mapping_to_transformers_5_23.json").read_text())
    state, weights = model.state_dict(), load_file(MODEL / "weights.safetensors")
    assert set(mapping.values()) == set(state)
    for old, new in mapping.items():
        found = state[new]
        if found.shape != weights[old].shape:
            assert old in ("lm_head.weight", "model.embed_tokens.weight")
            found = found[:VOCABULARY]
        assert torch.equal(found, weights[old]), old


@pytest.mark.parametrize("name", ["converted", "swapped", "swapped original"])
@pytest.mark.parametrize("run", list("ABCD"))
def test_logits_equal_the_original(models: dict[str, Any], name: str, run: str) -> None:
    assert logit_error(models[name], run) <= TOLERANCE


@pytest.mark.parametrize("run", list("ABCD"))
def test_losses_equal_the_original(model: Any, run: str) -> None:
    losses, counts = token_losses(logits_of(model, run), FORWARD[f"{run}.spliced_labels"])
    assert abs(float(losses[counts].mean()) - float(FORWARD[f"{run}.loss"])) <= TOLERANCE
    if (alone := FORWARD.get(f"{run}.per_sample_loss")) is not None:
        for number, expected in enumerate(alone):
            own = losses[number][counts[number]].mean()
            assert abs(float(own - expected)) <= TOLERANCE


@torch.no_grad()
def test_features_equal_the_original(model: Any) -> None:
    pixels = FORWARD["A.pixel_values"]
    output = model.model.vision_tower(pixels, output_hidden_states=True)
    penultimate = output.hidden_states[-2]
    projected = model.model.multi_modal_projector(penultimate[:, 1:])
    ids = inputs_of("A")["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    embeds[ids == IMAGE_ID] = projected[0]
    for name, found in {
        "vision_hidden_states_penultimate": penultimate,
        "vision_last_hidden_state": output.last_hidden_state,
        "patch_features": penultimate[:, 1:],
        "projected_features": projected,
        "inputs_embeds": embeds,
    }.items():
        assert float((found - FORWARD[f"A.{name}"]).abs().max()) <= TOLERANCE, name


@pytest.mark.parametrize("run", ["E", "F"])
def test_plain_generation_equals_the_original(models: dict[str, Any], run: str) -> None:
    expected = FORWARD[f"{run}.generated_new_ids"][0].tolist()
    inputs = inputs_of(run)
    for name, model in models.items():
        output = model.generate(**inputs, max_new_tokens=len(expected))
        assert output[0, inputs["input_ids"].shape[1] :].tolist() == expected, name


@torch.no_grad()
def test_step_scores_equal_the_original(model: Any) -> None:
    inputs, scores = inputs_of("E"), FORWARD["E.step_scores"]
    ids = torch.cat([inputs["input_ids"], FORWARD["E.generated_new_ids"][:, :-1]], dim=1)
    output = model(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"]
    )
    found = output.logits[0, -len(scores) :, : scores.shape[1]]
    assert float((found - scores).abs().max()) <= TOLERANCE


def test_padded_rows_never_win_an_argmax(model: Any) -> None:
    logits = logits_of(model, "B")
    assert logits.shape[-1] > VOCABULARY
    margin = logits[..., :VOCABULARY].amax(-1) - logits[..., VOCABULARY:].amax(-1)
    assert float(margin.min()) > 0


@torch.no_grad()
def tap(model: Any) -> Tensor:
    """What the projector is given for the picture of the swap's goldens."""
    seen: list[Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0])
    )
    model.model.get_image_features(pixel_values=FEATURES["pixel_values"])
    hook.remove()
    return torch.cat(seen).reshape(FEATURES["llava_features"].shape)


@pytest.mark.parametrize("name", ["swapped", "swapped original"])
def test_projector_gets_the_features_of_the_swapped_tower(
    models: dict[str, Any], name: str
) -> None:
    found = tap(models[name])
    assert float((found - FEATURES["llava_features"]).abs().max()) <= TOLERANCE
    # The authors' own path, with an open_clip that applies no final norm to patch tokens.
    before_norm = FEATURES["authors_tokens_open_clip_2.22.0"]
    assert float((found - before_norm).abs().max()) <= TOLERANCE


def read_after_norm(model: Any) -> Callable[[], None]:
    norm = model.model.vision_tower.post_layernorm
    projector = model.model.multi_modal_projector
    hook = projector.register_forward_pre_hook(lambda _, arguments: (norm(arguments[0]),))
    return hook.remove


def read_last_layer(model: Any) -> Callable[[], None]:
    model.config.vision_feature_layer = -1
    return lambda: setattr(model.config, "vision_feature_layer", -2)


def run_with_gelu(model: Any) -> Callable[[], None]:
    blocks = model.model.vision_tower.encoder.layers
    kept = blocks[0].mlp.activation_fn
    for block in blocks:
        block.mlp.activation_fn = torch.nn.GELU()

    def restore() -> None:
        for block in blocks:
            block.mlp.activation_fn = kept

    return restore


@pytest.mark.parametrize("mistake", [read_after_norm, read_last_layer, run_with_gelu])
def test_goldens_notice_mistakes(
    models: dict[str, Any], mistake: Callable[[Any], Callable[[], None]]
) -> None:
    model = models["swapped"]
    undo = mistake(model)
    try:
        assert logit_error(model, "A") > 100 * TOLERANCE
        if mistake is not read_after_norm:
            assert float((tap(model) - FEATURES["llava_features"]).abs().max()) > 100 * TOLERANCE
    finally:
        undo()
    assert logit_error(model, "A") <= TOLERANCE


def test_foreign_tower_is_noticed(foreign: Path, tmp_path: Path) -> None:
    import_original(foreign, tmp_path / "out")
    assert logit_error(load(tmp_path / "out"), "A") > 100 * TOLERANCE
