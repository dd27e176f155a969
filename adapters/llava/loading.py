"""Loads a LLaVA-1.5 directory exactly as asked: no other dtype, device or weights as a fallback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kuea_mllm.adapters.loading import failures_named, load_model, resolve_device, resolve_dtype


def load_model_and_tokenizer(
    loader: Any, model_dir: Path, *, dtype: str, device: str
) -> tuple[Any, Any]:
    """Load model and tokenizer of a directory.

    Args:
        loader: `LlavaForConditionalGeneration`, or the class of a variant.
        model_dir: Complete directory.
        dtype: "float32", "float16" or "bfloat16".
        device: "cpu", "cuda", "cuda:<index>" or "mps".

    Returns:
        The model in evaluation mode on its device, and its tokenizer.

    Raises:
        UserError: If the directory, the dtype or the device is not usable.
        EnvironmentFailure: If the device is too small.
    """
    torch_dtype, torch_device = resolve_dtype(dtype), resolve_device(device)
    with failures_named(model_dir, torch_device):
        # The quick part first: an unreadable tokenizer is then found in a second.
        tokenizer = load_tokenizer(model_dir)
        model = load_model(loader, model_dir, dtype=torch_dtype, device=torch_device)
        return model, tokenizer


def load_tokenizer(model_dir: Path) -> Any:
    """Load the tokenizer of a directory, its files alone."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
