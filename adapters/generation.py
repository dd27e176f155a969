"""What every runtime asks of the options of a generation (no torch)."""

from __future__ import annotations

from typing import Any

from kuea_mllm.errors import UserError


def check_generation_options(
    max_new_tokens: int, num_beams: int, temperature: float, top_p: float | None
) -> None:
    """Refuse options that are out of range; see `MLLMRuntime.generate` for what they mean.

    Raises:
        UserError: Naming the option.
    """
    if max_new_tokens < 1 or num_beams < 1:
        raise UserError(
            f"max_new_tokens ({max_new_tokens}) and num_beams ({num_beams}) must be at least 1."
        )
    if temperature < 0:
        raise UserError(f"temperature is {temperature}; 0 decodes greedily, above 0 samples.")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; it must be above 0 and at most 1.")


def generation_options(
    max_new_tokens: int, num_beams: int, temperature: float, top_p: float | None
) -> dict[str, Any]:
    """Return checked options as `generate` of transformers takes them.

    Raises:
        UserError: Naming an option that is out of range.
    """
    check_generation_options(max_new_tokens, num_beams, temperature, top_p)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "num_beams": num_beams,
        "do_sample": temperature > 0,
    }
    if temperature > 0:
        # top_k would otherwise default to 50, which nobody asked for.
        options |= {"temperature": temperature, "top_k": 0}
        options |= {} if top_p is None else {"top_p": top_p}
    return options
