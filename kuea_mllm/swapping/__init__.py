"""Puts a vision tower in the place of the one an MLLM was trained with, and proves it."""

from kuea_mllm.swapping.compatibility import CompatibilityReport, inspect_fit
from kuea_mllm.swapping.drift import compare_towers
from kuea_mllm.swapping.in_memory import swap_tower
from kuea_mllm.swapping.receipt import SwapReceipt
from kuea_mllm.swapping.sources import load_any_tower
from kuea_mllm.swapping.swap import swap_mixed_files, swap_tower_files, tower_fingerprint_of
from kuea_mllm.swapping.verify import Verification, verify_model

__all__ = [
    "CompatibilityReport",
    "SwapReceipt",
    "Verification",
    "compare_towers",
    "inspect_fit",
    "load_any_tower",
    "swap_mixed_files",
    "swap_tower",
    "swap_tower_files",
    "tower_fingerprint_of",
    "verify_model",
]
