"""The variant *stock*: PEFT and Trainer with their defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from kuea_mllm.adapters.llava.adapter import LlavaAdapter
from kuea_mllm.tuning.collate import IGNORED
from kuea_mllm.tuning.quantised import quantization_config
from lora_parts.models import random_model
from lora_parts.samples import Samples
from lora_parts.setting import Clock, Setting


def stock(setting: Setting, samples: Samples, folder: Path) -> float:
    """Return the seconds of one pass of PEFT and Trainer with their defaults."""
    size = setting.size
    model = random_model(
        setting.base,
        dtype=setting.dtype,
        device=setting.device,
        quantization=quantization_config(
            setting.quantization,
            LlavaAdapter().tuning_parts(setting.base),
            dtype=getattr(torch, setting.dtype),
        ),
    )
    if setting.quantization != "none":
        model = peft.prepare_model_for_kbit_training(model)
    wrapped: Any = peft.get_peft_model(
        model,
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=size.rank,
            lora_alpha=2 * size.rank,
            lora_dropout=0.05,
            target_modules="all-linear",
        ),
    )
    clock = Clock(torch.device(setting.device))
    reading = LlavaAdapter().tuning_format(setting.base, max_length=size.max_length)
    trainer = Trainer(
        model=wrapped,
        args=TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=2,
            per_device_train_batch_size=size.micro_batch,
            gradient_accumulation_steps=size.accumulation,
            learning_rate=2e-4,
            bf16=setting.dtype == "bfloat16",
            gradient_checkpointing=True,
            use_cpu=setting.device == "cpu",
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=_Spliced(samples, reading.image_token_id, reading.tokens_per_image),
        data_collator=_padded(reading.encoder.pad_token_id),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.train()
    return clock.seconds


class _Spliced(Dataset[dict[str, Any]]):
    """Samples as LLaVA's own processor gives them: the image's token once for each patch."""

    def __init__(self, samples: Samples, token: int, times: int) -> None:
        self._samples, self._image, self._labels = samples, [token] * times, [IGNORED] * times

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self._samples[index]
        ids, labels = sample.input_ids, sample.labels
        if sample.pixels is not None:
            ids, labels = self._image + ids[1:], self._labels + labels[1:]
        return {"input_ids": ids, "labels": labels, "pixel_values": sample.pixels}


def _padded(pad: int) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]:
    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        def together(name: str, value: int) -> Tensor:
            tensors = [torch.tensor(row[name]) for row in rows]
            return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

        batch = {"input_ids": together("input_ids", pad), "labels": together("labels", IGNORED)}
        batch["attention_mask"] = (batch["input_ids"] != pad).long()
        if pixels := [row["pixel_values"] for row in rows if row["pixel_values"] is not None]:
            batch["pixel_values"] = torch.stack(pixels)
        return batch

    return collate
