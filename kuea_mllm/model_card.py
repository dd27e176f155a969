"""What model cards share: front matter for the Hub, tables, and names without paths of a machine.

A record (`kuea.json`) holds paths so that a command can be repeated where it ran. On another
machine they say nothing, and they tell more about their owner than the owner may want to publish.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

CARD_FILE = "README.md"
HUB_URL = "https://huggingface.co"
# How a card calls the place it lies in; the upload puts the repository's name there.
HERE = "path/to/this/directory"
CITATION = """\
```bibtex
@inproceedings{gong2025kuea,
  title     = {Kernel-based Unsupervised Embedding Alignment for Enhanced Visual Representation
               in Vision-language Models},
  author    = {Gong, Shizhan and Jiang, Yankai and Dou, Qi and Farnia, Farzan},
  booktitle = {Proceedings of the 42nd International Conference on Machine Learning},
  year      = {2025},
  note      = {arXiv:2506.02557}
}
```"""

# What the Hub reads about a licence; taken over from the card of a base as they are.
LICENSE_KEYS = ("license", "license_name", "license_link")
# Of a base's card: what still holds for a model made from it.
_INHERITED = (*LICENSE_KEYS, "language", "pipeline_tag")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_CACHE = re.compile(r"models--([A-Za-z0-9][\w.-]*?)--([A-Za-z0-9][\w.-]*)")
_WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]")
# An absolute path (or one below the home directory) inside of a sentence; no part of a URL or of
# a fraction such as images/s.
_PATH_IN_TEXT = re.compile(r"(?<![\w.~:/<-])(?:~?/[\w.+@-]+(?:/[\w.+@-]*)*|[A-Za-z]:\\[^\s'\"]+)")
_PATH_KEYS = ("path",)


def hub_id(reference: object) -> str | None:
    """Return the Hub id ("owner/name") that a reference stands for, None if it is only a path.

    A directory in the cache of huggingface_hub stands for the repository it was fetched from.
    Names that exist as a path here are paths, whatever they look like.
    """
    if not isinstance(reference, str):
        return None
    cached = _HUB_CACHE.search(reference)
    if cached:
        return f"{cached.group(1)}/{cached.group(2)}"
    if not _HUB_ID.fullmatch(reference) or Path(reference).exists():
        return None
    return reference


def public_name(reference: str) -> str:
    """Return what to call a source in public: its Hub id, or the last part of its path."""
    return hub_id(reference) or last_part(reference)


def last_part(path: str) -> str:
    """Return the last part of a path of any operating system."""
    windows = _WINDOWS_PATH.match(path) is not None
    return (PureWindowsPath(path) if windows else PurePosixPath(path)).name or path


def base_id(base: Mapping[str, Any]) -> str | None:
    """Return the Hub id of a base as records name it (`reference`, `path`), None if it has none."""
    reference, path = base.get("reference"), base.get("path")
    # "models/llava" looks like a Hub id; that it ends the path tells that it is none.
    if isinstance(reference, str) and str(path).endswith(f"/{reference}"):
        return hub_id(str(path))
    return hub_id(reference)


def first_base(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the base that the first of several steps (imports, swaps) started from."""
    history = manifest.get("history")
    earliest = history[0] if isinstance(history, list) and history else manifest
    for record in (earliest, manifest):
        base = record.get("base") if isinstance(record, Mapping) else None
        if isinstance(base, Mapping) and base:
            return base
    return {}


def base_card_metadata(base: Path) -> dict[str, Any]:
    """Return what the card of a base model says that also holds for a model made from it.

    Args:
        base: Directory of the base model; its README.md may be absent.

    Returns:
        Licence, language and task. To be kept in the manifest under "base_card".
    """
    path = base / CARD_FILE
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    content = read_front_matter(text)
    return {key: content[key] for key in _INHERITED if content.get(key)}


def is_machine_path(value: object) -> bool:
    """Say whether a value is nothing but a path of one machine, absolute or below its home."""
    return isinstance(value, str) and (
        _WINDOWS_PATH.match(value) is not None
        or (value.startswith("/") and len(PurePosixPath(value).parts) > 1 and "\n" not in value)
        or value.startswith("~/")
    )


def public_record(value: Any) -> Any:
    """Return a copy of a record (any JSON value) in which no path of a machine is left.

    Hub ids stay, paths become their last part, entries named "path" go, and command lines and
    sentences keep everything but the folders in them.
    """
    if isinstance(value, Mapping):
        named = {str(key): entry for key, entry in value.items() if key not in _PATH_KEYS}
        return {
            key: _public_command(entry) if key == "command" else public_record(entry)
            for key, entry in named.items()
        }
    if isinstance(value, list | tuple):
        return [public_record(entry) for entry in value]
    return _public_text(value) if isinstance(value, str) else value


def front_matter(metadata: Mapping[str, Any]) -> str:
    """Return the YAML block at the top of a card; entries that are None or empty are left out."""
    lines = ["---"]
    for key, value in metadata.items():
        if isinstance(value, list | tuple):
            lines += [f"{key}:", *(f"- {json.dumps(entry)}" for entry in value)] if value else []
        elif value is not None:
            # A JSON string is a YAML string, whatever it contains.
            lines.append(f"{key}: {json.dumps(value)}")
    return "\n".join([*lines, "---"])


def read_front_matter(text: str) -> dict[str, Any]:
    """Return the metadata of a card, empty if it has none that can be read."""
    import yaml

    parts = text.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        content = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def license_metadata(stated: Mapping[str, Any], base: str | None) -> dict[str, str]:
    """Return the licence entries of a derived model.

    Weights inherit the licence of what they are derived from: as stated by the record or by the
    base's own card, else as a link to the base.

    Args:
        stated: `license`, and perhaps `license_name` and `license_link`.
        base: Hub id of the base, None if it has none.
    """
    found = {key: str(stated[key]) for key in LICENSE_KEYS if stated.get(key)}
    if "license" in found:
        return found
    link = {"license_link": f"{HUB_URL}/{base}"} if base else {}
    return {"license": "other", "license_name": "same-as-base-model", **link}


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Return a Markdown table; fractions are shown with four digits."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for row in rows:
        shown = (f"{entry:.4g}" if isinstance(entry, float) else entry for entry in row)
        lines.append(f"| {' | '.join(cell(entry) for entry in shown)} |")
    return "\n".join(lines)


def details(record: Mapping[str, Any], skipped: Sequence[str]) -> str:
    """Return every entry of a record that is not skipped, a section each, folded away."""
    sections = ["<details><summary>Everything that kuea.json records</summary>"]
    for key, value in record.items():
        if key not in skipped:
            shown = cell(value)
            if isinstance(value, Mapping) and value:
                # A record is exact: no rounding here.
                exact = [
                    (k, json.dumps(v) if isinstance(v, float) else v) for k, v in value.items()
                ]
                shown = table(exact, ["", ""])
            sections.append(f"### {key.replace('_', ' ').capitalize()}\n\n{shown}")
    return "\n\n".join([*sections, "</details>"])


def cell(value: object) -> str:
    """Return a value as the text of a table cell."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("|", "\\|").replace("\n", " ")


def _public_text(text: str) -> str:
    if is_machine_path(text):
        return public_name(text)
    return _PATH_IN_TEXT.sub(lambda match: public_name(match.group()), text)


def _public_command(command: Any) -> Any:
    if not isinstance(command, str):
        return public_record(command)
    try:
        words = shlex.split(command)
    except ValueError:
        return _public_text(command)
    return shlex.join(_public_word(word) for word in words)


def _public_word(word: str) -> str:
    # --option=/a path/with spaces is one word, so that its folders cannot be told from its name.
    name, separator, value = word.partition("=")
    if separator and is_machine_path(value):
        return f"{name}={public_name(value)}"
    return _public_text(word)
