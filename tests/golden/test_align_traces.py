"""Twenty updates of the original training code, repeated by the real trainer."""

import re

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, TrainerCallback

from kuea_mllm.alignment.targets import LiveTargets
from kuea_mllm.alignment.trainer import AlignmentModel, AlignmentTrainer
from kuea_mllm.config.align import OptimConfig, RuntimeConfig
from kuea_mllm.features import Features
from kuea_mllm.kernels import PolynomialKernel
from kuea_mllm.objectives import KernelTerm, Objective, PreservationTerm
from kuea_mllm.towers.formats.convert import (
    canonical_to_hf,
    canonical_to_visual,
    hf_to_canonical,
    visual_to_canonical,
)

TRACES = ["mlp", "vit"]
VARIANTS = ["paper", "released"]
# Absolute for weights and relative for losses. float64 is bounded by the float32 rounding of the
# normalisation constants; float32 by AdamW, whose early steps divide small gradients by
# themselves (index.json, "conventions").
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-6}


class Normalised(nn.Module):
    """Put pixel normalisation in front of a network, in the network's own precision."""

    def __init__(self, network, parameters, dtype):
        super().__init__()
        self.network = network
        for name in ("mean", "std"):
            values = torch.tensor(parameters[f"normalise_{name}"], dtype=dtype)
            self.register_buffer(name, values.view(3, 1, 1))

    def forward(self, pixels):
        return self.network((pixels - self.mean) / self.std)

    def features(self, pixels, layer=None, *, patches=False):
        return Features(self(pixels))


class MlpStudent(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.fc1 = nn.Linear(*reversed(weights["fc1.weight"].shape))
        self.norm = nn.LayerNorm(len(weights["norm.weight"]), eps=1e-5)
        self.fc2 = nn.Linear(*reversed(weights["fc2.weight"].shape))
        self.load_state_dict(weights)

    def forward(self, pixels):
        return self.fc2(self.norm(nn.functional.gelu(self.fc1(pixels.flatten(1)))))


class VitStudent(nn.Module):
    def __init__(self, weights, parameters):
        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=parameters["width"],
            intermediate_size=weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            num_hidden_layers=parameters["layers"],
            num_attention_heads=parameters["heads"],
            image_size=parameters["image_size"],
            patch_size=parameters["patch"],
            projection_dim=parameters["out"],
            hidden_act="quick_gelu",
            attn_implementation="sdpa",  # eager computes its softmax in float32
        )
        self.tower = CLIPVisionModelWithProjection(config)
        self.tower.load_state_dict(canonical_to_hf(visual_to_canonical(weights)))

    def forward(self, pixels):
        return self.tower(pixel_values=pixels).image_embeds


class Teacher(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.fc1 = nn.Linear(*reversed(weights["t_fc1.weight"].shape))
        self.fc2 = nn.Linear(*reversed(weights["t_fc2.weight"].shape), bias=False)
        self.load_state_dict({name.removeprefix("t_"): value for name, value in weights.items()})

    def forward(self, pixels):
        return self.fc2(torch.tanh(self.fc1(pixels.flatten(1))))


class FixedOrder(Dataset):
    """The golden's images in the order of its batches."""

    def __init__(self, images, order):
        self.images, self.order = images, order.flatten().tolist()

    def __len__(self):
        return len(self.order)

    def __getitem__(self, position):
        index = self.order[position]
        return {"pixels": self.images[index], "index": index}


class StopAfter(TrainerCallback):
    def __init__(self, updates):
        self.updates = updates

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.updates


class RecordingTrainer(AlignmentTrainer):
    """Keeps what entered and left every update."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rows = []
        self.first_gradient = {}
        self.after_first = {}

    def training_step(self, model, *args, **kwargs):
        kernel, _ = self.model.objective.kernels
        used = [kernel.gamma.item(), kernel.coef0.item()]
        if len(self.rows) == 1:
            self.after_first = state_of(model.student)
        loss = super().training_step(model, *args, **kwargs)
        if not self.rows:
            self.first_gradient = {
                name: parameter.grad.clone() for name, parameter in model.student.named_parameters()
            }
        self.rows.append(
            {
                "loss_total": loss.item(),
                "loss_kernel": self.last_loss.terms["kernel"].item(),
                "loss_preserve": self.last_loss.terms["preserve"].item(),
                "kernel_params_used": used,
                "lr_used": self.optimizer.param_groups[0]["lr"],
            }
        )
        return loss

    def column(self, name):
        return torch.tensor([row[name] for row in self.rows], dtype=torch.float64)


def state_of(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def group(golden, prefix):
    return {
        name.removeprefix(prefix): golden[name] for name in golden.names if name.startswith(prefix)
    }


def in_golden_names(kind, tensors):
    """Student tensors under the names that the golden uses."""
    plain = {
        name.removeprefix("network."): value
        for name, value in tensors.items()
        if name.startswith("network.")
    }
    if kind == "mlp":
        return plain
    tower = {name.removeprefix("tower."): value for name, value in plain.items()}
    return canonical_to_visual(hf_to_canonical(tower))


def run(golden, kind, variant, dtype, folder):
    parameters = golden.hyper_parameters
    initial = group(golden, "init.")

    def student():
        network = MlpStudent(initial) if kind == "mlp" else VitStudent(initial, parameters)
        return Normalised(network.to(dtype), parameters, dtype)

    teacher = Normalised(Teacher(group(golden, "target.")).to(dtype), parameters, dtype)
    kernel = PolynomialKernel(
        parameters["gamma0"],
        parameters["coef0_0"],
        trainable=variant == "paper",
        parametrisation="direct",
        dtype=dtype,
    )
    target_kernel = PolynomialKernel(1 / parameters["target_width"], 1.0, dtype=dtype)
    objective = Objective(
        [
            KernelTerm(kernel, target_kernel, weight=parameters["penalty_weight"]),
            PreservationTerm(weight=parameters["clean_weight"]),
        ]
    )
    images = golden["images"].to(dtype)
    trainer = RecordingTrainer(
        AlignmentModel(student(), objective),
        LiveTargets([teacher], student(), torch.device("cpu")),
        FixedOrder(images, golden["batch_index"]),
        optim=OptimConfig(
            lr=parameters["base_lr"],
            weight_decay=parameters["wd"],
            batch_size=parameters["batch"],
            steps=parameters["total_steps_of_schedule"],
            warmup_steps=parameters["warmup"],
            first_update_at_full_lr=True,
        ),
        runtime=RuntimeConfig(device="cpu"),
        output_dir=folder,
        shuffle=False,
        callbacks=[StopAfter(parameters["updates"])],
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module", params=TRACES)
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def golden(align_golden, kind):
    return align_golden(f"trace_{kind}.safetensors")


@pytest.fixture(scope="module")
def trainer(golden, kind, variant, dtype, tmp_path_factory):
    return run(golden, kind, variant, dtype, tmp_path_factory.mktemp("trace"))


@pytest.mark.parametrize("term", ["loss_kernel", "loss_preserve", "loss_total"])
def test_losses_of_every_update_equal_golden(trainer, golden, variant, dtype, term):
    expected = golden[f"{variant}.{term}"]
    # Relative to the run's scale: preservation starts at an exact zero.
    error = (trainer.column(term) - expected).abs().max() / expected.abs().max()
    assert error <= (1e-9 if dtype == torch.float64 else 1e-5)


def test_rates_of_every_update_equal_golden(trainer, golden):
    torch.testing.assert_close(trainer.column("lr_used"), golden["lr_used"], rtol=1e-12, atol=1e-24)


def test_kernel_parameters_that_entered_the_loss_equal_golden(trainer, golden, variant, dtype):
    expected = golden[f"{variant}.kernel_params_used"]
    error = (trainer.column("kernel_params_used") - expected).abs().max()
    assert error <= TOLERANCE[dtype]


def test_student_tensors_equal_golden(trainer, golden, kind, variant, dtype):
    moments = {
        "grad_step1.": trainer.first_gradient,
        "after_step1.": trainer.after_first,
        f"{variant}.final.": state_of(trainer.model.student),
    }
    stored = [prefix for prefix in moments if group(golden, prefix)]
    assert {"grad_step1.", f"{variant}.final."} <= set(stored)
    for prefix in stored:
        ours, expected = in_golden_names(kind, moments[prefix]), group(golden, prefix)
        assert set(ours) == set(expected)
        for name, full in expected.items():
            value = without_key_bias(name, full)
            error = (without_key_bias(name, ours[name]).to(torch.float64) - value).abs().max()
            # Gradients differ in size by orders of magnitude, weights are all of order one.
            scale = value.abs().max() if prefix == "grad_step1." else 1.0
            assert error <= TOLERANCE[dtype] * scale, f"{prefix}{name}: {error:.2g}"


def without_key_bias(name, tensor):
    """Drop the key third of an attention bias: its gradient is zero but for rounding noise."""
    if re.search(r"attn\.in_proj_bias$", name):
        third = len(tensor) // 3
        return torch.cat([tensor[:third], tensor[2 * third :]])
    return tensor
