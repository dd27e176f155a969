"""Put the parts of a tuning together: model, data, optimiser, callbacks, trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from kuea_mllm.adapters.records import name_tower, read_record
from kuea_mllm.log import LOGGER
from kuea_mllm.towers.model.fingerprint import fingerprint_state
from kuea_mllm.training.callbacks import MetricsFile, StopWhenDiverged, TrainingProgress
from kuea_mllm.training.distributed import any_process, in_turn, rank, world_size
from kuea_mllm.training.interruption import Interruption, SaveCheckpoints
from kuea_mllm.training.memory import recompute_activations
from kuea_mllm.training.run_directory import RunDirectory
from kuea_mllm.training.trackers import tensorboard_in
from kuea_mllm.tuning.collate import DataCounter
from kuea_mllm.tuning.inputs import TuningInputs
from kuea_mllm.tuning.loss import supervised_positions
from kuea_mllm.tuning.model import TuningModel
from kuea_mllm.tuning.packing import PackedBatchSampler, report_packing
from kuea_mllm.tuning.quantised import quantization_config
from kuea_mllm.tuning.receipt import LeakedTraining, TrainingReceipt, make_receipt
from kuea_mllm.tuning.sampler import GroupedBatchSampler, released_state
from kuea_mllm.tuning.sharding import make_mesh, shard_frozen
from kuea_mllm.tuning.trainer import DIVERGED_REMEDY, TuningTrainer
from kuea_mllm.tuning.wrap import wrap_with_lora

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TuningAssembly:
    """The parts of one run.

    Attributes:
        trainer: Ready to train.
        model: What is trained.
        receipt: What of it trains.
        tower_fingerprint: Of the tower as it was loaded.
        metrics: The callback that writes `metrics.jsonl`.
        interruption: The callback that ends the run when the process is asked to stop.
        counter: What was cut off so far.
    """

    trainer: TuningTrainer
    model: TuningModel
    receipt: TrainingReceipt
    tower_fingerprint: str
    metrics: MetricsFile
    interruption: Interruption
    counter: DataCounter

    def require_untouched_tower(self, inputs: TuningInputs) -> None:
        """Make sure that the tower is the one that was loaded.

        Raises:
            LeakedTraining: If its fingerprint is another.
        """
        now = fingerprint_tower(inputs, self.model)
        if now != self.tower_fingerprint:
            raise LeakedTraining(
                f"the vision tower's fingerprint is {now} after training, it was "
                f"{self.tower_fingerprint}.",
                "Nothing was saved. Report this with the run's log.",
            )


def assemble(inputs: TuningInputs, run: RunDirectory, *, progress: bool) -> TuningAssembly:
    """Build everything that a run needs.

    Args:
        inputs: From `open_tuning_inputs`.
        run: Where metrics and checkpoints go, and where to go on from.
        progress: Show a progress bar.
    """
    recipe, runtime = inputs.recipe, inputs.recipe.runtime
    model = load_tuning_model(inputs)
    receipt = make_receipt(model.inner, inputs.parts, head_trains=recipe.lora.train_lm_head)
    fingerprint = fingerprint_tower(inputs, model)
    _log_receipt(inputs, receipt, fingerprint)
    accumulation = recipe.accumulation(world_size())
    counter = DataCounter(inputs.mixture.name, skipped=recipe.data.skip_records)
    if run.checkpoint is not None and rank() == 0:  # which goes on with the counts of all
        counter.load_report(run.state["data"])
    metrics = MetricsFile(
        run.path / "metrics.jsonl",
        batch_size=recipe.optim.batch_size or 0,
        unit="rows" if recipe.data.packing else "samples",
        resume_step=run.start_step,
    )
    diverged = StopWhenDiverged(remedy=DIVERGED_REMEDY, last_good=run.store.last_good)
    device = torch.device(runtime.device)

    def agree(wish: bool) -> bool:
        return any_process(wish, device)

    # One process looks after every step; several exchange their answers where they wait anyway.
    every = 1 if world_size() == 1 else runtime.log_every
    interruption = Interruption(agree=agree, every=every)
    saving = SaveCheckpoints(
        run.store,
        every_steps=recipe.checkpoint.every_steps,
        every_minutes=recipe.checkpoint.every_minutes,
        agree=agree,
        every=every,
        at_end=True,  # merging a large model may fail
    )
    callbacks: list[TrainerCallback] = [metrics, diverged, interruption, saving]
    sampler = make_sampler(inputs, accumulation=accumulation)
    if runtime.liger:
        from kuea_mllm.tuning.liger import use_liger

        use_liger(model, first_batch(inputs, sampler, device))
    with tensorboard_in(run.path / "tensorboard"):
        trainer = TuningTrainer(
            model,
            inputs.examples,
            inputs.collator,
            sampler,
            recipe=recipe,
            accumulation=accumulation,
            output_dir=run.path / "checkpoints",
            counter=counter,
            record_name=inputs.mixture.name,
            run_name=run.out.name,
            callbacks=callbacks,
        )
    # The trainer has given all processes one seed; what each drops out of its samples is its own.
    torch.manual_seed(runtime.seed + rank())
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if progress:
        trainer.add_callback(
            TrainingProgress(
                "tune",
                rate=lambda: metrics.per_second,
                unit="row" if recipe.data.packing else "sample",
            )
        )
    diverged.bind(explain=trainer.find_divergence)
    return TuningAssembly(trainer, model, receipt, fingerprint, metrics, interruption, counter)


def load_tuning_model(inputs: TuningInputs) -> TuningModel:
    """Load the model and put the LoRA layers in; divide it among processes if that is asked for."""
    runtime = inputs.recipe.runtime
    if runtime.tf32 and runtime.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
    device = _own_device(runtime.device)
    if runtime.sharding != "fsdp":
        return _load(inputs, device)
    own = torch.device(device)
    mesh = make_mesh(own)

    def load_and_divide() -> TuningModel:
        # No card may have room for the whole.
        model = _load(inputs, "cpu")
        shard_frozen(model.inner, inputs.parts, own, mesh)
        return model

    # Nor the host for as many as there are processes: where the files hold another dtype, each
    # makes a converted copy of all weights before it keeps its part.
    return in_turn(load_and_divide)


def _load(inputs: TuningInputs, device: str) -> TuningModel:
    recipe, runtime = inputs.recipe, inputs.recipe.runtime
    dtype = _DTYPES[runtime.dtype]
    loaded = inputs.tuner.load_for_tuning(
        inputs.base,
        dtype=runtime.dtype,
        device=device,
        quantization=quantization_config(recipe.model.quantization, inputs.parts, dtype=dtype),
    )
    # Of the LoRA layers' beginning.
    torch.manual_seed(runtime.seed)
    wrapped = wrap_with_lora(
        loaded, inputs.parts, recipe.lora, uses_autocast=dtype != torch.float32
    )
    model = TuningModel(
        wrapped, inputs.tuner, inputs.parts, chunk=runtime.loss_chunk, autocast=dtype
    )
    if runtime.gradient_checkpointing:
        recompute_activations(model.inner.get_submodule(inputs.parts.language_model))
    return model


def make_sampler(
    inputs: TuningInputs, *, accumulation: int
) -> GroupedBatchSampler | PackedBatchSampler:
    """Return the order of the samples of this process, or of rows of them."""
    data, runtime = inputs.recipe.data, inputs.recipe.runtime
    lengths = inputs.mixture.lengths()
    if inputs.token_counts is not None:
        return _packed_sampler(inputs, lengths, inputs.token_counts, accumulation=accumulation)
    return GroupedBatchSampler(
        lengths,
        batch_size=inputs.recipe.optim.micro_batch_size,
        world_size=world_size(),
        accumulation=accumulation,
        seed=runtime.seed,
        rank=rank(),
        rng_state=released_state(runtime.seed) if data.order == "released" else None,
        by_modality=data.group_by_modality,
        alike_in_length=data.order == "length",
    )


def first_batch(
    inputs: TuningInputs,
    sampler: GroupedBatchSampler | PackedBatchSampler,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return the first micro-batch of this process as `TuningModel.forward` takes it."""
    examples: Any = inputs.examples
    first: Any = next(iter(sampler))
    batch = inputs.collator([examples[index] for index in first])
    DataCounter(inputs.mixture.name).take(batch)
    batch["predicting"], batch["targets"] = supervised_positions(batch.pop("labels"))
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _packed_sampler(
    inputs: TuningInputs,
    lengths: NDArray[np.int64],
    tokens: NDArray[np.int32],
    *,
    accumulation: int,
) -> PackedBatchSampler:
    data, batch_size = inputs.recipe.data, inputs.recipe.optim.micro_batch_size
    sampler = PackedBatchSampler(
        lengths,
        tokens,
        max_length=data.max_length,
        batch_size=batch_size,
        world_size=world_size(),
        accumulation=accumulation,
        seed=inputs.recipe.runtime.seed,
        rank=rank(),
        by_modality=data.group_by_modality,
    )
    if rank() == 0:
        report = report_packing(
            sampler,
            lengths,
            tokens,
            max_length=data.max_length,
            batch_size=batch_size,
            chunks=world_size() * accumulation,
            by_modality=data.group_by_modality,
        )
        LOGGER.info("%s", report)
    return sampler


def fingerprint_tower(inputs: TuningInputs, model: TuningModel) -> str:
    """Return the fingerprint of the tower in use."""
    tower: Any = inputs.adapter.vision_module(model.inner)
    return fingerprint_state(tower.state_dict())


def _log_receipt(inputs: TuningInputs, receipt: TrainingReceipt, fingerprint: str) -> None:
    for line in receipt.lines():
        LOGGER.info("%s", line)
    record = read_record(inputs.base)
    name = name_tower(record, fingerprint) if record else "the base's own (there is no kuea.json)"
    LOGGER.info("vision tower %s: %s; nothing of it trains", fingerprint, name)


def _own_device(device: str) -> str:
    # With several processes each has a device of its own, which accelerate chooses by local rank.
    if device == "cuda" and world_size() > 1:
        return f"cuda:{torch.cuda.current_device()}"
    return device
