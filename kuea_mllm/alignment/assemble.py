"""Put the parts of a run together: models, targets, measurements, trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from kuea_mllm.alignment.attention import PICTURES, AttentionRecord
from kuea_mllm.alignment.build import build_kernels, build_objective
from kuea_mllm.alignment.heldout import HeldOut
from kuea_mllm.alignment.inputs import AlignmentInputs
from kuea_mllm.alignment.left_out import LeftOut
from kuea_mllm.alignment.monitor import EarlyStop, Measure
from kuea_mllm.alignment.record import describe_run
from kuea_mllm.alignment.speed import (
    compile_towers,
    measure_utilisation,
)
from kuea_mllm.alignment.target_cache import CachedImages, CachedTargets, autocast
from kuea_mllm.alignment.target_inputs import open_target_cache
from kuea_mllm.alignment.targets import LiveTargets, TargetSource
from kuea_mllm.alignment.trainer import DIVERGED_REMEDY, AlignmentModel, AlignmentTrainer
from kuea_mllm.alignment.warm_start import start_feature_map
from kuea_mllm.alignment.zero_shot import ZeroShotProbe, open_zero_shot
from kuea_mllm.log import LOGGER
from kuea_mllm.objectives import Objective
from kuea_mllm.towers.model.encode import TowerEncoder
from kuea_mllm.towers.model.tower import Tower
from kuea_mllm.towers.writing.save import save_tower
from kuea_mllm.training.callbacks import MetricsFile, StopWhenDiverged, TrainingProgress
from kuea_mllm.training.checkpoints import host_copy
from kuea_mllm.training.distributed import any_process, rank, world_size
from kuea_mllm.training.interruption import Interruption, SaveCheckpoints
from kuea_mllm.training.memory import recompute_activations
from kuea_mllm.training.run_directory import RunDirectory
from kuea_mllm.training.trackers import tensorboard_in


@dataclass(frozen=True)
class Assembly:
    """The parts of one run.

    Attributes:
        trainer: Ready to train.
        student: The trained tower.
        objective: With the kernels.
        heldout: What is measured on.
        measure: The callback that measures.
        metrics: The callback that writes `metrics.jsonl`.
        early_stop: The callback that may end the run, if the recipe asks for one.
        interruption: The callback that ends the run when the process is asked to stop.
        unreadable: Images that were left out.
        initial_kernel: Constants of the student's kernel before the first update of the run.
        attention: Where the tower looked before the run.
    """

    trainer: AlignmentTrainer
    student: TowerEncoder
    objective: Objective
    heldout: HeldOut
    measure: Measure
    metrics: MetricsFile
    early_stop: EarlyStop | None
    interruption: Interruption
    unreadable: LeftOut
    initial_kernel: dict[str, float]
    attention: AttentionRecord

    @property
    def kernel_constants(self) -> dict[str, float]:
        """Constants of the student's kernel as they are now; empty without a kernel term."""
        kernels = self.objective.kernels
        return dict(kernels[0].constants()) if kernels else {}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold of these parts; JSON values."""
        return {
            "measure": self.measure.state_dict(),
            "early_stop": self.early_stop.state_dict() if self.early_stop else None,
            "left_out": self.unreadable.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.measure.load_state_dict(state["measure"])
        if self.early_stop is not None:
            self.early_stop.load_state_dict(state["early_stop"])
        self.unreadable.load_state(state["left_out"])
        self.trainer.history.load_state(state["history"])


def assemble(inputs: AlignmentInputs, run: RunDirectory, *, progress: bool) -> Assembly:
    """Build everything that a run needs.

    Args:
        inputs: From `open_inputs`; the student is the untouched one.
        run: Where metrics and checkpoints go, and where to go on from.
        progress: Show a progress bar.
    """
    recipe, spec, runtime = inputs.recipe, inputs.student.spec, inputs.recipe.runtime
    torch.manual_seed(runtime.seed)
    device = _device(runtime.device)
    student = TowerEncoder(inputs.student)
    original = copy.deepcopy(student)
    objective = build_objective(recipe.objective, spec, inputs.teachers)
    patch_layer = recipe.objective.patch_layer
    live = LiveTargets(
        inputs.teachers,
        original,
        device,
        patch_layer=patch_layer if objective.reads_patches else None,
        teacher_patches=objective.reads_teacher_patches,
    )
    model = AlignmentModel(student, objective, patch_layer=patch_layer).to(device)
    # Before anything is compiled: the cache is named after the weights. Both it and the held-out
    # targets have to be there before a checkpoint changes the student.
    dataset, targets = _targets(inputs, live, progress=progress)
    start_feature_map(
        objective,
        inputs.images,
        dataset,
        # Of a stream, held-out images are taken, which no cache holds.
        live if inputs.images.positions is None else targets,
        device=device,
        autocast=lambda: autocast(device, runtime.precision),
    )
    utilisation = measure_utilisation(
        spec,
        None if recipe.targets.cache else live,
        device=device,
        precision=runtime.precision,
        processes=world_size(),
    )
    _speed_up(inputs, student, live, device)
    heldout = HeldOut(
        inputs.images.heldout,
        inputs.images.heldout_positions,
        targets=live,
        student=student,
        gauge=objective.kernels or _gauge(inputs, device),
        device=device,
        # Small: hidden states of all blocks are held at once, 60 MB an image in ViT-L-14-336.
        batch_size=min(recipe.optim.batch_size, runtime.micro_batch_size or 16),
        patch_layer=patch_layer if recipe.monitor.patch_drift else None,
        precision=runtime.precision,
    )
    if recipe.targets.cache:
        _send_away(live)
    measure = Measure(
        _measurements(heldout, _zero_shot(inputs, student, device)), every=runtime.measure_every
    )
    metrics = MetricsFile(
        run.path / "metrics.jsonl",
        batch_size=recipe.optim.batch_size,
        resume_step=run.start_step,
        idle_seconds=lambda: measure.seconds,
        flops_per_item=utilisation.flops_per_image if utilisation else None,
        peak_flops=utilisation.peak_flops if utilisation else None,
    )
    kernels = objective.kernels
    diverged = StopWhenDiverged(
        kernels[0].check if kernels else _nothing_to_check,
        remedy=DIVERGED_REMEDY,
        last_good=run.store.last_good,
    )

    def agree(wish: bool) -> bool:
        return any_process(wish, device)

    stop = recipe.monitor.early_stop
    early_stop = None if stop is None else EarlyStop(stop, measure, agree=agree)
    # One process looks after every step; several exchange their answers where they wait anyway.
    every = 1 if world_size() == 1 else runtime.log_every
    interruption = Interruption(agree=agree, every=every)
    saving = SaveCheckpoints(
        run.store,
        every_steps=recipe.checkpoint.every_steps,
        every_minutes=recipe.checkpoint.every_minutes,
        agree=agree,
        every=every,
    )
    callbacks: list[TrainerCallback | None] = [metrics, diverged, measure, early_stop]
    # After what may end the run, which then needs no checkpoint.
    callbacks += [interruption, saving]
    unreadable = LeftOut(recipe.data.skip_unreadable, _names(inputs))
    with tensorboard_in(run.path / "tensorboard"):
        trainer = AlignmentTrainer(
            model,
            targets,
            dataset,
            optim=recipe.optim,
            runtime=runtime,
            output_dir=run.path / "checkpoints",
            positions=inputs.images.positions,
            workers=recipe.data.workers,
            start_step=run.start_step or 0,
            unreadable=unreadable,
            image_name=_names(inputs) or str,
            run_name=run.out.name,
            callbacks=[callback for callback in callbacks if callback is not None],
        )
    # Rows go to metrics.jsonl; printing each of them too would bury everything else.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if progress:
        trainer.add_callback(TrainingProgress("align", rate=lambda: metrics.per_second))
    constants = dict(kernels[0].constants()) if kernels else {}
    parts = Assembly(
        trainer,
        student,
        objective,
        heldout,
        measure,
        metrics,
        early_stop,
        interruption,
        unreadable,
        constants,
        AttentionRecord(inputs.student, heldout.images(PICTURES)),
    )
    measure.bind(trainer.log_measurement, on_best=lambda step: _save_best(inputs, parts, run, step))
    diverged.bind(explain=trainer.explain_divergence)
    if run.checkpoint is not None:
        parts.load_state(run.state)
    return parts


def _send_away(live: LiveTargets) -> None:
    """Free the device of frozen towers whose embeddings come from the cache."""
    if not live.teacher_patches:
        for teacher in live.teachers:
            teacher.to("cpu")
        LOGGER.info("teachers are not run: their embeddings come from the cache")
    if live.patch_layer is None:
        live.original.to("cpu")
        LOGGER.info("the original tower is not run: its embeddings come from the cache")


def _targets(
    inputs: AlignmentInputs, live: LiveTargets, *, progress: bool
) -> tuple[Dataset[Any], TargetSource]:
    """Return the training images and where their targets come from."""
    if not inputs.recipe.targets.cache:
        return inputs.images.training, live
    cache = open_target_cache(inputs)
    cache.build(progress=progress, rank=rank(), world_size=world_size())
    images = CachedImages(cache.dataset, cache.stores)
    return images, CachedTargets(live if live.patch_layer is not None else None)


def _speed_up(
    inputs: AlignmentInputs, student: TowerEncoder, live: LiveTargets, device: torch.device
) -> None:
    runtime = inputs.recipe.runtime
    if runtime.gradient_checkpointing:
        recompute_activations(student.model)
    frozen: list[Any] = []
    if not inputs.recipe.targets.cache or live.patch_layer is not None:
        frozen.append(live.original)
    if not inputs.recipe.targets.cache or live.teacher_patches:
        frozen += live.teachers
    compile_towers([student.model, *(m.model for m in frozen)], runtime.compile, device)
    if device.type == "cuda":
        LOGGER.info("optimiser: fused AdamW (CUDA)")


def _measurements(
    heldout: HeldOut, zero_shot: ZeroShotProbe | None
) -> Callable[[], dict[str, float]]:
    if zero_shot is None:
        return heldout.measure
    return lambda: heldout.measure() | zero_shot.measure()


def _zero_shot(
    inputs: AlignmentInputs, student: TowerEncoder, device: torch.device
) -> ZeroShotProbe | None:
    recipe = inputs.recipe
    if recipe.monitor.zero_shot is None or rank() != 0:
        return None
    return open_zero_shot(
        recipe.monitor.zero_shot,
        count=recipe.monitor.zero_shot_count,
        source=str(recipe.student.model),
        transform=inputs.images.heldout.transform,
        student=student,
        width=student.width,
        device=device,
        batch_size=recipe.runtime.micro_batch_size or 64,
        precision=recipe.runtime.precision,
        revision=recipe.student.revision,
    )


def _save_best(inputs: AlignmentInputs, parts: Assembly, run: RunDirectory, step: int) -> None:
    """Write the tower with the lowest held-out gap so far to `checkpoints/best`."""
    manifest = describe_run(
        inputs,
        kernel={"initial": parts.initial_kernel, "final": parts.kernel_constants},
        measured={"before": parts.measure.first, "after": parts.measure.last},
        steps=step,
        best_so_far=True,
    )
    tower = _on_host(inputs.student)
    run.store.save_best(lambda directory: save_tower(tower, directory, manifest=manifest))


def _on_host(tower: Tower) -> Tower:
    """Return a copy in host memory that training does not change."""
    model: nn.Module = tower.model
    # Copying the module as a whole would double it on the device first.
    copies: dict[int, Any] = {
        id(p): nn.Parameter(host_copy(p), requires_grad=False) for p in model.parameters()
    }
    copies |= {id(buffer): host_copy(buffer) for buffer in model.buffers()}
    return replace(tower, model=copy.deepcopy(tower.model, copies))


def _names(inputs: AlignmentInputs) -> Callable[[int], str] | None:
    """Return what tells the name of a training image; None for a stream."""
    source = getattr(inputs.images.training, "source", None)
    return None if source is None else source.name


def _device(name: str) -> torch.device:
    # With several processes each has a device of its own, which accelerate chooses by local rank.
    if name == "cuda" and world_size() > 1:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


def _gauge(inputs: AlignmentInputs, device: torch.device) -> Any:
    kernels = build_kernels(inputs.recipe.objective, inputs.student.spec, inputs.teachers)
    return tuple(kernel.to(device).requires_grad_(False) for kernel in kernels)


def _nothing_to_check() -> None:
    """Without a kernel there is no constant that could leave its range."""
