"""Few-shot evaluation of a tiny OpenFlamingo through lmms-eval, in one process of its own.

See test_evaluation_end_to_end: this file runs itself once, the tests read what that left behind.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from kuea_mllm.errors import KueaError
from kuea_mllm.evaluation.results import Results, load_results
from kuea_mllm.io import read_json, write_json

TESTS = Path(__file__).parents[1]
MIXED = ["coco", "vqav2", "hatefulmemes"]
SEVEN = ["coco", "flickr30k", "vqav2", "okvqa", "textvqa", "vizwiz", "hatefulmemes"]
SEED = 42

pytestmark = pytest.mark.skipif(shutil.which("java") is None, reason="CIDEr needs Java")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fewshot")
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def scripted(world: Path) -> Results:
    return load_results(world / "scripted")


def shown(results: Results, task: str) -> list[list[int]]:
    found: list[list[int]] = read_json(results.path / "fewshot" / f"{task}.json")["demonstrations"]
    return found


def test_batch_of_four_gives_the_answers_of_batch_one(world: Path) -> None:
    one, four = load_results(world / "batch-1"), load_results(world / "batch-4")
    assert len(one.columns) == 6
    for task in one.columns:
        pairs = list(zip(one.rows(task), four.rows(task), strict=True))
        if task.startswith("hatefulmemes"):
            for before, after in pairs:
                first, second = json.loads(before.answer), json.loads(after.answer)
                assert first == pytest.approx(second, abs=1e-4)
            continue
        assert [row.answer for row, _ in pairs] == [row.answer for _, row in pairs]
    answers = [row.answer for task in one.columns for row in one.rows(task)]
    assert len(set(answers)) > len(one.columns)


def test_every_image_is_encoded_once(world: Path) -> None:
    summary = load_results(world / "batch-4").summary["fewshot"]
    # 4 documents of three data sets, and what of their 6 training images is shown with 2 shots.
    used = {
        (name, index)
        for name in MIXED
        for row in shown(load_results(world / "batch-4"), f"{name}_2shot_seed{SEED}")
        for index in row
    }
    assert summary["images_encoded"] == 3 * 4 + len(used)
    assert summary["images_encoded"] + summary["images_reused"] == 3 * 4 + 3 * 4 * 3


def test_scores_are_those_computed_by_hand(scripted: Results) -> None:
    # "red", "2", "yes, ..." and "dog": all of it, all of it, all of it and nothing.
    for name in ("vqav2", "textvqa", "vizwiz"):
        assert scripted.columns[f"{name}_2shot_seed42"]["score"] == pytest.approx(75.0)
    # For this language "yes" is the plural of "ye", which no annotator says.
    assert scripted.columns["okvqa_2shot_seed42"]["score"] == pytest.approx(50.0)
    # P("yes") is 0.2, 0.9, 0.6, 0.5 for no, yes, no, yes: three of four pairs are in order.
    assert scripted.columns["hatefulmemes_2shot_seed42"]["score"] == pytest.approx(75.0)
    assert scripted.columns["coco_2shot_seed42"]["score"] > 0
    rows = scripted.rows("vqav2_2shot_seed42")
    assert [row.score for row in rows] == [100.0, 100.0, 100.0, 0.0]
    assert [row.failed for row in rows] == [False] * 4


def test_perfect_captions_score_higher_than_mixed_ones(world: Path, scripted: Results) -> None:
    task = "flickr30k_2shot_seed42"
    from kuea_mllm.evaluation.fewshot.captions import score_captions

    rows = scripted.rows(task)
    references = [[f" a test thing {n}. ", f"one more test {n}"] for n in range(8, 12)]
    cut = [row.answer.partition("Output")[0] for row in rows]
    assert cut == ["a test thing 8", "one more test 9", "nothing", "a test thing 11"]
    score, each = score_captions(cut, references)
    column = scripted.columns[task]
    assert column["score"] == pytest.approx(100 * score)
    # Captions of two models are compared image by image.
    assert column["paired"]
    assert [row.score for row in rows] == pytest.approx([100 * own for own in each])


@pytest.mark.parametrize("name", SEVEN)
def test_prompts_are_the_published_ones(name: str, scripted: Results) -> None:
    task = f"{name}_2shot_seed{SEED}"
    first, second = shown(scripted, task)[1]
    solved = {
        "coco": "<image>Output:a train thing {0}.<|endofchunk|>\n",
        "hatefulmemes": "<image>is an image with: 'train {0}' written on it. Is it hateful? "
        "Answer:{1}<|endofchunk|>",
        "vqav2": "<image>Question:train {0}? Short answer:t{0}<|endofchunk|>\n",
    }
    asked = {
        "coco": "<image>Output:",
        "hatefulmemes": "<image>is an image with: 'dev 1' written on it. Is it hateful? Answer:",
        "vqav2": "<image>Question:val 1? Short answer:",
    }
    style = {"flickr30k": "coco"}.get(name, name if name in solved else "vqav2")
    classes = ["no", "yes"]
    demonstrations = "".join(solved[style].format(i, classes[i % 2]) for i in (first, second))
    assert scripted.rows(task)[1].question == demonstrations + asked[style]


def test_zero_shot_shows_two_demonstrations_without_images(world: Path) -> None:
    results = load_results(world / "batch-1")
    first, second = shown(results, "vqav2_0shot_seed42")[0]
    assert results.rows("vqav2_0shot_seed42")[0].question == (
        f"Question:train {first}? Short answer:t{first}<|endofchunk|>\n"
        f"Question:train {second}? Short answer:t{second}<|endofchunk|>\n"
        "<image>Question:val 0? Short answer:"
    )


def test_trials_have_mean_and_spread(scripted: Results) -> None:
    trials = scripted.summary["fewshot"]["trials"]["vqav2"]["2"]
    assert trials["seeds"] == [42, 43]
    assert trials["scores"] == pytest.approx([75.0, 75.0])
    assert trials["mean"] == pytest.approx(75.0)
    assert trials["std"] == pytest.approx(0.0)
    assert shown(scripted, "vqav2_2shot_seed42") != shown(scripted, "vqav2_2shot_seed43")


def test_released_flags_change_what_they_should(world: Path, scripted: Results) -> None:
    released = load_results(world / "released")
    # The same annotations without numbers vanish together. Where all agree nobody is left; where
    # eight of ten do, only the two others count: 0, 0.2, 0.2 and 0.
    assert released.columns["vizwiz_2shot_seed42"]["score"] == pytest.approx(10.0)
    assert released.columns["vqav2_2shot_seed42"]["score"] == pytest.approx(75.0)
    calls = read_json(world / "calls.json")
    # Zero-shot memes: the published code hands over the demonstrations' images as well.
    assert calls["correct"]["hatefulmemes_images"] == [1]
    assert calls["released"]["hatefulmemes_images"] == [3]
    assert calls["correct"]["released"] == [False]
    assert calls["released"]["released"] == [True]


def test_decoding_is_the_published_one(world: Path) -> None:
    settings = read_json(world / "calls.json")["correct"]["settings"]
    # New tokens, beams, length penalty.
    assert settings == [[5, 3, 0.0], [10, 3, 0.0], [20, 3, 0.0]]


def test_mistakes_end_in_one_clear_line(world: Path) -> None:
    errors = read_json(world / "errors.json")
    assert "document 0: the prompt has" in errors["context"]
    assert "hatefulmemes_4shot_seed42" in errors["context"]
    assert "more than the 256 there is room for" in errors["context"]
    assert "7 demonstrations were asked for, but there are only 6" in errors["pool"]
    assert "COCO_val2014_000000000003.jpg does not exist." in errors["image"]
    assert "takes no demonstrations" in errors["runtime"]
    for message in errors.values():
        assert len(message.splitlines()) <= 2


class FakeLanguage:
    """Plurals end in s."""

    def tag(self, text: str) -> list[tuple[str, str]]:
        return [(word, "NNS" if word.endswith("s") else "NN") for word in text.split()]

    def lemma(self, word: str, part: str) -> str:
        return word.removesuffix("s") if part == "n" else word


class ScriptedRuntime:
    """Knows every answer by the end of the prompt, and records what it was asked."""

    def __init__(self) -> None:
        self.calls: dict[str, list[Any]] = {
            "settings": [],
            "released": [],
            "hatefulmemes_images": [],
        }

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        return [len(prompt) for prompt in prompts]

    def prompt_room(self, max_new_tokens: int) -> int:
        return 10_000

    def encode_images(self, images: Sequence[Any]) -> list[Any]:
        return [image.size[0] - 20 for image in images]

    def complete(self, prompts: Sequence[str], images: Any, **options: Any) -> list[str]:
        keys = ("max_new_tokens", "num_beams", "length_penalty")
        self._record("settings", [options[key] for key in keys])
        self._record("released", options["released"])
        return [self._say(prompt, row[-1]) for prompt, row in zip(prompts, images, strict=True)]

    def rank(
        self, prompts: Sequence[str], images: Any, class_names: Sequence[str], *, released: bool
    ) -> list[list[float]]:
        import math

        assert list(class_names) == ["no", "yes"]
        self._record("released", released)
        for prompt, row in zip(prompts, images, strict=True):
            if prompt.count("<image>") == 1:
                self._record("hatefulmemes_images", len(row))
        chances = [0.2, 0.9, 0.6, 0.5]
        numbers = [int(prompt.rpartition("'dev ")[2][0]) for prompt in prompts]
        return [[math.log(1 - chances[n]), math.log(chances[n])] for n in numbers]

    def _record(self, key: str, value: Any) -> None:
        if value not in self.calls[key]:
            self.calls[key] = sorted([*self.calls[key], value])

    def _say(self, prompt: str, image: int) -> str:
        if prompt.endswith("Output:"):
            # The image is known by its width alone: the query's has to be the last one.
            said = {8: "a test thing 8", 9: "one more test 9", 10: "nothing"}
            return said.get(image, f"a test thing {image}") + "Output:more"
        number = int(prompt.rpartition("val ")[2][0])
        return ["red", "2 Question:", "yes, it is", "dog"][number]

    def generate(self, requests: Sequence[Any], **options: Any) -> list[str]:
        raise AssertionError("few-shot tasks are completed")

    def describe(self) -> dict[str, Any]:
        return {"dtype": "float32"}

    def vision_state(self) -> Mapping[str, Any]:
        import torch

        return {"encoder.layers.0.weight": torch.zeros(2)}


class PlainRuntime:
    """Takes no demonstrations."""

    def generate(self, requests: Sequence[Any], **options: Any) -> list[str]:
        return [""] * len(requests)

    describe = ScriptedRuntime.describe
    vision_state = ScriptedRuntime.vision_state


class FakeAdapter:
    name = "fake"

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime

    def check_base(self, base: Path) -> None:
        pass

    def tower_slot(self, base: Path) -> Any:
        from kuea_mllm.adapters.openflamingo.adapter import OpenFlamingoAdapter

        return OpenFlamingoAdapter().tower_slot(base)

    def open_runtime(self, model_dir: Path, *, dtype: str, device: str) -> Any:
        return self.runtime


def build_model(folder: Path, context: int) -> Path:
    from tiny_flamingo import save_tiny_base

    save_tiny_base(folder)
    config = read_json(folder / "config.json")
    config["text_config"]["max_position_embeddings"] = context
    write_json(folder / "config.json", config)
    return folder


def message_of(run: Any) -> str:
    try:
        run()
    except KueaError as error:
        return str(error)
    return "no error"


def run_everything(folder: Path) -> None:
    sys.path += [str(TESTS / "unit" / "evaluation"), str(TESTS / "adapters" / "openflamingo")]
    import torch
    from fewshot_data import write_all
    from lmms_eval.api.task import ConfigurableTask
    from tenacity import wait_none

    from kuea_mllm.config.evaluate import FewShotSettings
    from kuea_mllm.evaluation import runner
    from kuea_mllm.evaluation.fewshot import scoring, task_files

    torch.set_num_threads(1)
    ConfigurableTask.download.retry.wait = wait_none()
    ConfigurableTask.process_results.retry.wait = wait_none()
    vars(scoring)["load_language"] = vars(task_files)["load_language"] = FakeLanguage
    data = write_all(folder / "data")
    model, small = build_model(folder / "model", 700), build_model(folder / "small", 256)
    find = runner.choose_adapter

    def score(out: str, model: Path = model, batch_size: int = 4, **settings: Any) -> None:
        runner.evaluate(
            model,
            [],
            folder / out,
            batch_size=batch_size,
            device="cpu",
            show_progress=False,
            thumbnails=1,
            fewshot=FewShotSettings(**settings),
            data=data,
        )

    for size in (1, 4):
        score(f"batch-{size}", batch_size=size, datasets=MIXED, shots=[0, 2])
    errors = {
        "context": message_of(lambda: score("x", small, datasets=["hatefulmemes"], shots=[4])),
        "pool": message_of(lambda: score("x", datasets=["vqav2"], shots=[7])),
    }
    calls = {}
    for out, compat, trials in (("scripted", "correct", 2), ("released", "released", 1)):
        runtime = ScriptedRuntime()
        vars(runner)["choose_adapter"] = lambda *_, runtime=runtime: FakeAdapter(runtime)
        names = SEVEN if compat == "correct" else ["vqav2", "vizwiz"]
        score(out, datasets=names, shots=[2], trials=trials, compat=compat)
        score(f"{out}-memes", datasets=["hatefulmemes"], shots=[0], compat=compat)
        calls[compat] = runtime.calls
    write_json(folder / "calls.json", calls)
    vars(runner)["choose_adapter"] = lambda *_: FakeAdapter(PlainRuntime())
    errors["runtime"] = message_of(lambda: score("x", datasets=["vqav2"], shots=[2]))
    vars(runner)["choose_adapter"] = find
    Path(data["vqav2"], "val2014", "COCO_val2014_000000000003.jpg").unlink()
    errors["image"] = message_of(lambda: score("x", datasets=["vqav2"], shots=[2]))
    write_json(folder / "errors.json", errors)


if __name__ == "__main__":
    run_everything(Path(sys.argv[1]))
