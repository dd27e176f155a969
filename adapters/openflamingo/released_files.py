"""Opens the files of a released OpenFlamingo; tensors are read from disk when they are used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from kuea_mllm.adapters.openflamingo import keys
from kuea_mllm.errors import UserError
from kuea_mllm.io import read_json
from kuea_mllm.towers.files.checkpoints import read_checkpoint_file
from kuea_mllm.towers.files.shards import loaded_shards, open_shard

# What a training checkpoint keeps beside the weights (fact sheet, section 4).
_WEIGHTS_IN_TRAINING = "model_state_dict"


class Renamed(Mapping[str, Tensor]):
    """Tensors of one or more files under other names.

    Args:
        places: New name -> (content of the file, name in it).
    """

    def __init__(self, places: Mapping[str, tuple[Mapping[str, Tensor], str]]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> Tensor:
        content, old = self._places[name]
        return content[old]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def open_checkpoint(path: Path) -> Renamed:
    """Open the trained part: a `.pt` or `.safetensors` file, whole training state or weights alone.

    Returns:
        Its tensors under plain names (no "module." in front).

    Raises:
        UserError: If it is missing, damaged, or holds anything but tensors.
    """
    if not path.is_file():
        raise UserError(
            f"there is no checkpoint {path}.",
            "Give the checkpoint.pt of the release, e.g. of OpenFlamingo-3B-vitl-mpt1b.",
        )
    if path.suffix == ".safetensors":
        content: Mapping[str, Any] = open_shard(path)
    else:
        content = read_checkpoint_file(path)
        content = content.get(_WEIGHTS_IN_TRAINING, content)
    for name, value in content.items() if path.suffix != ".safetensors" else ():
        if not isinstance(value, Tensor):
            raise UserError(f"file {path}: {name} is a {type(value).__name__}, not a tensor.")
    plain = keys.strip_wrappers(content)
    return Renamed({short: (content, name) for short, name in plain.items()})


def open_language_model(directory: Path) -> tuple[Mapping[str, Any], Renamed]:
    """Open a released language model: its configuration and its tensors, in shards or not.

    The code that such a directory carries is never run.

    Raises:
        UserError: If configuration or weights are missing or damaged, or a tensor comes twice.
    """
    config = read_json(directory / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"file {directory / 'config.json'} does not hold a JSON object.")
    places: dict[str, tuple[Mapping[str, Tensor], str]] = {}
    for file in loaded_shards(directory):
        content = open_shard(directory / file)
        for name in content:
            if name in places:
                raise UserError(f"{directory} holds {name} twice, the second time in {file}.")
            places[name] = (content, name)
    return config, Renamed(places)
