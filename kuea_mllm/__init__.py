"""Align CLIP vision towers with KUEA and put them to use in multimodal LLMs.

Importing this package loads neither torch nor transformers; each submodule imports what it needs.
`swap_tower`, for a model in memory, is loaded when it is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kuea_mllm.swapping import swap_tower

__version__ = "0.1.0"

__all__ = ["__version__", "swap_tower"]


def __getattr__(name: str) -> Any:
    if name == "swap_tower":
        from kuea_mllm.swapping import swap_tower

        return swap_tower
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
