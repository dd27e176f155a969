"""`kuea-mllm push`: upload a finished tower or model to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kuea_mllm.cli.common import Json, print_json, verb


@verb
def push(
    directory: Annotated[
        Path, typer.Argument(help="Directory of a tower, model or LoRA that kuea-mllm wrote.")
    ],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository of the Hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to upload to; created if it does not exist.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    base_model: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Base, for a card that does not name it."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, upload nothing; needs no network.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Upload a tower, model or LoRA weights with the card, after checking it against its record.

    Uploaded kuea.json and settings name no path of this machine; DIRECTORY itself is not changed.
    """
    from kuea_mllm.share import check_upload, push_upload

    upload = check_upload(directory, base_model=base_model)
    url = push_upload(
        upload, repo, private=private, revision=revision, message=message, dry_run=dry_run
    )
    if json_output:
        print_json(
            {
                "url": url,
                "uploaded": not dry_run,
                "kind": upload.kind,
                "fingerprint": upload.fingerprint,
                "bytes": upload.bytes,
                "files": sorted(upload.files),
                "rewritten": upload.rewritten,
            }
        )
        return
    from kuea_mllm.reporting.tables import print_key_values

    print_key_values(
        f"{'would upload' if dry_run else 'uploaded'} {directory}",
        {
            "to": url,
            "kind": upload.kind,
            "vision tower": upload.fingerprint or "not recorded",
            "files": ", ".join(sorted(upload.files)),
            "size": f"{upload.bytes / 1e9:.3f} GB",
            "rewritten for the upload": ", ".join(upload.rewritten),
        },
    )
