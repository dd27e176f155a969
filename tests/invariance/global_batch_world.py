"""A tiny alignment through the real trainer, for any number of processes; also what each runs.

`python global_batch_world.py RESULT CASE...` is one process of a group (torchrun's variables).
"""

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from kuea_mllm.alignment.targets import LiveTargets
from kuea_mllm.alignment.trainer import AlignmentModel, AlignmentTrainer
from kuea_mllm.config.align import OptimConfig, RuntimeConfig
from kuea_mllm.features import Features
from kuea_mllm.kernels import CosineKernel, GaussianKernel, PolynomialKernel, SumKernel
from kuea_mllm.objectives import (
    CkaTerm,
    DistillTerm,
    FeatureTerm,
    KernelTerm,
    Objective,
    PatchDistillTerm,
    PatchKernelTerm,
    PatchPreservationTerm,
    PreservationTerm,
)
from kuea_mllm.training.distributed import init_if_launched, is_main, leave, mean_over_processes

SIZE, WIDTH, EMBEDDING, TEACHER = 32, 24, 16, 20
BATCH, STEPS, IMAGES, LAYER = 12, 20, 40, -2
CPU = torch.device("cpu")


@dataclass
class Outcome:
    """What a run gave: total loss of every step, each term of every step, trained parameters."""

    losses: torch.Tensor
    terms: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    start: dict[str, torch.Tensor] = field(repr=False)


class Pictures(torch.utils.data.Dataset):
    def __init__(self, dtype):
        generator = torch.Generator().manual_seed(0)
        # Coarse patterns: plain noise looks the same to a tower wherever it is drawn.
        coarse = 2 * torch.randn(IMAGES, 3, 4, 4, generator=generator, dtype=torch.float64)
        self.pixels = nn.functional.interpolate(coarse, size=SIZE).to(dtype)

    def __len__(self):
        return IMAGES

    def __getitem__(self, draw):
        return {"pixels": self.pixels[draw % IMAGES], "index": draw % IMAGES}


class Student(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(1)
        config = CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=8,
            projection_dim=EMBEDDING,
            attn_implementation="sdpa",  # eager computes its softmax in float32
        )
        self.model = CLIPVisionModelWithProjection(config).to(dtype)
        with torch.no_grad():  # off the symmetric start, where many gradients are tiny
            for parameter in self.model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))

    def features(self, pixels, layer=None):
        output = self.model(pixel_values=pixels, output_hidden_states=layer is not None)
        tokens = None if layer is None else output.hidden_states[layer][:, 1:]
        return Features(output.image_embeds, tokens)


class Teacher(nn.Module):
    def __init__(self, dtype, seed):
        super().__init__()
        torch.manual_seed(seed)
        config = Dinov2Config(
            hidden_size=TEACHER,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=16,
            attn_implementation="sdpa",
        )
        self.model = Dinov2Model(config).to(dtype)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))

    def features(self, pixels01, *, patches):
        tokens = self.model(pixel_values=pixels01).last_hidden_state
        return Features(tokens[:, 0], tokens[:, 1:] if patches else None)


def kuea(parametrisation, dtype):
    # Far from the teacher's: preservation is a small difference of nearly equal embeddings, and the
    # rounding of a loss that consists of little else would be measured instead of the method.
    kernel = PolynomialKernel(
        1.0, 0.1, trainable=True, parametrisation=parametrisation, dtype=dtype
    )
    return [
        KernelTerm(kernel, PolynomialKernel(1 / TEACHER, 1.0, dtype=dtype), weight=0.5),
        PreservationTerm(weight=1.0),
    ]


def every_term(dtype):
    """All terms at once, each with the parameters it can have, and two teachers."""
    torch.manual_seed(5)
    student = SumKernel(
        [
            (0.7, PolynomialKernel(0.05, 0.3, trainable=True, dtype=dtype)),
            (0.3, GaussianKernel(3.0, trainable=True, parametrisation="direct", dtype=dtype)),
        ]
    )
    teacher = PolynomialKernel(1 / TEACHER, 1.0, dtype=dtype)
    patch_kernel = PolynomialKernel(0.03, 0.4, trainable=True, dtype=dtype)
    widths = [EMBEDDING, TEACHER, TEACHER]
    return [
        KernelTerm(student, teacher, weight=0.5),
        PreservationTerm(weight=1.0),
        FeatureTerm(EMBEDDING, TEACHER, weight=0.2).to(dtype),
        CkaTerm(weight=0.3),
        DistillTerm(EMBEDDING, widths, weight=0.4).to(dtype),
        PatchPreservationTerm(weight=0.1),
        PatchKernelTerm(patch_kernel, CosineKernel(), weight=0.6),
        PatchDistillTerm(WIDTH, [WIDTH, TEACHER, TEACHER], weight=0.7).to(dtype),
    ]


OBJECTIVES = {
    "kuea-direct": lambda dtype: kuea("direct", dtype),
    "kuea-log": lambda dtype: kuea("log", dtype),
    "every-term": every_term,
    # Only local terms: nothing of the tower but its patch tokens gets a gradient.
    "patches-only": lambda dtype: every_term(dtype)[5:],
}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class RecordingTrainer(AlignmentTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses = []

    def training_step(self, model, *args, **kwargs):
        total = super().training_step(model, *args, **kwargs)
        # A process knows the whole loss of pooled terms, and of patch terms its own images' part.
        self.losses.append(mean_over_processes(total))
        return total


def train(objective, precision, micro_batch_size=None, *, batch_size=BATCH):
    """Train one case; call it in all processes."""
    dtype = DTYPES[precision]
    terms = Objective(OBJECTIVES[objective](dtype))
    model = AlignmentModel(Student(dtype), terms, patch_layer=LAYER)
    targets = LiveTargets(
        [Teacher(dtype, 2), Teacher(dtype, 3)],
        Student(dtype),
        CPU,
        patch_layer=LAYER if terms.reads_patches else None,
        teacher_patches=terms.reads_teacher_patches,
    )
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        trainer = RecordingTrainer(
            model,
            targets,
            Pictures(dtype),
            optim=OptimConfig(
                lr=1e-4,
                warmup_steps=3,
                batch_size=batch_size,
                steps=STEPS,
                first_update_at_full_lr=False,
            ),
            runtime=RuntimeConfig(
                device="cpu", log_every=1, micro_batch_size=micro_batch_size, compile="off"
            ),
            output_dir=Path(folder),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    names = [name for name in rows[0] if name.startswith("loss_")]
    return Outcome(
        losses=torch.stack(trainer.losses).double(),
        terms={
            name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in names
        },
        weights={name: value.detach().clone() for name, value in model.named_parameters()},
        start=start,
    )


def main():
    result, *cases = sys.argv[1:]
    init_if_launched("cpu")
    outcomes = {}
    for case in cases:
        objective, precision, micro = case.split("/")
        outcomes[case] = train(objective, precision, int(micro) or None)
    if is_main():
        torch.save({case: vars(outcome) for case, outcome in outcomes.items()}, result)
    leave()


if __name__ == "__main__":
    main()
