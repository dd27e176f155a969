"""A complete LoRA tuning against the original `train()`: order, losses, rates, gradients, weights.

The original ran with the projector trained, no clipping, and each micro-batch weighing the same;
one of its six updates has no image at all. Everything here goes the way that `kuea-mllm lora` goes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_llava import original_directory, tower_directory, tower_of
from safetensors.torch import load_file
from transformers import TrainerCallback

from kuea_mllm.adapters.llava.import_original import import_original
from kuea_mllm.config.lora import LoraRecipe
from kuea_mllm.training.checkpoints import CheckpointStore
from kuea_mllm.training.run_directory import RunDirectory
from kuea_mllm.tuning.assemble import TuningAssembly, assemble
from kuea_mllm.tuning.collate import Collator
from kuea_mllm.tuning.inputs import TuningInputs, open_tuning_inputs

GOLDEN = Path(os.environ.get("KUEA_GOLDEN_DIR", Path(__file__).parent)) / "llava"
TRACE: dict[str, Any] = json.loads((GOLDEN / "lora" / "trace.json").read_text())
TENSORS = load_file(GOLDEN / "lora" / "trace.safetensors")
SETTINGS: dict[str, Any] = TRACE["hyperparameters"]
STEPS: list[dict[str, Any]] = TRACE["optimizer_steps"]
TOLERANCE = 5e-5


def name_in_original(name: str) -> str:
    """Our name of a trained tensor -> that of the golden."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
    name = name.replace("model.language_model.", "model.")
    for ours, theirs in (("linear_1", "0"), ("linear_2", "2")):
        name = name.replace(f"multi_modal_projector.{ours}", f"mm_projector.{theirs}")
    return f"base_model.model.{name}"


def write_data(folder: Path) -> Path:
    images = load_file(GOLDEN / "images" / "images.safetensors")
    records = json.loads((GOLDEN / "lora" / "trace_data.json").read_text())
    for name in {record["image"] for record in records if "image" in record}:
        content = images[f"{Path(name).stem}.png_bytes"].numpy().tobytes()
        (folder / name).write_bytes(content)
    (folder / "mixture.json").write_text(json.dumps(records))
    return folder / "mixture.json"


def recipe(model: Path, data: Path, **settings: Any) -> LoraRecipe:
    content: dict[str, Any] = {
        "kind": "lora",
        "model": {"path": str(model)},
        "data": {
            "file": str(data),
            "images": str(data.parent),
            "max_length": SETTINGS["model_max_length"],
            "order": "released",
            "workers": 0,
        },
        "lora": {
            "rank": SETTINGS["lora_r"],
            "alpha": SETTINGS["lora_alpha"],
            "dropout": SETTINGS["lora_dropout"],
            "projector": "train",
        },
        "optim": {
            "lr": SETTINGS["learning_rate"],
            "projector_lr": SETTINGS["mm_projector_lr"],
            "weight_decay": SETTINGS["weight_decay"],
            "micro_batch_size": SETTINGS["per_device_train_batch_size"],
            "accumulation": SETTINGS["gradient_accumulation_steps"],
            "epochs": SETTINGS["num_train_epochs"],
            "warmup_ratio": SETTINGS["warmup_ratio"],
            "max_grad_norm": SETTINGS["max_grad_norm"],
            "loss_weighting": "micro_batch",
            "last_update": "drop",
        },
        "runtime": {
            "seed": SETTINGS["seed"],
            "device": "cpu",
            "dtype": "float32",
            "gradient_checkpointing": False,
            "log_every": 1,
        },
    }
    for path, value in settings.items():
        section, key = path.split("__")
        content[section][key] = value
    return LoraRecipe.parse(content, origin="test")


class Recorder(TrainerCallback):
    """Takes note of what the golden holds of each update."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.logged: list[float] = []
        self.first_gradient: dict[str, torch.Tensor] = {}
        self.norms: list[float] = []
        self.projector_moves: list[float] = []
        self._before: list[torch.Tensor] = []

    def _projector(self, model: Any) -> list[torch.Tensor]:
        named = model.wrapped.named_parameters()
        return [p.detach().clone() for n, p in named if p.requires_grad and "projector" in n]

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._before = self._projector(rest["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        pairs = zip(self._before, self._projector(rest["model"]), strict=True)
        self.projector_moves.append(max(float((a - b).abs().max()) for a, b in pairs))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        named = dict(rest["model"].wrapped.named_parameters())
        gradients = {n: p.grad for n, p in named.items() if p.grad is not None}
        self.norms.append(float(torch.nn.utils.get_total_norm(list(gradients.values()))))
        self.rates.append([group["lr"] for group in rest["optimizer"].param_groups])
        if not self.first_gradient:
            self.first_gradient = {name_in_original(n): g.clone() for n, g in gradients.items()}

    def on_log(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if "loss" in rest["logs"]:
            self.logged.append(rest["logs"]["loss"])


class Run:
    """A finished tuning and what was seen of it."""

    def __init__(self, recipe: LoraRecipe, folder: Path) -> None:
        self.inputs: TuningInputs = open_tuning_inputs(recipe)
        folder.mkdir()
        store = CheckpointStore(folder / "checkpoints", keep=1)
        directory = RunDirectory(folder, folder, store, None, {}, [])
        self.parts: TuningAssembly = assemble(self.inputs, directory, progress=False)
        self.losses: list[tuple[int, float]] = []
        self.recorder = Recorder()
        trainer = self.parts.trainer
        trainer.bind_checkpoints(store, dict)
        trainer.add_callback(self.recorder)
        add = trainer.history.add

        def note(step: int, index: Any, values: Any) -> None:
            self.losses.append((int(index), float(values["loss"])))
            add(step, index, values)

        trainer.history.add = note  # type: ignore[method-assign]
        state = trainer.trained_state()
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(TENSORS[f"initial.{name_in_original(name)}"])
        self.names = sorted(name_in_original(name) for name in state)
        trainer.train()
        self.parts.metrics.close()
        self.final = {name_in_original(n): t for n, t in trainer.trained_state().items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace")
    state = load_file(GOLDEN / "model" / "weights.safetensors")
    tower = tower_directory(folder / "tower", tower_of(state))
    source = original_directory(folder / "original", state, tower, tokenizer="tokenizer_nonlegacy")
    import_original(source, folder / "hf")
    return folder / "hf"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(recipe(model, data), tmp_path_factory.mktemp("run") / "out")


def test_trained_tensors_are_those_of_the_original(run: Run) -> None:
    expected = [name.removeprefix("initial.") for name in TENSORS if name.startswith("initial.")]
    assert run.names == sorted(expected)


def test_samples_come_in_the_original_order(run: Run) -> None:
    assert [index for index, _ in run.losses] == TRACE["sample_index_per_micro_batch"]


def test_losses_of_micro_batches_and_updates(run: Run) -> None:
    expected = [loss for step in STEPS for loss in step["micro_batch_losses"]]
    assert [loss for _, loss in run.losses] == pytest.approx(expected, abs=TOLERANCE)
    means = [step["logged_loss_mean_of_micro_batches"] for step in STEPS]
    assert run.recorder.logged == pytest.approx(means, abs=TOLERANCE)


def test_rates_of_all_groups(run: Run) -> None:
    # The original's second group, other tensors without decay, is empty.
    for seen, step in zip(run.recorder.rates, STEPS, strict=True):
        lora, _, weights, biases = step["lr_of_the_4_groups"]
        assert seen == pytest.approx([lora, weights, biases], abs=1e-12)


def test_first_gradient_and_norms(run: Run) -> None:
    norms = [step["grad_norm_before_step"] for step in STEPS]
    assert run.recorder.norms == pytest.approx(norms, rel=1e-4)
    for name, gradient in run.recorder.first_gradient.items():
        torch.testing.assert_close(
            gradient, TENSORS[f"first_grad.{name}"], atol=TOLERANCE, rtol=TOLERANCE
        )


def test_final_weights(run: Run) -> None:
    for name, tensor in run.final.items():
        group = "final_non_lora" if "mm_projector" in name else "final_lora"
        saved = TENSORS[f"{group}.{name.replace('.default', '')}"]
        torch.testing.assert_close(tensor, saved, atol=TOLERANCE, rtol=0)


def test_tower_is_untouched(run: Run) -> None:
    run.parts.require_untouched_tower(run.inputs)


def test_text_only_update_goes_on_moving_the_projector(run: Run) -> None:
    """Its gradient is zero there, not none, so AdamW follows its momentum."""
    text_only = [number for number, step in enumerate(STEPS) if step["all_text_only"]]
    assert text_only, "the set has no update without an image"
    for number in text_only:
        assert run.recorder.projector_moves[number] > 1e-5


def test_without_the_idle_image_the_trace_is_another(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Collator, "_idle_pixels", lambda self: {})
    other = Run(recipe(model, data), tmp_path / "out")
    expected = [loss for step in STEPS for loss in step["micro_batch_losses"]]
    error = max(abs(a - b) for (_, a), b in zip(other.losses, expected, strict=True))
    assert error > 10 * TOLERANCE
