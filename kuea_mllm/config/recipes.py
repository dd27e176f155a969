"""Shipped and own recipes: finding, loading, overriding, writing."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml

from kuea_mllm.config.align import AlignRecipe
from kuea_mllm.config.base import Recipe
from kuea_mllm.config.evaluate import EvalRecipe
from kuea_mllm.config.lora import LoraRecipe
from kuea_mllm.config.probe import ProbeRecipe
from kuea_mllm.config.sweep import SweepRecipe
from kuea_mllm.errors import RecipeError

SCHEMAS: dict[str, type[Recipe]] = {
    "align": AlignRecipe,
    "eval": EvalRecipe,
    "lora": LoraRecipe,
    "probe": ProbeRecipe,
    "sweep": SweepRecipe,
}

RecipeT = TypeVar("RecipeT", bound=Recipe)


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key}' stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe that comes with the package."""

    name: str
    path: Path

    @property
    def purpose(self) -> str:
        """First comment line of the file."""
        return self.text.partition("\n")[0].lstrip("# ").strip()

    @property
    def text(self) -> str:
        """The YAML text, comments included."""
        return self.path.read_text(encoding="utf-8")


def list_shipped(kind: str | None = None) -> list[ShippedRecipe]:
    """Return the shipped recipes, sorted; names look like `align/vit_l_14`."""
    root = Path(str(files("kuea_mllm.recipes")))
    return [
        ShippedRecipe(name=path.relative_to(root).with_suffix("").as_posix(), path=path)
        for path in sorted(root.glob("*/*.yaml"))
        if path.parent.name in ({kind} if kind else SCHEMAS)  # accelerate/ holds no recipes
    ]


def find_recipe(reference: str, kind: str | None = None) -> ShippedRecipe:
    """Find a shipped recipe by name, with or without its kind, or an own file by path.

    Hyphens and underscores in a name are the same.

    Raises:
        RecipeError: If there is no such recipe; names the nearest.
    """
    path = Path(reference)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        if not path.is_file():
            raise RecipeError(f"recipe file {reference} does not exist.")
        return ShippedRecipe(name=str(reference), path=path)
    shipped = list_shipped(kind)
    wanted = reference.replace("-", "_")
    for recipe in shipped:
        if wanted in (recipe.name, recipe.name.partition("/")[2]):
            return recipe
    names = [recipe.name for recipe in shipped]
    short = {name.partition("/")[2]: name for name in names}
    close = difflib.get_close_matches(reference, [*names, *short], n=1)
    hint = f"Did you mean {close[0]}?" if close else "See `kuea-mllm recipes list`."
    raise RecipeError(f"no recipe is called '{reference}'.", hint)


def kind_of(reference: str) -> str | None:
    """Return the kind that a recipe says it is, None if it says none.

    Raises:
        RecipeError: If there is no such recipe, or it is no YAML mapping.
    """
    kind = read_yaml(find_recipe(reference).path).get("kind")
    return kind if isinstance(kind, str) else None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        RecipeError: If the file is no YAML mapping; names line and column.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)  # noqa: S506
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"recipe {path} is not valid YAML: {' '.join(str(error).split())}."
        ) from None
    if not isinstance(content, dict):
        raise RecipeError(f"recipe {path} must be a mapping, found {type(content).__name__}.")
    return content


def apply_settings(content: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Set keys by their dotted path, values as they are.

    Raises:
        RecipeError: If a path runs through a plain value.
    """
    result: dict[str, Any] = _deep_copy(content)
    for path, value in settings.items():
        *parents, last = path.split(".")
        node = result
        for parent in parents:
            below = node.setdefault(parent, {})
            if below is None:  # an optional section that a written recipe leaves out
                below = node[parent] = {}
            if not isinstance(below, dict):
                raise RecipeError(f"cannot set '{path}': '{parent}' holds a value, no keys.")
            node = below
        node[last] = value
    return result


def apply_overrides(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `a.b=value` overrides as typed by a person; values are read as YAML.

    Raises:
        RecipeError: If an override has no `=` or its path runs through a plain value.
    """
    settings: dict[str, Any] = {}
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path.strip():
            raise RecipeError(f"override '{override}' must look like key.path=value.")
        try:
            settings[path.strip()] = yaml.load(text, Loader=_StrictLoader)  # noqa: S506
        except yaml.YAMLError:
            raise RecipeError(f"override '{override}': the value is not valid YAML.") from None
    return apply_settings(content, settings)


def load_recipe(
    reference: str,
    schema: type[RecipeT],
    *,
    settings: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> RecipeT:
    """Load, override and validate a recipe of one kind.

    Args:
        reference: Shipped name or path of a YAML file.
        schema: `AlignRecipe` or `EvalRecipe`.
        settings: Values by dotted path, taken as they are.
        overrides: `key.path=value` texts, values read as YAML; they win over `settings`, later
            ones over earlier ones.

    Raises:
        RecipeError: If anything about it is wrong; names the key.
    """
    kind = next(name for name, known in SCHEMAS.items() if known is schema)
    recipe = find_recipe(reference, kind)
    content = apply_settings(read_yaml(recipe.path), settings or {})
    content = apply_overrides(content, overrides)
    found = content.get("kind")
    if found in SCHEMAS and found != kind:
        raise RecipeError(f"recipe {recipe.name} is of kind '{found}', a '{kind}' is needed here.")
    return schema.parse(content, origin=recipe.name)


def validate_file(path: Path) -> Recipe:
    """Validate a recipe file of any kind.

    Raises:
        RecipeError: If `kind` is missing or unknown, or the content does not fit it.
    """
    content = read_yaml(path)
    kind = content.get("kind")
    if kind not in SCHEMAS:
        raise RecipeError(f"recipe {path}: key 'kind' must be one of {', '.join(SCHEMAS)}.")
    return SCHEMAS[kind].parse(content, origin=str(path))


def recipe_to_yaml(recipe: Recipe) -> str:
    """Return the recipe as YAML that loads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _deep_copy(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _deep_copy(value) for key, value in node.items()}
    return list(node) if isinstance(node, list) else node
