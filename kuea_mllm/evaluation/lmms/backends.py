"""Any model class of lmms-eval in the place of ours: vLLM, SGLang, hosted models, ...

Prompts and images go as lmms-eval sends them, so scores are comparable only within one backend.
Which vision tower is at work inside cannot be proven; the fingerprint of the model's files stands
in its place.
"""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kuea_mllm.errors import EnvironmentFailure, EvaluationError
from kuea_mllm.evaluation.answering.generation import one_line
from kuea_mllm.evaluation.plugin import MODEL_ID
from kuea_mllm.evaluation.tasks import nearest_names

# lmms-eval imports these only if they are there, and fails in the middle of a run if not.
_LIBRARIES = {
    "vllm": "vllm",
    "vllm_generate": "vllm",
    "sglang": "sglang",
    "llava_sglang": "sglang",
}

_SECRET_NAME = re.compile(r"(api_key|token|secret|password)$", re.IGNORECASE)
_VARIABLE = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)")
# Keys of hosted models and of the hub are known by their beginning, whatever they are given as.
_SECRET_VALUE = re.compile(r"://[^/\s]*@|\bsk-[\w-]{16,}|\bhf_[A-Za-z0-9]{24,}")


@dataclass(frozen=True)
class Backend:
    """A model class that exists, and the arguments it gets.

    Attributes:
        name: lmms-eval's name of the class.
        arguments: As given: `$NAME` stands for a variable of the environment. For the record.
    """

    name: str
    arguments: Mapping[str, str]

    def values(self) -> dict[str, Any]:
        """Return the arguments as the class gets them."""
        from lmms_eval.utils import handle_arg_string

        return {key: handle_arg_string(_expand(text)) for key, text in self.arguments.items()}

    def mask(self, text: str) -> str:
        """Write the names of variables instead of what is in them."""
        for argument in self.arguments.values():
            value = _expand(argument)
            if value != argument and value:
                text = text.replace(value, argument)
        return text


def require_backend(name: str, arguments: Mapping[str, str]) -> Backend:
    """Make sure that a backend can be run, before tasks are loaded.

    Raises:
        EvaluationError: If lmms-eval has no such class, an argument is a secret in clear, or a
            variable is not set.
        EnvironmentFailure: If the library behind the class is not installed.
    """
    from lmms_eval.models import MODEL_REGISTRY_V2

    names = [known for known in MODEL_REGISTRY_V2.list_model_names() if known != MODEL_ID]
    if name not in names:
        close = nearest_names(name, names)
        hint = f"Nearest names: {', '.join(close)}." if close else "No name looks like it."
        raise EvaluationError(
            f"lmms-eval has no model class {name!r}.",
            f"{hint} Leave out --backend for models that an adapter opens.",
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EvaluationError(
            f"backend {name} was launched with {os.environ['WORLD_SIZE']} processes.",
            "Launch one process: backends spread over GPUs by arguments of their own, such as "
            "tensor_parallel_size.",
        )
    for key, text in arguments.items():
        _require_no_secret(name, key, text)
    _require_library(name)
    return Backend(name, dict(arguments))


def require_plain_tasks(tasks: Mapping[str, Any], backend: Backend) -> None:
    """Refuse tasks that need more than a written answer.

    Args:
        tasks: lmms-eval's task objects.
        backend: What has to answer them.

    Raises:
        EvaluationError: Naming the task.
    """
    for name, task in tasks.items():
        settings = task.get_config("generation_kwargs") or {}
        if settings.get("candidates"):
            raise EvaluationError(
                f"task {name} chooses between {', '.join(settings['candidates'])} by the "
                f"probability of the first token, and backend {backend.name} only writes text.",
                "Use --protocol lmms-eval, which reads the choice from the text.",
            )
        if settings.get("completes"):
            raise EvaluationError(
                f"task {name} shows demonstrations with images in one prompt, which backend "
                f"{backend.name} does not take.",
                "Few-shot tasks need a model that an adapter opens: leave out --backend.",
            )


def _require_no_secret(backend: str, key: str, text: str) -> None:
    variable = _VARIABLE.fullmatch(text)
    if variable is not None:
        if not os.environ.get(variable[1]):
            raise EvaluationError(
                f"backend argument {key} is {text}, and the environment has no {variable[1]}.",
                f"Set it: export {variable[1]}=...",
            )
        return
    if _SECRET_NAME.search(key) or _SECRET_VALUE.search(text):
        raise EvaluationError(
            f"argument {key} of backend {backend} holds a secret, which would be written into "
            "files.",
            f"Put it into an environment variable and give its name: {key}='$NAME'.",
        )


def _expand(text: str) -> str:
    variable = _VARIABLE.fullmatch(text)
    return text if variable is None else os.environ.get(variable[1], "")


def _require_library(name: str) -> None:
    from lmms_eval.models import MODEL_REGISTRY_V2

    library = _LIBRARIES.get(MODEL_REGISTRY_V2.resolve(name).model_id)
    if library is not None and importlib.util.find_spec(library) is None:
        raise _not_installed(name, library)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            MODEL_REGISTRY_V2.get_model_class(name)
    except ImportError as error:
        raise _not_installed(name, error.name or one_line(error)) from error
    # A model class runs whatever code it has when it is imported.
    except Exception as error:
        raise EnvironmentFailure(
            f"backend {name} cannot be imported: {one_line(error)}",
            "It may need another version of a library; --debug shows the traceback.",
        ) from error


def _not_installed(name: str, library: str) -> EnvironmentFailure:
    return EnvironmentFailure(
        f"backend {name} needs {library}, which is not installed.",
        f"Install it (pip install {library}) or leave out --backend.",
    )
