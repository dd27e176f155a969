"""Where a tower that a configuration only names lies on this machine (no torch, no network)."""

from __future__ import annotations

from pathlib import Path

from kuea_mllm.model_files import INDEX_FILE, PICKLE_FILE, PICKLE_INDEX_FILE, SINGLE_FILE

_WEIGHTS = (SINGLE_FILE, INDEX_FILE, PICKLE_FILE, PICKLE_INDEX_FILE)


def local_directory(name: str, *, with_weights: bool = False) -> Path | None:
    """Return the directory of a named tower, None if it would have to be fetched.

    Looked for as loaders do: an existing path first, then the local Hugging Face cache.

    Args:
        name: Path or Hub id.
        with_weights: Whether a repository of which the cache has only the configuration (which is
            all that many programs fetch) counts as absent.
    """
    path = Path(name)
    if path.is_dir():
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
    # A path that does not exist is no valid id.
    except HFValidationError:
        return None
    if not isinstance(cached, str):
        return None
    directory = Path(cached).parent
    if with_weights and not any((directory / file).is_file() for file in _WEIGHTS):
        return None
    return directory
