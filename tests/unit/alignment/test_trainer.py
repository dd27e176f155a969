"""The trainer's promises that no golden covers."""

import errno
import itertools
import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from kuea_mllm.alignment.left_out import LeftOut
from kuea_mllm.alignment.monitor import Measure
from kuea_mllm.alignment.schedule import cosine_with_warmup, lr_multiplier
from kuea_mllm.alignment.targets import LiveTargets, Targets
from kuea_mllm.alignment.trainer import AlignmentModel, AlignmentTrainer
from kuea_mllm.config.align import OptimConfig, RuntimeConfig
from kuea_mllm.errors import EnvironmentFailure, TrainingDiverged, UnreadableImage, UserError
from kuea_mllm.features import Features
from kuea_mllm.kernels import CosineKernel, PolynomialKernel
from kuea_mllm.objectives import KernelTerm, Objective, PreservationTerm
from kuea_mllm.training.callbacks import MetricsFile, StopWhenDiverged
from kuea_mllm.training.checkpoints import CheckpointStore, read_state
from kuea_mllm.training.interruption import SaveCheckpoints

SIZE, WIDTH = 4, 6
CPU = torch.device("cpu")


class Pictures(torch.utils.data.Dataset):
    def __init__(self, count=32, replaced=()):
        self.pixels = torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        self.replaced = replaced

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, draw):
        index = draw % len(self)
        item = {"pixels": self.pixels[index], "index": index, "checksum": 1}
        return {**item, "replaced": index if index in self.replaced else -1}


class Encoder(nn.Sequential):
    def __init__(self, width=WIDTH, seed=0, dropout=0.0):
        torch.manual_seed(seed)
        super().__init__(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, width), nn.Dropout(dropout))

    def features(self, pixels, layer=None, *, patches=False):
        return Features(self(pixels))


def objective():
    kernel = PolynomialKernel(0.5, 1.0, trainable=True, parametrisation="direct")
    return Objective([KernelTerm(kernel, CosineKernel(), weight=1.0), PreservationTerm(weight=1.0)])


def student_kernel(trainer):
    return trainer.model.objective.kernels[0]


def live_targets():
    return LiveTargets([Encoder(seed=1)], Encoder(), CPU)


def make_trainer(tmp_path, callbacks=(), *, dropout=0.0, targets=None, more=None, **changes):
    settings = {"lr": 1e-2, "batch_size": 8, "steps": 6, "first_update_at_full_lr": False}
    return AlignmentTrainer(
        AlignmentModel(Encoder(dropout=dropout), objective()),
        targets or live_targets(),
        (more or {}).pop("dataset", None) or Pictures(),
        optim=OptimConfig(**{**settings, **changes}),
        runtime=RuntimeConfig(device="cpu", log_every=2),
        output_dir=tmp_path / "trainer",
        callbacks=list(callbacks),
        **(more or {}),
    )


@given(
    total=st.integers(2, 500),
    warmup=st.integers(0, 400),
    step=st.integers(0, 500),
)
def test_schedule_stays_in_the_unit_interval_and_orders_differ_in_update_one_only(
    total, warmup, step
):
    warmup, step = min(warmup, total - 1), min(step, total)
    value = cosine_with_warmup(step, warmup_steps=warmup, total_steps=total)
    assert 0 <= value <= 1
    usual, released = (
        lr_multiplier(warmup_steps=warmup, total_steps=total, first_update_at_full_lr=quirk)
        for quirk in (False, True)
    )
    assert released(0) == 1
    if step > 0:
        assert usual(step) == released(step) == value


def test_decay_covers_the_whole_tower_and_no_kernel_parameter(tmp_path):
    trainer = make_trainer(tmp_path, weight_decay=0.3)
    tower, kernel = trainer.create_optimizer().param_groups
    assert tower["weight_decay"] == 0.3
    assert kernel["weight_decay"] == 0
    assert {id(p) for p in tower["params"]} == {id(p) for p in trainer.model.student.parameters()}
    assert len(kernel["params"]) == 2


def test_trained_kernel_parameter_is_the_one_in_the_loss(tmp_path):
    trainer = make_trainer(tmp_path)
    kernel = student_kernel(trainer)
    before = kernel.constants()
    trainer.train()
    assert kernel.constants() != before
    assert student_kernel(trainer) is kernel


def test_frozen_towers_do_not_move(tmp_path):
    targets = live_targets()
    frozen = [*targets.teachers, targets.original]
    before = [[p.clone() for p in tower.parameters()] for tower in frozen]
    make_trainer(tmp_path, targets=targets).train()
    for tower, parameters in zip(frozen, before, strict=True):
        assert all(
            p.equal(old) and p.grad is None
            for p, old in zip(tower.parameters(), parameters, strict=True)
        )


def test_metrics_hold_mean_terms_rate_and_measurements(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", batch_size=8)
    measure = Measure(lambda: {"heldout_kernel_gap": 0.5}, every=4)
    trainer = make_trainer(tmp_path, [metrics, measure])
    measure.bind(trainer.log_measurement)
    trainer.train()
    metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row for row in rows if "loss" in row]
    assert [row["step"] for row in losses] == [1, 2, 4, 6]
    for row in losses:
        assert row["loss"] == pytest.approx(row["loss_kernel"] + row["loss_preserve"], rel=1e-5)
        assert row["images_per_second"] > 0
    # Student and original start equal, so the first step has nothing to preserve.
    assert losses[0]["loss_preserve"] == 0
    # 32 images, 8 in a batch.
    assert [row["epoch"] for row in losses] == [0.25, 0.5, 1.0, 1.5]
    measured = [row["step"] for row in rows if "heldout_kernel_gap" in row]
    assert measured == [0, 4, 6]


class NanFrom:
    """Targets that turn into NaN at an update."""

    def __init__(self, step):
        self.step, self.calls, self.inner = step, itertools.count(1), live_targets()

    def __call__(self, batch):
        targets = self.inner(batch)
        if next(self.calls) < self.step:
            return targets
        original = Features(targets.original.pooled * float("nan"))
        return Targets(teachers=targets.teachers, original=original)


def test_nan_ends_the_run_and_names_term_step_and_images(tmp_path):
    diverged = StopWhenDiverged(remedy="")
    trainer = make_trainer(
        tmp_path,
        [diverged],
        targets=NanFrom(3),
        more={"image_name": lambda position: f"picture-{position}.png"},
    )
    diverged.bind(explain=trainer.explain_divergence)
    with pytest.raises(
        TrainingDiverged, match=r"First seen: loss_preserve is nan at step 3, images picture-\d+"
    ):
        trainer.train()


def test_kernel_that_lost_its_sign_ends_the_run(tmp_path):
    trainer = make_trainer(tmp_path, lr=1e-9)
    kernel = student_kernel(trainer)
    trainer.add_callback(StopWhenDiverged(kernel.check, remedy=""))
    with torch.no_grad():
        kernel.gamma.fill_(-1e-3)  # the loss is finite still
    with pytest.raises(TrainingDiverged, match="gamma"):
        trainer.train()


def test_images_that_were_left_out_are_counted_and_limited(tmp_path):
    counter = LeftOut(5, lambda position: f"picture-{position}.png")
    more = {"dataset": Pictures(replaced={3, 9}), "unreadable": counter}
    make_trainer(tmp_path, more=more).train()
    assert counter.report()["images"] == ["picture-3.png", "picture-9.png"]
    again = LeftOut(5)
    again.load_state(json.loads(json.dumps(counter.state())))
    assert again.report() == counter.report()
    more = {"dataset": Pictures(replaced={3, 9}), "unreadable": LeftOut(1)}
    with pytest.raises(UnreadableImage, match="2 images cannot be read, 1 are allowed"):
        make_trainer(tmp_path, more=more).train()


def saving_trainer(tmp_path, store, *, every=2, **settings):
    trainer = make_trainer(
        tmp_path, [SaveCheckpoints(store, every_steps=every, every_minutes=None)], **settings
    )
    trainer.bind_checkpoints(store, lambda: {"mark": trainer.state.global_step})
    return trainer


def test_resumed_training_equals_uninterrupted_training_with_dropout(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=9)
    # Odd steps lie between two rows of metrics.
    whole = saving_trainer(tmp_path, store, every=3, dropout=0.3, steps=7)
    whole.train()
    store.close()
    resumed = make_trainer(tmp_path, dropout=0.3, steps=7, more={"start_step": 3})
    state = read_state(tmp_path / "checkpoints" / "checkpoint-3")
    resumed.history.load_state(state["history"])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-3"))
    assert state["mark"] == 3
    assert resumed.state.global_step == 7
    for (name, one), other in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    rows = [
        [{k: v for k, v in row.items() if not k.startswith("train_")} for row in log]
        for log in (whole.state.log_history[2:], resumed.state.log_history)
    ]
    assert rows[0] == rows[1]


def test_checkpoint_of_another_model_is_refused_by_tensor(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=9)
    saving_trainer(tmp_path, store, steps=3).train()
    store.close()
    checkpoint = tmp_path / "checkpoints" / "checkpoint-2"
    weights = load_file(checkpoint / "model.safetensors")
    wrong = {
        "lacks tensor student.1.bias": {k: v for k, v in weights.items() if k != "student.1.bias"},
        "has tensor extra that": {**weights, "extra": torch.zeros(1)},
        "student.1.bias of .* has shape": {**weights, "student.1.bias": torch.zeros(1)},
    }
    for problem, state in wrong.items():
        save_file(state, checkpoint / "model.safetensors")
        with pytest.raises(UserError, match=problem):
            make_trainer(tmp_path, more={"start_step": 2}).train(
                resume_from_checkpoint=str(checkpoint)
            )


def test_diverged_weights_are_never_saved(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    # No row is due before the checkpoint that would push out the good one.
    trainer = saving_trainer(tmp_path, store, every=3, targets=NanFrom(5))
    trainer.args.logging_steps = 100
    with pytest.raises(
        TrainingDiverged,
        match=r"loss_preserve is nan at step 5.*\n.*last good checkpoint is .*checkpoint-3",
    ):
        trainer.args.max_steps = 9
        trainer.train()
    store.close()
    assert [path.name for path in store.directory.iterdir()] == ["checkpoint-3"]


def test_full_disk_ends_training_and_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path / "checkpoints", keep=5)
    trainer = saving_trainer(tmp_path, store, steps=12)
    saved = []

    def full_later(tensors, path, metadata):
        saved.append(path)
        if len(saved) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr("kuea_mllm.training.checkpoints.save_file", full_later)
    with pytest.raises(EnvironmentFailure) as caught:
        trainer.train()
    store.close()
    assert f"no space left on device while writing {store.directory / 'checkpoint-4'}" in str(
        caught.value
    )
    assert f"last good checkpoint is {store.directory / 'checkpoint-2'}" in str(caught.value)
    assert [path.name for path in store.directory.iterdir()] == ["checkpoint-2"]
