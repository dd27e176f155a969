"""Where the tensors of a loaded model lie on disk, whatever their names there are.

Files are named by the release of transformers that wrote them (`language_model.model.*`), models by
the one that loads them (`model.language_model.*`). So a part of a model is looked for by the names
and shapes of all its tensors together; the name of a single one decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kuea_mllm.adapters.base import TuningParts
from kuea_mllm.errors import UserError
from kuea_mllm.model_files import TensorEntry, tensor_entries

# Stored by older releases, computed from the configuration today.
_IGNORED = (".inv_freq", ".position_ids")
# With fewer tensors than this, what a part is called must agree too.
_FEW = 8


def locate_parts(base: Path, model: nn.Module, parts: TuningParts) -> dict[str, TensorEntry]:
    """Find language model, projector and output layer of a model among the tensors on disk.

    Args:
        base: Model directory.
        model: The model that it is loaded into; may be empty (on the meta device).
        parts: Where its parts are.

    Returns:
        Name in the model -> place on disk. An output layer that is tied to the embedding is left
        out, whether or not the files hold it.

    Raises:
        UserError: If the weights do not hold a part that the configuration describes.
    """
    entries = tensor_entries(base)
    state: Mapping[str, Tensor] = model.state_dict()
    places: dict[str, TensorEntry] = {}
    for part in (parts.language_model, *parts.projector, parts.output_head):
        shapes = {
            name.removeprefix(f"{part}."): tuple(tensor.shape)
            for name, tensor in state.items()
            if name.startswith(f"{part}.")
        }
        if not shapes or (part == parts.output_head and is_tied(model, parts)):
            continue
        prefix = _find(entries, shapes, part, base)
        places |= {f"{part}.{name}": entries[prefix + name] for name in shapes}
    return places


def is_tied(model: nn.Module, parts: TuningParts) -> bool:
    """Say whether the output layer has the weights of the embedding."""
    module: Any = model
    configs = [module.config]
    if hasattr(module.config, "get_text_config"):
        configs.append(module.config.get_text_config())
    # transformers asks the outermost configuration; that of the text may say otherwise.
    if getattr(configs[0], "tie_word_embeddings", None) is not None:
        stated = bool(configs[0].tie_word_embeddings)
    else:
        stated = any(getattr(config, "tie_word_embeddings", False) for config in configs)
    head = module.get_submodule(parts.output_head)
    embedding = module.get_input_embeddings()
    return stated or getattr(head, "weight", None) is embedding.weight


def _find(
    entries: Mapping[str, TensorEntry], shapes: Mapping[str, tuple[int, ...]], part: str, base: Path
) -> str:
    """Return what stands before the names of a part on disk."""
    if _miss(entries, shapes, f"{part}.") is None:
        return f"{part}."
    anchor = max(shapes, key=lambda name: (len(shapes[name]), name))
    prefixes = {name.removesuffix(anchor) for name in entries if name.endswith(anchor)}
    called = part.rpartition(".")[2]
    candidates = sorted(
        prefix
        for prefix in prefixes
        if (not prefix or prefix.endswith("."))
        and (len(shapes) >= _FEW or prefix.rstrip(".").rpartition(".")[2] == called)
    )
    misses = {prefix: _miss(entries, shapes, prefix) for prefix in candidates}
    fitting = [prefix for prefix, miss in misses.items() if miss is None]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(
            f"the weights of {base} hold several parts that could be {part}: below "
            f"{', '.join(prefix or 'the top' for prefix in fitting)}.",
            "Load the model with transformers and save_pretrained() it to a new directory.",
        )
    found = "; ".join(f"below {prefix or 'the top'}: {miss}" for prefix, miss in misses.items())
    raise UserError(
        f"the weights of {base} do not hold {part} as its config.json describes it "
        f"({found or f'no tensor is named *{anchor}'}).",
        "The layout may be unknown here: load the model with transformers and save_pretrained() it "
        "to a new directory. A quantised directory cannot be merged into.",
    )


def _miss(
    entries: Mapping[str, TensorEntry], shapes: Mapping[str, tuple[int, ...]], prefix: str
) -> str | None:
    """Return what is wrong with a place; None if all of the part is there, and nothing else."""
    for name, shape in shapes.items():
        entry = entries.get(prefix + name)
        if entry is None:
            return f"{name} is missing"
        if entry.shape != shape:
            return f"{name} has shape {entry.shape}, expected {shape}"
    # Beside the part, other things may lie at the same level; inside of it, nothing else may.
    own = {name.split(".")[0] for name in shapes}
    for full_name in entries:
        name = full_name.removeprefix(prefix)
        is_inside = full_name.startswith(prefix) and name.split(".")[0] in own
        if is_inside and name not in shapes and not name.endswith(_IGNORED):
            return f"{name} is no part of it"
    return None
