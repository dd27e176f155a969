"""The strict base of every schema, and validation errors a person can act on."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from kuea_mllm.errors import RecipeError

Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]


class StrictModel(BaseModel):
    """A schema that refuses unknown keys and cannot be changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, content: Any) -> Any:
        for name, value in content.items() if isinstance(content, dict) else ():
            field = cls.model_fields.get(name)
            if field is not None and isinstance(value, bool):
                annotation = field.annotation
                if bool not in (annotation, *typing.get_args(annotation)):
                    raise ValueError(f"{name} takes neither true nor false")
        return content


class Recipe(StrictModel):
    """A complete description of one run; a recipe plus its inputs reproduces the run."""

    @classmethod
    def parse(cls, content: Mapping[str, Any], *, origin: str) -> Self:
        """Validate a plain mapping.

        Args:
            content: What was read from YAML, overrides applied.
            origin: Name of the file or recipe, for messages.

        Raises:
            RecipeError: With one line for each problem: key path, what was found and expected.
        """
        try:
            return cls.model_validate(dict(content))
        except ValidationError as error:
            lines = [_describe(cls, problem) for problem in error.errors()]
            problem = lines[0] if len(lines) == 1 else "\n  ".join(["", *lines])
            raise RecipeError(
                f"recipe {origin}: {problem}",
                "`kuea-mllm recipes show NAME` prints a valid one with comments.",
            ) from None


def _describe(schema: type[BaseModel], problem: Any) -> str:
    location = [part for part in problem["loc"] if part not in _union_tags(problem["loc"])]
    path = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(schema, problem["loc"][:-1])
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}."
        return f"unknown key '{path}'; {hint}"
    if problem["type"] == "missing":
        return f"key '{path}' is missing."
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not path:
        return message
    found = problem.get("input")
    said = f"key '{path}': {message[0].lower()}{message[1:]}"
    if problem["type"] == "value_error" and isinstance(found, dict):
        return f"{said}."  # about several keys of a section
    shown = type(found).__name__ if isinstance(found, (dict, list)) else repr(found)
    return f"{said}, found {shown}."


def _union_tags(location: tuple[Any, ...]) -> set[str]:
    # pydantic puts the discriminator's value into the path of a union; a reader has no such key.
    tags = {"polynomial", "gaussian", "cosine", "sum"}
    return {part for part in location if part in tags}


def _known_keys(schema: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    models: list[type[BaseModel]] = [schema]
    for part in location:
        if not isinstance(part, str):
            continue
        nested: list[type[BaseModel]] = []
        tagged: list[type[BaseModel]] = []
        for model in models:
            field = model.model_fields.get(part)
            if field is not None:
                nested += _models_in(field.annotation)
            elif "type" in model.model_fields and model.model_fields["type"].default == part:
                tagged.append(model)
        models = nested or tagged or models
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]
