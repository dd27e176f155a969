"""Uploads a finished tower, model or LoRA weights to the Hugging Face Hub, after checking them.

Every check of the directory comes before the first byte leaves the machine: it is complete, its
tower is the one that its record names, its card says where it comes from and under which licence,
and no file tells a path of this machine.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kuea_mllm.errors import EnvironmentFailure, KueaError, UserError
from kuea_mllm.model_card import HERE
from kuea_mllm.model_files import is_weight_file
from kuea_mllm.upload_checks import CARD_FILE, Upload, check_upload

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOGGER = logging.getLogger("kuea_mllm")

__all__ = ["Upload", "check_upload", "push_directory", "push_upload", "require_repository_name"]

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LOGIN = "Run `hf auth login` (or set HF_TOKEN) with a token that may write."


def push_directory(
    directory: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
    base_model: str | None = None,
) -> str:
    """Upload a directory that `align`, `lora`, `convert`, `swap` or `merge` wrote.

    Args:
        directory: Directory of a tower, a model or LoRA weights; it is not changed.
        repo_id: "owner/name"; created if it does not exist.
        private: Make a new repository private; refuse one that is public already.
        revision: Branch to upload to, created if it does not exist; the main branch if absent.
        message: Commit message.
        dry_run: Make every check that needs no network, and upload nothing.
        base_model: Hub id of the base, for a card that does not name it.

    Returns:
        The address of the repository.

    Raises:
        UserError: If the directory is not fit to be shared, or the Hub does not let this user
            write there.
        EnvironmentFailure: If the Hub cannot be reached or fails.
    """
    return push_upload(
        check_upload(directory, base_model=base_model),
        repo_id,
        private=private,
        revision=revision,
        message=message,
        dry_run=dry_run,
    )


def require_repository_name(repo_id: str) -> None:
    """Refuse what cannot be a repository of the Hub, before any work is done.

    Raises:
        UserError: If it is not of the form OWNER/NAME.
    """
    if not _REPOSITORY.fullmatch(repo_id):
        raise UserError(f"{repo_id!r} is no repository of the Hub.", "Write it as OWNER/NAME.")


def push_upload(
    upload: Upload,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> str:
    """Upload what `check_upload` returned; see `push_directory`."""
    from huggingface_hub import HfApi, constants

    require_repository_name(repo_id)
    api = HfApi()
    url = f"{api.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else "")
    size = f"{len(upload.files)} files, {upload.bytes / 1e9:.3f} GB"
    if dry_run:
        LOGGER.info("would upload %s of %s to %s", size, upload.directory, url)
        return url
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"HF_HUB_OFFLINE is set, so {upload.directory} cannot be uploaded.",
            "Unset it, or use --dry-run to make the checks alone.",
        )
    LOGGER.info("uploading %s of %s to %s", size, upload.directory, url)
    with _hub_errors_named(repo_id), tempfile.TemporaryDirectory() as folder:
        _prepare_repository(api, repo_id, upload, private=private, revision=revision)
        _stage(upload, Path(folder), repo_id)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            repo_type="model",
            revision=revision,
            commit_message=message or _default_message(upload),
        )
    return url


def _default_message(upload: Upload) -> str:
    tower = f"vision tower {upload.fingerprint[:12]}"
    if upload.kind != "lora":
        return f"Upload {upload.kind} with {tower}"
    return f"Upload LoRA weights for a base with {tower if upload.fingerprint else 'its tower'}"


def _prepare_repository(
    api: HfApi, repo_id: str, upload: Upload, *, private: bool, revision: str | None
) -> None:
    # None leaves the choice to the owner's default, which may be private.
    api.create_repo(repo_id, repo_type="model", private=private or None, exist_ok=True)
    if private and not api.repo_info(repo_id, repo_type="model").private:
        raise UserError(
            f"repository {repo_id} exists and is public; nothing was uploaded.",
            "Choose another name, or make it private in its settings.",
        )
    if revision is not None:
        api.create_branch(repo_id, branch=revision, repo_type="model", exist_ok=True)
    there = api.list_repo_files(repo_id, revision=revision, repo_type="model")
    stale = sorted(name for name in there if is_weight_file(name) and name not in upload.files)
    if stale:
        more = f" and {len(stale) - 1} more" if len(stale) > 1 else ""
        raise UserError(
            f"repository {repo_id} holds other weights that this upload does not replace "
            f"({stale[0]}{more}); a loader might take them. Nothing was uploaded.",
            "Use a new repository or another --revision, or delete them there first.",
        )


def _stage(upload: Upload, folder: Path, repo_id: str) -> None:
    """Lay out what is uploaded: links to the files as they are, and the rewritten ones."""
    for name, source in upload.files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == CARD_FILE:
            text = source if isinstance(source, str) else source.read_text(encoding="utf-8")
            # So that the lines of code in it load the repository.
            target.write_text(_name_repository(text, repo_id), encoding="utf-8")
        elif isinstance(source, Path):
            target.symlink_to(source.resolve())
        else:
            target.write_text(source, encoding="utf-8")


def _name_repository(card: str, repo_id: str) -> str:
    return card.replace(f"local-dir:{HERE}", f"hf-hub:{repo_id}").replace(HERE, repo_id)


@contextmanager
def _hub_errors_named(repo_id: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except KueaError:
        raise
    except LocalTokenNotFoundError as error:
        raise UserError("no Hugging Face token was found.", _LOGIN) from error
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} is no repository of the Hub: {_line(error)}") from error
    except HfHubHTTPError as error:
        raise _http_error(error.response.status_code, repo_id, _line(error)) from error
    # Several libraries carry the bytes (httpx, hf_xet), each with errors of its own.
    except Exception as error:
        raise EnvironmentFailure(
            f"the upload to {repo_id} failed: {type(error).__name__}: {_line(error)}",
            "Check the network and run the same command again; what has arrived is not sent twice.",
        ) from error


def _http_error(status: int, repo_id: str, reason: str) -> KueaError:
    if status == 401:
        return UserError(f"the Hub does not accept the token ({reason}).", _LOGIN)
    if status in {403, 404}:
        return UserError(
            f"this token may not write to {repo_id} ({status}: {reason}).",
            "Check the owner in OWNER/NAME, your role there, and that the token may write.",
        )
    return EnvironmentFailure(
        f"the Hub answered {status} for {repo_id}: {reason}",
        "Run the same command again later; what has arrived is not sent twice.",
    )


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else "no message"
