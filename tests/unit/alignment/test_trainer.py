"""The trainer's promises that no golden covers."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kuea_mllm.alignment.callbacks import Measure, MetricsFile, StopWhenDiverged
from kuea_mllm.alignment.heldout import HeldOut
from kuea_mllm.alignment.schedule import cosine_with_warmup, lr_multiplier
from kuea_mllm.alignment.targets import LiveTargets, Targets
from kuea_mllm.alignment.trainer import AlignmentModel, AlignmentTrainer
from kuea_mllm.config.align import OptimConfig, RuntimeConfig
from kuea_mllm.errors import TrainingDiverged
from kuea_mllm.kernels import CosineKernel, PolynomialKernel
from kuea_mllm.objectives import KernelAlignmentObjective

SIZE, WIDTH = 4, 6


class Pictures(torch.utils.data.Dataset):
    def __init__(self, count=32):
        self.pixels = torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {"pixels": self.pixels[index], "index": index}


class Encoder(nn.Sequential):
    def __init__(self, width=WIDTH, seed=0):
        torch.manual_seed(seed)
        super().__init__(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, width))


def objective(kernel=None):
    return KernelAlignmentObjective(
        kernel or PolynomialKernel(0.5, 1.0, trainable=True),
        CosineKernel(),
        kernel_weight=1.0,
        preserve_weight=1.0,
    )


def make_trainer(tmp_path, callbacks=(), **changes):
    settings = {"lr": 1e-2, "batch_size": 8, "steps": 6, "first_update_at_full_lr": False}
    student = Encoder()
    return AlignmentTrainer(
        AlignmentModel(student, objective()),
        LiveTargets(Encoder(seed=1), Encoder(), torch.device("cpu")),
        Pictures(),
        optim=OptimConfig(**{**settings, **changes}),
        runtime=RuntimeConfig(device="cpu", log_every=2),
        output_dir=tmp_path / "trainer",
        callbacks=list(callbacks),
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
    kernel = trainer.model.objective.student_kernel
    before = kernel.gamma.item()
    trainer.train()
    assert kernel.gamma.item() != before
    assert trainer.model.objective.student_kernel is kernel


def test_frozen_towers_do_not_move(tmp_path):
    trainer = make_trainer(tmp_path)
    frozen = [trainer.targets.teacher, trainer.targets.original]
    before = [[p.clone() for p in tower.parameters()] for tower in frozen]
    trainer.train()
    for tower, parameters in zip(frozen, before, strict=True):
        assert all(
            p.equal(old) and p.grad is None
            for p, old in zip(tower.parameters(), parameters, strict=True)
        )


def test_same_seed_same_weights_other_seed_other_order(tmp_path):
    first, second = make_trainer(tmp_path), make_trainer(tmp_path)
    first.train(), second.train()
    assert first.model.student[1].weight.equal(second.model.student[1].weight)
    third = make_trainer(tmp_path)
    third.args.seed = 1
    torch.manual_seed(1)
    third.train()
    assert not first.model.student[1].weight.equal(third.model.student[1].weight)


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
    measured = [row["step"] for row in rows if "heldout_kernel_gap" in row]
    assert measured == [0, 4, 6]


def test_nan_ends_the_run_and_names_the_term(tmp_path):
    trainer = make_trainer(tmp_path, [StopWhenDiverged(lambda: None)])
    inner = trainer.targets
    trainer.targets = lambda pixels, index: Targets(
        teacher=inner(pixels, index).teacher * float("nan"),
        original=inner(pixels, index).original,
    )
    with pytest.raises(TrainingDiverged, match=r"loss.* is nan at step"):
        trainer.train()


def test_kernel_that_lost_its_sign_ends_the_run(tmp_path):
    trainer = make_trainer(tmp_path)
    kernel = trainer.model.objective.student_kernel
    trainer.add_callback(StopWhenDiverged(kernel.check))
    with torch.no_grad():
        kernel.gamma.fill_(-1.0)
    with pytest.raises(TrainingDiverged, match="gamma"):
        trainer.train()


def test_untouched_tower_has_no_drift_and_its_gap_twice(tmp_path):
    student = Encoder()
    heldout = HeldOut(
        Pictures(),
        count=10,
        targets=LiveTargets(Encoder(seed=1), Encoder(), torch.device("cpu")),
        student=student,
        objective=objective(),
        device=torch.device("cpu"),
        batch_size=4,
    )
    measured = heldout.measure()
    assert heldout.count == 10
    assert measured["heldout_kernel_gap"] == measured["heldout_kernel_gap_original"] > 0
    assert measured["heldout_drift_distance_mean"] == 0
    with torch.no_grad():
        student[1].bias.add_(1.0)
    moved = heldout.measure()
    assert moved["heldout_drift_distance_mean"] == pytest.approx(WIDTH**0.5, rel=1e-5)
    assert moved["heldout_kernel_gap_original"] == measured["heldout_kernel_gap_original"]


def test_heldout_images_are_never_trained_on(tmp_path):
    from PIL import Image

    from kuea_mllm.alignment.inputs import _split
    from kuea_mllm.config.align import DataConfig
    from kuea_mllm.data.images import ImageFolder
    from kuea_mllm.data.transforms import ImageTransform
    from kuea_mllm.miniworld import ASSETS
    from kuea_mllm.towers.load import load_tower

    for number in range(40):
        Image.new("RGB", (SIZE, SIZE), (number, 0, 0)).save(tmp_path / f"{number:02}.png")
    transform = ImageTransform.from_spec(load_tower(ASSETS / "clip").spec)
    images = ImageFolder(tmp_path, transform)
    training, heldout = _split(images, DataConfig(heldout_count=3), transform)
    trained = {training[i]["index"] for i in range(len(training))}
    measured = {heldout[i]["index"] for i in range(len(heldout))}
    assert len(measured) == 3
    assert trained | measured == set(range(40))
    assert not trained & measured
