"""Which layers of a model take LoRA: by place in the model, never by name alone.

PEFT matches names everywhere in a model. A tower has layers of the same names as a language model,
and got LoRA too in many a published run; so the full path of every layer is given to PEFT instead.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kuea_mllm.adapters.base import TuningParts
from kuea_mllm.errors import UserError


def linear_targets(
    model: nn.Module, parts: TuningParts, names: Sequence[str] | None = None
) -> dict[str, nn.Linear]:
    """Return the linear layers that take LoRA, by their path in the model.

    Args:
        model: Loaded, quantised or empty, without LoRA layers.
        parts: Where its parts are.
        names: Last names of the layers, such as "q_proj"; None takes all linear layers of the
            language model.

    Raises:
        UserError: If a name fits no layer of the language model.
    """
    inside = f"{parts.language_model}."
    outside = (*parts.whole, *parts.excluded)
    layers = {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and path.startswith(inside)
        and not any(_lies_in(path, place) for place in outside)
    }
    known = sorted({path.rpartition(".")[2] for path in layers})
    for name in names or ():
        if name not in known:
            raise UserError(
                f"key 'lora.targets': no linear layer of the language model is called {name!r}.",
                f"There are: {', '.join(known)}.",
            )
    return {
        path: layer
        for path, layer in layers.items()
        if names is None or path.rpartition(".")[2] in names
    }


def _lies_in(path: str, place: str) -> bool:
    """Whether a module is, or is inside of, a place given by its path or its last name."""
    return path == place or path.startswith(f"{place}.") or place in path.split(".")
