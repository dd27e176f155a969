"""What to say when a tuning runs out of memory: the settings that would need less."""

from __future__ import annotations

from collections.abc import Sequence

from kuea_mllm.config.lora import LoraRecipe
from kuea_mllm.training.distributed import world_size
from kuea_mllm.training.memory import is_out_of_memory, out_of_memory
from kuea_mllm.training.run_directory import RunDirectory
from kuea_mllm.tuning.inputs import TuningInputs


def name_shortage(error: BaseException, inputs: TuningInputs, run: RunDirectory) -> BaseException:
    """Return an error that means too little memory as a line that says what to change.

    Args:
        error: Returned as it is if it means something else.
        inputs: Of the run.
        run: Says whether there is a checkpoint.
    """
    if not is_out_of_memory(error):
        return error
    return out_of_memory(
        error,
        f"on {inputs.recipe.runtime.device} while tuning {inputs.base}",
        memory_remedy(
            inputs.recipe, processes=world_size(), is_resumable=run.store.latest() is not None
        ),
    )


def memory_remedy(recipe: LoraRecipe, *, processes: int, is_resumable: bool) -> str:
    """Return which settings of a recipe would need less memory, in words.

    Args:
        recipe: Resolved, with a device.
        processes: Of the run.
        is_resumable: Whether there is a checkpoint to go on from.
    """
    runtime, optim, kind = recipe.runtime, recipe.optim, recipe.model.quantization
    is_cuda = runtime.device.startswith("cuda")
    same = [
        (not runtime.gradient_checkpointing, "runtime.gradient_checkpointing=true"),
        (processes > 1 and kind == runtime.sharding == "none", "runtime.sharding=fsdp"),
    ]
    other = [
        (optim.micro_batch_size > 1, f"optim.micro_batch_size={optim.micro_batch_size // 2}"),
        (is_cuda and kind == "none" and runtime.sharding == "none", "model.quantization=nf4"),
        (is_cuda and optim.optimizer == "adamw", "optim.optimizer=paged_adamw"),
        (True, f"a data.max_length below {recipe.data.max_length}"),
    ]
    free, bound = ([text for is_open, text in each if is_open] for each in (same, other))
    words = ""
    if is_resumable and free:
        # What a resumed run may change.
        words = f"Go on by --resume with {' or '.join(f'--set {text}' for text in free)}. "
        words += f"Or begin anew (--restart) with {_listed(bound)}"
    else:
        words += f"{'Begin anew (--restart)' if is_resumable else 'Try'} with "
        words += _listed([*free, *bound])
    return f"{words}; `kuea-mllm plan` says what fits."


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
