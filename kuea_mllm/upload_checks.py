"""Whether a directory is fit to be shared, and what of it is uploaded (no network)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kuea_mllm.errors import UserError
from kuea_mllm.io import read_json
from kuea_mllm.model_card import base_id, is_machine_path, public_record, read_front_matter
from kuea_mllm.model_files import check_complete, is_weight_file, tensor_entries, weight_files

KINDS = ("tower", "mllm", "lora")

CARD_FILE = "README.md"
_RECORD = "kuea.json"
_LORA_CONFIG = "adapter_config.json"
_INDEX_SUFFIX = ".index.json"
_UNFINISHED = (".unfinished", ".diverged")
_LEFT_HERE = (".partial", ".incomplete", ".tmp", ".lock", ".log", ".pyc")
# Vocabularies: words that begin with a slash are no paths.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")
# Where transformers noted what a file was loaded from; nothing reads it.
_LOADED_FROM = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file")
_TEXTS = (".md", ".txt", ".yaml", ".yml")
_HOME = re.compile(r"/(?:(?:home|Users)/[^/\s`'\"]+|root)/[^\s`'\"]*|[A-Za-z]:\\Users\\\S*")


@dataclass(frozen=True)
class Upload:
    """A directory that passed every check.

    Attributes:
        directory: The directory; it is not changed.
        kind: "tower", "mllm" or "lora".
        fingerprint: Of the vision tower, as computed from the weights just now; of LoRA weights,
            of the tower that their record says they belong to, "" if it does not.
        files: What is uploaded: name in the repository -> file, or the content that takes the
            place of a file which names paths of this machine.
    """

    directory: Path
    kind: str
    fingerprint: str
    files: Mapping[str, Path | str]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(
            source.stat().st_size if isinstance(source, Path) else len(source.encode())
            for source in self.files.values()
        )

    @property
    def rewritten(self) -> list[str]:
        """Names of the files whose uploaded content differs from the one here."""
        return sorted(name for name, source in self.files.items() if isinstance(source, str))


def check_upload(directory: Path, *, base_model: str | None = None) -> Upload:
    """Make sure that a directory is fit to be shared; reads its weights, writes nothing.

    Args:
        directory: Directory of a tower, of a model or of LoRA weights.
        base_model: Hub id of the base, for a card that does not name it.

    Raises:
        UserError: If it is unfinished or incomplete, holds another tower than its record says, or
            has a card without licence and base.
    """
    directory = Path(directory)
    record = _read_record(directory)
    loaded = _require_complete(directory, record["kind"])
    fingerprint = _require_recorded_tower(directory, record)
    card = _checked_card(directory, base_model)
    files: dict[str, Path | str] = {}
    for name, path in _public_files(directory):
        if is_weight_file(name) and name not in loaded and not name.endswith(_INDEX_SUFFIX):
            raise UserError(
                f"file {path} is no part of the weights that are loaded and were checked.",
                "It may hold another tower; move it out of the directory.",
            )
        is_lora_config = record["kind"] == "lora" and name == _LORA_CONFIG
        files[name] = (
            _named_base(path, record, base_model) if is_lora_config else _public_content(name, path)
        )
    files[CARD_FILE] = card
    return Upload(directory, record["kind"], fingerprint, files)


def _read_record(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise UserError(f"directory {directory} does not exist.")
    for part in (directory.resolve(), *directory.resolve().parents):
        if part.name.endswith(_UNFINISHED) or ".partial-" in part.name:
            raise UserError(
                f"{directory} is no finished result: it lies in {part.name}.",
                "Wait for the command that writes it, or go on with its --resume.",
            )
    if not (directory / _RECORD).is_file():
        raise UserError(
            f"directory {directory} has no {_RECORD}.",
            "Only what `kuea-mllm align`, `lora`, `convert`, `swap` or `merge` wrote is uploaded; "
            "for other directories use `hf upload`.",
        )
    record = read_json(directory / _RECORD)
    kind = record.get("kind") if isinstance(record, dict) else None
    if kind not in KINDS:
        raise UserError(
            f"file {directory / _RECORD} is of kind {kind!r}; only {', '.join(KINDS[:-1])} and "
            f"{KINDS[-1]} are uploaded."
        )
    return dict(record)


def _require_complete(directory: Path, kind: str) -> list[str]:
    """Return the weight files, after making sure that nothing that a loader needs is missing."""
    from kuea_mllm.towers.files.checkpoints import OPEN_CLIP_WEIGHTS, is_open_clip_repository

    if kind == "tower" and is_open_clip_repository(directory):
        return [name for name in OPEN_CLIP_WEIGHTS if (directory / name).is_file()]
    if kind == "lora":
        from kuea_mllm.adapters.lora_directory import WEIGHTS_FILE, read_lora_directory

        read_lora_directory(directory)
        return [WEIGHTS_FILE]
    # Reads every shard's header, and so notices one that is cut short.
    tensor_entries(directory)
    if kind == "mllm":
        check_complete(directory)
    for name in ("config.json", *(["preprocessor_config.json"] if kind == "tower" else [])):
        if not (directory / name).is_file():
            raise UserError(f"{directory} is incomplete: {name} is missing.")
    return weight_files(directory)


def _require_recorded_tower(directory: Path, record: Mapping[str, Any]) -> str:
    if record["kind"] == "mllm":
        from kuea_mllm.swapping.verify import verify_model

        verification = verify_model(directory)
        if verification.problems or verification.fingerprint is None:
            first = next(iter(verification.problems), "its tower is not on this machine.")
            raise UserError(
                f"{directory} is not what its {_RECORD} says: {first}",
                f"`kuea-mllm verify {directory}` shows all that was found.",
            )
        return verification.fingerprint
    if record["kind"] == "lora":
        return _require_recorded_lora(directory, record)
    from kuea_mllm.towers.reading.load import load_tower

    fingerprint = load_tower(directory).fingerprint
    if fingerprint != record.get("fingerprint"):
        raise UserError(
            f"{directory} holds vision tower {fingerprint}, but its {_RECORD} records "
            f"{record.get('fingerprint')}.",
            "Its weights were changed after it was written; write it again.",
        )
    return fingerprint


def _require_recorded_lora(directory: Path, record: Mapping[str, Any]) -> str:
    from kuea_mllm.adapters.lora_directory import describe_tensors, read_lora_directory

    if describe_tensors(read_lora_directory(directory).tensors) != record.get("tensors"):
        raise UserError(
            f"{directory} holds other tensors than its {_RECORD} records.",
            "Its weights were changed after it was written; write it again.",
        )
    base = record.get("base")
    found = base.get("vision_tower") if isinstance(base, Mapping) else None
    return found if isinstance(found, str) else ""


def _checked_card(directory: Path, base_model: str | None) -> Path | str:
    """Return the card, or its content with the base that it does not name."""
    path = directory / CARD_FILE
    if not path.is_file():
        raise UserError(
            f"{directory} has no model card: {CARD_FILE} is missing.",
            "Write one that states license and base_model between two lines `---` at its top.",
        )
    written = text = path.read_text(encoding="utf-8")
    metadata = read_front_matter(text)
    stated = metadata.get("base_model")
    names = [stated] if isinstance(stated, str) else stated
    if base_model and names and base_model not in names:
        raise UserError(
            f"file {path} names the base model {', '.join(names)}, not {base_model}.",
            "Correct the card, or leave the option out.",
        )
    if base_model and not stated and metadata:
        text = text.replace("---\n", f"---\nbase_model: {json.dumps(base_model)}\n", 1)
        metadata = read_front_matter(text)
    for key, example in (("license", "mit"), ("base_model", "openai/clip-vit-large-patch14")):
        if not metadata.get(key):
            option = (
                ", or run `kuea-mllm push` with --base-model OWNER/NAME"
                if key == "base_model"
                else ""
            )
            raise UserError(
                f"file {path} does not state {key}, without which nobody may rely on it.",
                f"Add a line such as `{key}: {example}` between the two `---` at its top{option}.",
            )
    return path if text == written else text


def _public_files(directory: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not is_hidden and not path.name.endswith((*_LEFT_HERE, "~")):
            yield name.as_posix(), path


def _public_content(name: str, path: Path) -> Path | str:
    """Return the file itself, or its content without paths of this machine if it names any."""
    if path.suffix in _TEXTS:
        if found := _HOME.search(path.read_text(encoding="utf-8", errors="replace")):
            raise UserError(
                f"file {path} names a path of this machine: {found.group()}.", "Take it out."
            )
        return path
    is_settings = path.suffix == ".json" and not name.endswith(_INDEX_SUFFIX)
    if not is_settings or path.name in _VOCABULARIES:
        return path
    content = read_json(path)
    public = public_record(content) if path.name == _RECORD else _without_origin(content)
    key = _key_of_path(public)
    if key is not None:
        raise UserError(
            f"file {path}, key {key}, is a path of this machine, where the model would look for "
            "something that others do not have.",
            "A LLaVA in its authors' layout keeps its tower that way: upload its Hugging Face form "
            "(`kuea-mllm convert SRC DST --mllm llava`).",
        )
    if public == content:
        return path
    return json.dumps(public, indent=2, ensure_ascii=False) + "\n"


def _named_base(path: Path, record: Mapping[str, Any], base_model: str | None) -> Path | str:
    """Return the configuration of LoRA weights with the base as others find it."""
    content, base = read_json(path), record.get("base")
    known = base_model or (base_id(base) if isinstance(base, Mapping) else None)
    if known is None or content.get("base_model_name_or_path") == known:
        # Whatever is not a path of this machine may stay.
        return _public_content(path.name, path)
    content["base_model_name_or_path"] = known
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _without_origin(content: Any) -> Any:
    if isinstance(content, dict):
        return {
            key: _without_origin(value)
            for key, value in content.items()
            if not (key in _LOADED_FROM and is_machine_path(value))
        }
    return [_without_origin(entry) for entry in content] if isinstance(content, list) else content


def _key_of_path(content: Any, key: str = "") -> str | None:
    if isinstance(content, dict):
        entries = [(f"{key}.{name}".lstrip("."), value) for name, value in content.items()]
    elif isinstance(content, list):
        entries = [(f"{key}[{index}]", value) for index, value in enumerate(content)]
    else:
        return key if is_machine_path(content) else None
    found = (_key_of_path(value, name) for name, value in entries)
    return next((name for name in found if name is not None), None)
