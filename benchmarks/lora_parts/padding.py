"""How much of the batches is padding, by the order of the samples; arithmetic only."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from kuea_mllm.tuning.packing import PackedBatchSampler, padding_share
from kuea_mllm.tuning.sampler import GroupedBatchSampler
from lora_parts.samples import mixture_lengths


def padding_table(count: int = 665_298) -> dict[str, Any]:
    """Return the padding of the orders for a mixture as large as LLaVA's; arithmetic only."""
    lengths, tokens = mixture_lengths(count, max_length=2048, image_tokens=576)
    shuffled = np.random.default_rng(1).permutation(count)
    rows: dict[str, Any] = {"mean_tokens": float(tokens.mean()), "padding": {}}
    for batch_size, chunks in ((16, 8), (4, 32)):
        grouped, alike = (
            GroupedBatchSampler(
                lengths,
                batch_size=batch_size,
                world_size=1,
                accumulation=chunks,
                alike_in_length=is_alike,
            )
            for is_alike in (False, True)
        )
        mixed = np.array_split(tokens[shuffled], range(batch_size, count, batch_size))
        rows["padding"][str(batch_size)] = {
            "random": padding_share([batch.tolist() for batch in mixed]),
            "grouped": padding_share([tokens[batch].tolist() for batch in grouped]),
            "by length": padding_share([tokens[batch].tolist() for batch in alike]),
        }
    started = time.perf_counter()
    packed = PackedBatchSampler(
        lengths, tokens, max_length=2048, batch_size=1, world_size=1, accumulation=32
    )
    rows["packing"] = {
        "rows": len(packed.rows),
        "filled": float(tokens.sum() / (2048 * len(packed.rows))),
        "samples_per_row": count / len(packed.rows),
        "seconds": time.perf_counter() - started,
    }
    return rows
