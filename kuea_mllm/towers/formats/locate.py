"""Find a tower among the tensors of a whole model, by the names and shapes of all its parts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel
from transformers.initialization import no_init_weights

from kuea_mllm.errors import TowerMismatch
from kuea_mllm.model_files import TensorEntry
from kuea_mllm.towers.formats import keys

# SigLIP's pooling head and CLIP's projection: no MLLM reads them, and most do not keep them.
OPTIONAL = ("head.", keys.PROJECTION)

_ANCHOR = "embeddings.patch_embedding.weight"
_CLASSES: dict[str, tuple[Any, Any]] = {
    "clip": (CLIPVisionConfig, CLIPVisionModel),
    "siglip": (SiglipVisionConfig, SiglipVisionModel),
}


def expected_shapes(family: str, vision_config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a tower, by canonical name.

    Args:
        family: "clip" or "siglip".
        vision_config: As in `TowerSlot.vision_config`.

    Returns:
        The shapes; SigLIP's pooling head is among them unless the configuration leaves it out.
    """
    config_class, model_class = _CLASSES[family]
    skipped = {"model_type", "transformers_version", "architectures", "dtype"}
    config = config_class(**{k: v for k, v in vision_config.items() if k not in skipped})
    with torch.device("meta"), no_init_weights():
        model = model_class(config)
    return {
        name.removeprefix(keys.HF_PREFIX): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not name.endswith(keys.IGNORED_SUFFIX)
    }


def locate_tensors(
    entries: Mapping[str, TensorEntry],
    expected: Mapping[str, tuple[int, ...]],
    *,
    module: str,
    where: str,
) -> tuple[str, dict[str, TensorEntry]]:
    """Find the one place where all tensors of a tower lie.

    Every prefix is tried below which the patch embedding lies. All names and shapes must agree;
    the pooling head may be absent. Older releases write another prefix than the module's path, so
    the path only decides where several places fit.

    Args:
        entries: All tensors of the model, by full name.
        expected: Shapes by canonical name; see `expected_shapes`.
        module: Dotted path of the tower's module in the loaded model.
        where: What to call the model in messages.

    Returns:
        What stands before the canonical names, and the entries by canonical name.

    Raises:
        TowerMismatch: If there is no such place, or several fit; the nearest miss is named.
    """
    prefixes = sorted(name.removesuffix(_ANCHOR) for name in entries if name.endswith(_ANCHOR))
    # "a_embeddings.patch..." ends with the anchor too, but is no tensor of that name.
    prefixes = [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]
    misses = {prefix: _miss(entries, expected, prefix) for prefix in prefixes}
    fitting = [prefix for prefix, miss in misses.items() if miss is None]
    if len(fitting) > 1:
        likeness = {prefix: _common_end(prefix, module) for prefix in fitting}
        best = max(likeness.values())
        nearest = [prefix for prefix in fitting if likeness[prefix] == best]
        fitting = nearest if best and len(nearest) == 1 else fitting
    if len(fitting) == 1:
        prefix = fitting[0]
        names = (name for name in expected if prefix + name in entries)
        return prefix, {name: entries[prefix + name] for name in names}
    if fitting:
        raise TowerMismatch(
            f"{where} holds several towers of that shape ({', '.join(fitting)}), and none is at "
            f"{module}.",
            "Its adapter must say which one is meant.",
        )
    if not misses:
        raise TowerMismatch(
            f"no vision tower was found in the weights of {where}: no tensor is named *{_ANCHOR}.",
            "The directory may hold only a part of the model, such as its language model.",
        )
    found = "; ".join(f"below {prefix or 'the top'}: {miss}" for prefix, miss in misses.items())
    raise TowerMismatch(
        f"no vision tower in the weights of {where} is the one its config.json describes "
        f"({found}).",
        "Configuration and weights do not belong together; restore the directory.",
    )


def _miss(
    entries: Mapping[str, TensorEntry], expected: Mapping[str, tuple[int, ...]], prefix: str
) -> str | None:
    for name, shape in expected.items():
        entry = entries.get(prefix + name)
        if entry is None:
            if not name.startswith(OPTIONAL):
                return f"{name} is missing"
        elif entry.shape != shape:
            return f"{name} has shape {entry.shape}, expected {shape}"
    # More blocks than the configuration says, or LoRA matrices: an exchange of the known tensors
    # alone would leave a mixture. At the top level the rest of the model lies beside the tower.
    own = {name.split(".")[0] for name in expected}
    for full_name in entries:
        name = full_name.removeprefix(prefix)
        if not full_name.startswith(prefix) or name in expected or name.startswith(OPTIONAL):
            continue
        if name != keys.IGNORED_SUFFIX and (prefix or name.split(".")[0] in own):
            return f"{name} is no part of such a tower"
    return None


def _common_end(prefix: str, module: str) -> int:
    """Count the path components that agree from the end; older layouts add a `vision_model`."""
    wanted = module.split(".")[::-1]
    path = prefix.rstrip(".")
    counts = []
    for candidate in (path, path.removesuffix(".vision_model")):
        pairs = zip(candidate.split(".")[::-1], wanted, strict=False)
        agreeing = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
        counts.append(sum(1 for _ in agreeing))
    return max(counts)
