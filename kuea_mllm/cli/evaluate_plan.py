"""`kuea-mllm eval --dry-run`: what would be asked, and what is missing for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kuea_mllm.cli.common import print_json

if TYPE_CHECKING:
    from kuea_mllm.config.evaluate import EvalRecipe


def print_dry_run(
    recipe: EvalRecipe, models: Sequence[Path], mllm: str | None, *, json_output: bool
) -> None:
    """Check models, tasks and data without loading any weights, and print recipe and columns.

    Raises:
        UserError: If something is missing; what is there is printed before.
    """
    from kuea_mllm.config.recipes import recipe_to_yaml
    from kuea_mllm.evaluation.answering.opening import choose_adapter
    from kuea_mllm.evaluation.fewshot.task_files import require_inputs
    from kuea_mllm.evaluation.plugin import MODEL_ID
    from kuea_mllm.evaluation.suites.preview import preview_columns, preview_lines
    from kuea_mllm.evaluation.suites.registry import DataFolders
    from kuea_mllm.evaluation.tasks import resolve_tasks

    if recipe.backend != MODEL_ID:
        from kuea_mllm.evaluation.lmms.backends import require_backend

        require_backend(recipe.backend, recipe.backend_args)
    for model in models if recipe.backend == MODEL_ID else ():
        choose_adapter(model, mllm).check_base(model)
    if recipe.tasks:
        resolve_tasks(recipe.tasks)
    folders = DataFolders(recipe.data_root, recipe.data)
    if recipe.fewshot is not None:
        found = {name: folders.find(name) for name in recipe.fewshot.datasets}
        require_inputs(recipe.fewshot, {n: str(f) for n, f in found.items() if f is not None})
    entries, problem = preview_columns(
        recipe.suite, recipe.fewshot, folders, limit=recipe.limit, limit_seed=recipe.limit_seed
    )
    if json_output:
        print_json({**recipe.model_dump(mode="json"), "columns": entries})
    else:
        typer.echo(recipe_to_yaml(recipe), nl=False)
        if entries:
            typer.echo("")
            typer.echo("\n".join(preview_lines(entries, has_judge=recipe.judge is not None)))
    if problem is not None:
        raise problem
