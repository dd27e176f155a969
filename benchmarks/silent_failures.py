"""What each silent failure of docs/silent_failures.md costs the shipped mini LLaVA.

python benchmarks/silent_failures.py --pictures 400          # a few minutes on one core

The model and its questions are those of the mini world (docs/miniworld.md). Each failure is made by
hand in the loaded model, because the commands refuse it or warn. Printed are the relative change
of the tokens that the projector gets, and the change of the average score in points.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaForConditionalGeneration

from kuea_mllm.miniworld import ASSETS
from kuea_mllm.miniworld.llava_eval import score_llava
from kuea_mllm.miniworld.rendering import render_scenes
from kuea_mllm.miniworld.scenes import sample_scenes
from kuea_mllm.miniworld.tasks import TASKS
from kuea_mllm.miniworld.train_llava import compute_features

# Parameters whose columns are channels of the residual stream, and those that have none of them.
_READS_STREAM = (
    *("q_proj.weight", "k_proj.weight", "v_proj.weight"),
    *("fc1.weight", "position_embedding.weight"),
)
_APART_FROM_STREAM = ("q_proj.bias", "k_proj.bias", "v_proj.bias", "fc1.bias")


def use_gelu(llava: Any) -> None:
    """Run a tower that was trained with QuickGELU with GELU."""
    for block in llava.model.vision_tower.encoder.layers:
        block.mlp.activation_fn = nn.GELU()


def read_after_norm(llava: Any) -> None:
    """Take the tokens through the tower's final norm, as open_clip >= 2.23 returns them."""
    _change_states(llava, llava.model.vision_tower.post_layernorm)


def read_last_layer(llava: Any) -> None:
    """Read the last layer instead of the one before it."""
    llava.config.vision_feature_layer = -1


def read_earlier_layer(llava: Any) -> None:
    """Read one layer too early."""
    llava.config.vision_feature_layer = -3


def shift_tokens(llava: Any) -> None:
    """Keep the class token and cut the last patch: the count is right, every place is wrong."""
    _change_states(llava, lambda hidden: torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1))


def _change_states(llava: Any, change: Callable[[Tensor], Tensor]) -> None:
    read = llava.model.vision_tower.forward

    def changed(*arguments: Any, **options: Any) -> Any:
        output = read(*arguments, **options)
        output.hidden_states = tuple(change(hidden) for hidden in output.hidden_states)
        return output

    llava.model.vision_tower.forward = changed


def count_heads_wrong(llava: Any) -> None:
    """Split queries and keys into twice as many heads; no shape depends on it."""
    for block in llava.model.vision_tower.encoder.layers:
        block.self_attn.num_heads *= 2
        block.self_attn.head_dim //= 2
        block.self_attn.scale = block.self_attn.head_dim**-0.5


def normalise_as_siglip(llava: Any) -> None:
    """Give a tower with CLIP's mean and deviation images normalised with 0.5 and 0.5."""
    read = llava.model.vision_tower.forward
    settings = AutoProcessor.from_pretrained(ASSETS / "llava").image_processor
    mean, std = (
        torch.tensor(value).view(3, 1, 1) for value in (settings.image_mean, settings.image_std)
    )
    llava.model.vision_tower.forward = lambda pixel_values, *arguments, **options: read(
        ((pixel_values * std + mean) - 0.5) / 0.5, *arguments, **options
    )


def change_epsilon(llava: Any) -> None:
    """Run layer norms with 1e-6 instead of 1e-5."""
    for module in llava.model.vision_tower.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6


def round_to_float16(llava: Any) -> None:
    """Round the tower's matrices to float16."""
    _round(llava, torch.float16)


def round_to_bfloat16(llava: Any) -> None:
    """Round the tower's matrices to bfloat16."""
    _round(llava, torch.bfloat16)


def _round(llava: Any, dtype: torch.dtype) -> None:
    with torch.no_grad():
        for parameter in llava.model.vision_tower.parameters():
            parameter.copy_(parameter.to(dtype))


def take_another_basis(llava: Any) -> None:
    """Permute the channels of the residual stream: the same function, as another training's basis.

    The tower's embedding is exactly as good as before. Only what reads its tokens is lost.
    """
    tower = llava.model.vision_tower
    order = torch.randperm(tower.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if name.endswith(_READS_STREAM):
                parameter.copy_(parameter[:, order])
            elif not name.endswith(_APART_FROM_STREAM):
                parameter.copy_(parameter[order])


FAILURES: dict[str, Callable[[Any], None]] = {
    "GELU for QuickGELU": use_gelu,
    "tokens after the final norm": read_after_norm,
    "last layer (-1) read": read_last_layer,
    "one layer too early (-3) read": read_earlier_layer,
    "class token kept, last patch cut": shift_tokens,
    "twice as many heads": count_heads_wrong,
    "images normalised with 0.5, 0.5": normalise_as_siglip,
    "layer norm epsilon 1e-6": change_epsilon,
    "rounded to float16": round_to_float16,
    "rounded to bfloat16": round_to_bfloat16,
    "tower in another basis": take_another_basis,
}


def tokens_read(llava: Any) -> Tensor:
    """Return what the projector gets for some pictures."""
    import numpy as np

    scenes = sample_scenes(64, "test", seed=7)
    return compute_features(llava, render_scenes(scenes, np.random.default_rng(7))).double()


def main() -> None:
    """Measure, print a table and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=400, help="Pictures for each task.")
    parser.add_argument("--json", type=Path, help="Also write the figures to this file.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(ASSETS / "llava")
    whole = LlavaForConditionalGeneration.from_pretrained(ASSETS / "llava").eval()

    def score(llava: Any) -> float:
        scores = score_llava(llava, processor.tokenizer, pictures=options.pictures)
        return sum(scores[task.name] for task in TASKS) / len(TASKS)

    expected, reference = tokens_read(whole), score(whole)
    print(f"{'as it was trained':<36}{'':>10}{reference:>8.1f}")
    figures: dict[str, dict[str, float]] = {"as it was trained": {"average": reference}}
    for name, break_it in FAILURES.items():
        llava = copy.deepcopy(whole)
        break_it(llava)
        change = float((tokens_read(llava) - expected).norm() / expected.norm())
        average = score(llava)
        figures[name] = {"relative_change_of_tokens": change, "average": average}
        print(f"{name:<36}{change:>10.2g}{average - reference:>+8.1f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
