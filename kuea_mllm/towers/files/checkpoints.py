"""Read weights from files, directories and the Hugging Face Hub, without ever running a pickle."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kuea_mllm.errors import TowerError
from kuea_mllm.model_files import (
    INDEX_FILE,
    PICKLE_FILE,
    PICKLE_INDEX_FILE,
    SINGLE_FILE,
    shard_of_tensors,
)

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
FILE_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)

# As transformers chooses: the single file before the index, safetensors before pickles.
_HF_WEIGHTS = ((SINGLE_FILE, INDEX_FILE), (PICKLE_FILE, PICKLE_INDEX_FILE))
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
_CONFIGS = [
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "kuea.json",
    OPEN_CLIP_CONFIG,
]
# In the order of preference, one kind of weights is fetched and no more. transformers' and timm's
# names first; openai/clip-vit-large-patch14-336, for instance, has the old format only.
_WEIGHTS = (
    ["model*.safetensors", INDEX_FILE],
    [*(name for name in OPEN_CLIP_WEIGHTS if name.endswith(".safetensors"))],
    ["pytorch_model*.bin", PICKLE_INDEX_FILE],
    [OPEN_CLIP_WEIGHTS[-1]],
)
# How torch.load with weights_only names what it does not run.
_FOREIGN_OBJECT = re.compile(r"GLOBAL ([\w.]+)")
# "name" or "owner/name", as the Hub allows; anything else can only have been meant as a path.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_source(
    source: str | Path, *, revision: str | None = None, also: Sequence[str] = ()
) -> Path:
    """Find a source on disk, fetching it from the Hub if it is no path.

    Args:
        source: A path, or a Hub id such as "openai/clip-vit-large-patch14".
        revision: Branch, tag or commit of a Hub id.
        also: Files to fetch beside weights and configurations, where the Hub has them.

    Returns:
        An existing file or directory.

    Raises:
        TowerError: If the path does not exist or the Hub does not have it.
    """
    path = Path(source)
    if path.exists():
        return path
    name = str(source)
    if isinstance(source, Path) or not _HUB_ID.fullmatch(name) or name.endswith(FILE_SUFFIXES):
        raise TowerError(
            f"there is no file or directory {name}.",
            "Give a checkpoint file, a Hugging Face model directory or a Hub id.",
        )
    return _fetch(name, revision, also)


def read_checkpoint_file(path: Path) -> Mapping[str, Any]:
    """Read a checkpoint file into a dictionary, memory-mapped where its format allows it.

    Args:
        path: A `.safetensors` file, or a file of `torch.save`.

    Returns:
        What the file holds: usually name -> tensor, for some layouts one level deeper.

    Raises:
        TowerError: If it is unreadable, no dictionary, or needs code to be run.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path, lambda _: True)
    if not path.stat().st_size:
        raise TowerError(f"checkpoint {path} is empty (0 bytes).", "Fetch or write it again.")
    is_zip = zipfile.is_zipfile(path)
    if is_zip and _is_torchscript(path):
        raise TowerError(
            f"checkpoint {path} is a TorchScript archive (OpenAI's original download), which would "
            "have to be run to be read.",
            "Use the same weights from the Hub, such as openai/clip-vit-large-patch14.",
        )
    try:
        # Only the zip format can be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, Mapping):
        raise TowerError(
            f"checkpoint {path} holds a {type(content).__name__}, not a state dict.",
            "Save model.state_dict() instead of the model.",
        )
    return content


def read_directory_weights(directory: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Read selected tensors of a Hugging Face model directory, sharded or not.

    Args:
        directory: The directory; safetensors are preferred to `pytorch_model.bin`.
        wanted: Says by name which tensors to read; the others are not touched.

    Raises:
        UserError: If there are no weights, or a shard is missing or damaged.
    """
    for single, index in _HF_WEIGHTS:
        if (directory / single).exists():
            return _read_shard(directory / single, wanted)
        if (directory / index).exists():
            files = shard_of_tensors(directory / index)
            state: dict[str, Tensor] = {}
            for file in sorted({file for name, file in files.items() if wanted(name)}):
                state |= _read_shard(directory / file, wanted)
            return state
    raise TowerError(
        f"directory {directory} holds no weights: neither {SINGLE_FILE} nor {PICKLE_FILE} (nor an "
        "index).",
        "Give a complete Hugging Face model directory, or the checkpoint file itself.",
    )


def is_open_clip_repository(directory: Path) -> bool:
    """Tell whether a directory is to be read by its open_clip_config.json.

    Repositories that hold transformers weights as well are read by those.
    """
    weights = [name for names in _HF_WEIGHTS for name in names]
    has_hf = (directory / "config.json").exists() and any(
        (directory / name).exists() for name in weights
    )
    return (directory / OPEN_CLIP_CONFIG).exists() and not has_hf


def _read_shard(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return _read_safetensors(path, wanted)
    return {name: t for name, t in read_checkpoint_file(path).items() if wanted(name)}


def _read_safetensors(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise TowerError(
            f"checkpoint {path} is not a readable safetensors file: {error}.",
            "It is damaged or was not fully written; fetch or write it again.",
        ) from error


def _unreadable(path: Path, error: Exception) -> TowerError:
    """Say why torch.load failed; its own texts tell how to run the code in the file."""
    foreign = _FOREIGN_OBJECT.search(str(error))
    if foreign is not None:
        return TowerError(
            f"checkpoint {path} cannot be read as plain weights: it holds objects of Python "
            f"({foreign.group(1)}), which would have to be run.",
            "Save the state dict alone: torch.save(model.state_dict(), NEW_FILE).",
        )
    return TowerError(
        f"checkpoint {path} cannot be read as plain weights: it is damaged, cut short, or no file "
        f"of torch.save ({type(error).__name__}).",
        "Fetch or write it again.",
    )


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(
            "/code/" in name or name.endswith("constants.pkl") for name in archive.namelist()
        )


def _fetch(name: str, revision: str | None, also: Sequence[str]) -> Path:
    # Imported here: the Hub client costs a quarter of a second that local paths need not pay.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def download(patterns: list[str]) -> Path:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))

    try:
        for patterns in _WEIGHTS:
            directory = download([*_CONFIGS, *also, *patterns])
            if any(path for pattern in patterns for path in directory.glob(pattern)):
                break
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TowerError(
            f"{name} is no existing path, and the Hugging Face Hub did not give it: {reason[0]}",
            "Check the spelling and the revision; for gated models run `hf auth login`; offline, "
            "give a local directory.",
        ) from error
    return directory


def read_config(directory: Path) -> dict[str, Any]:
    """Read `config.json` of a Hugging Face model directory.

    Raises:
        TowerError: If it is missing, not JSON or not a JSON object.
    """
    path = directory / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TowerError(
            f"directory {directory} holds no config.json, so it is no Hugging Face model.",
            "Give the checkpoint file itself if this is an open_clip download.",
        ) from error
    except ValueError as error:
        raise TowerError(f"file {path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise TowerError(f"file {path} holds a {type(content).__name__}, not a JSON object.")
    return content
