"""The variant *ours*: the trainer that `kuea-mllm lora` builds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kuea_mllm.training.checkpoints import CheckpointStore
from kuea_mllm.training.run_directory import RunDirectory
from kuea_mllm.tuning.assemble import assemble
from kuea_mllm.tuning.inputs import TuningInputs
from kuea_mllm.tuning.packing import PackedExamples
from lora_parts.models import RandomLlava
from lora_parts.samples import PLACEHOLDER, Samples
from lora_parts.setting import Clock, Setting


class SyntheticInputs(TuningInputs):
    """Inputs whose samples are ready."""

    @property
    def examples(self) -> Any:
        """The samples by position, or by the positions of a row."""
        samples: Any = self.mixture
        return PackedExamples(samples) if self.recipe.data.packing else samples


def ours(setting: Setting, samples: Samples, folder: Path) -> float:
    """Return the seconds of one pass of our trainer."""
    adapter, recipe = RandomLlava(), setting.recipe()
    reading = adapter.tuning_format(setting.base, max_length=setting.size.max_length)
    mixture: Any = samples
    inputs = SyntheticInputs(
        recipe=recipe,
        base=setting.base,
        adapter=adapter,
        tuner=adapter,
        parts=adapter.tuning_parts(setting.base),
        format=replace(reading, encoder=_Encoder(reading.encoder.pad_token_id)),
        mixture=mixture,
        images=None,
        identity={},
        token_counts=samples.tokens.astype(np.int32) if setting.packing else None,
    )
    store = CheckpointStore(folder / "checkpoints", keep=1)
    run = RunDirectory(folder, folder, store, checkpoint=None, state={}, notes=[])
    clock = Clock(torch.device(setting.device))
    made = assemble(inputs, run, progress=False)
    made.trainer.bind_checkpoints(store, dict)
    made.trainer.add_callback(clock)
    made.trainer.train()
    made.metrics.close()
    store.close()
    return clock.seconds


@dataclass(frozen=True)
class _Encoder:
    """What a batch needs to know of an encoder."""

    pad_token_id: int
    placeholder: int = PLACEHOLDER
    max_length: int = 0

    def encode(self, record: Mapping[str, Any]) -> Any:
        raise NotImplementedError("samples are encoded already")
