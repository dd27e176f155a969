"""Tuning of any VLM of transformers whose images take a fixed number of tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kuea_mllm.adapters.base import TuningFormat, TuningParts
from kuea_mllm.adapters.hf_vlm.adapter import inspect_base
from kuea_mllm.adapters.hf_vlm.reading import read_format
from kuea_mllm.adapters.hf_vlm.structure import conversing_class, find_tower
from kuea_mllm.adapters.loading import empty_model, failures_named
from kuea_mllm.adapters.packing import packed_again, side_by_side, without_rows
from kuea_mllm.adapters.vocabulary import read_tokenizer_files
from kuea_mllm.errors import UserError

_TOKEN_TYPES = "token_type_ids"  # noqa: S105 - a name, no secret
_PROBED_TOKENS = 4
_CLOSE = 1e-6
_OWN_ADAPTER = "Tuning it needs an adapter of its own; its tower can be swapped all the same."


def tuning_parts(base: Path) -> TuningParts:
    """Return where the parts are; see `MLLMTuner`.

    Raises:
        UserError: If language model, projector and tower do not lie beside each other.
    """
    inspect_base(base)
    model: Any = empty_model(*conversing_class(base))
    where = _name(base, model)
    tower = find_tower(model, where)
    language_model = _path_of(model, model.get_decoder(), "language model", where)
    head = _path_of(model, model.get_output_embeddings(), "output layer", where)
    for one in (tower.path, head):
        if f"{one}.".startswith(f"{language_model}.") or language_model.startswith(f"{one}."):
            raise UserError(f"{where} has {one} inside of {language_model}.", _OWN_ADAPTER)
    holder = tower.path.rpartition(".")[0]
    beside = [f"{holder}.{name}".lstrip(".") for name, _ in tower.holder.named_children()]
    projector = tuple(
        path
        for path in beside
        if path not in (tower.path, head)
        and not f"{language_model}.".startswith(f"{path}.")
        and any(True for _ in model.get_submodule(path).parameters())
    )
    rows = model.get_submodule(head).weight.shape[0]
    return TuningParts(
        language_model=language_model,
        projector=projector,
        vision_tower=tower.path,
        output_head=head,
        vocabulary_size=min(rows, max(read_tokenizer_files(base).ids) + 1),
    )


def tuning_format(base: Path, *, max_length: int) -> TuningFormat:
    """Return how samples are read; see `MLLMTuner`.

    Raises:
        UserError: If there is no chat template, or images take a varying number of tokens.
    """
    from transformers import AutoProcessor

    from kuea_mllm.adapters.hf_vlm.runtime import require_chat

    inspect_base(base)
    loader, config = conversing_class(base)
    where = f"{base} ({loader.__name__})"
    token = getattr(config, "image_token_id", None)
    if token is None:
        raise UserError(f"{where} has no token that stands for images.", _OWN_ADAPTER)
    processors: Any = AutoProcessor
    with failures_named(base, torch.device("cpu")):
        processor = processors.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    require_chat(processor, str(base))
    return read_format(processor, int(token), base, where, max_length=max_length)


def keep_to_parts(model: Any, base: Path, *, is_quantised: bool) -> nn.Module:
    """Make sure that a model's tower keeps nothing for a gradient, and its head alone makes logits.

    Args:
        model: As it was loaded.
        base: Its directory.
        is_quantised: Whether its language model is.

    Raises:
        UserError: If the model does more to its logits than its output layer.
    """
    parts = tuning_parts(base)
    # Patch embeddings may be made to ask for a gradient (`enable_input_require_grads`), and nothing
    # of the tower is to be kept for it.
    model.get_submodule(parts.vision_tower).register_forward_hook(_without_graph)
    if not is_quantised:
        _check_head(model, parts, _name(base, model))
    kept: nn.Module = model
    return kept


def hidden_states(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return what the output layer reads; see `MLLMTuner`."""
    shape = batch["input_ids"].shape
    given: dict[str, Any] = dict(batch)
    if "pixel_values" in given:
        given["pixel_values"] = given["pixel_values"].to(model.dtype)
    inner = model.base_model
    if not _takes_token_types(type(inner)):
        given = dict(without_rows(given, model.get_decoder().config._attn_implementation))
        return _run(inner, given).reshape(*shape, -1)
    lengths: Sequence[int] = ()
    if (position_ids := given.pop("position_ids", None)) is not None:
        # With token types, transformers 5.23 does not keep packed samples apart.
        ids, mask, lengths = side_by_side(given["input_ids"], position_ids)
        given |= {"input_ids": ids, "attention_mask": mask.long()}
    # Tokens of one image see each other in both directions.
    given[_TOKEN_TYPES] = (given["input_ids"] == model.config.image_token_id).long()
    output = _run(inner, given)
    return packed_again(output, lengths, shape) if lengths else output


def image_features(model: Any, pixel_values: Tensor) -> Tensor:
    """Return what the language model gets of images, (images, tokens, width)."""
    features = model.get_image_features(pixel_values=pixel_values.to(model.dtype)).pooler_output
    return features if isinstance(features, Tensor) else torch.stack(list(features))


def _run(inner: nn.Module, given: Mapping[str, Any]) -> Tensor:
    output: Tensor = inner(**given, use_cache=False).last_hidden_state
    return output


def _takes_token_types(kind: Any) -> bool:
    return _TOKEN_TYPES in inspect.signature(kind.forward).parameters


@torch.no_grad()
def _check_head(model: Any, parts: TuningParts, where: str) -> None:
    """Make sure that the output layer alone makes logits: no scale, no cap behind it."""
    ids = torch.arange(_PROBED_TOKENS, device=model.device)[None]
    expected = model(input_ids=ids, use_cache=False).logits
    head = model.get_submodule(parts.output_head)
    found = head(hidden_states(model, {"input_ids": ids}))
    # The same arithmetic twice: a cap shows even where it changes little.
    if not torch.allclose(found, expected, rtol=0, atol=_CLOSE * float(expected.abs().max())):
        raise UserError(
            f"{where} does more to its logits than its output layer {parts.output_head} (a scale, "
            "or a cap), which the loss here would leave out.",
            _OWN_ADAPTER,
        )


def _without_graph(_: nn.Module, __: Any, output: Any) -> Any:
    for name, value in output.items():
        if isinstance(value, Tensor):
            output[name] = value.detach()
        elif isinstance(value, tuple):
            output[name] = tuple(v.detach() if isinstance(v, Tensor) else v for v in value)
    return output


def _path_of(model: nn.Module, wanted: object, what: str, where: str) -> str:
    path = next((path for path, module in model.named_modules() if module is wanted), "")
    if not path:
        raise UserError(f"{where} does not say which part is its {what}.", _OWN_ADAPTER)
    return path


def _name(base: Path, model: nn.Module) -> str:
    return f"{base} ({type(model).__name__})"
