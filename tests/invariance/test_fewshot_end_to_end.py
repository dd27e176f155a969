"""Few-shot evaluation of a tiny OpenFlamingo through lmms-eval, in one process of its own.

See test_evaluation_end_to_end: this file runs itself once, the tests read what that left behind.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from kuea_mllm.config.evaluate import FLAMINGO_COLUMNS, SuiteSettings
from kuea_mllm.errors import KueaError
from kuea_mllm.evaluation.results import Results, load_results
from kuea_mllm.io import read_json, write_json

TESTS = Path(__file__).parents[1]
HAS_JAVA = shutil.which("java") is not None
CAPTIONS = ["coco", "flickr30k"] if HAS_JAVA else []
MIXED = [*CAPTIONS[:1], "vqav2", "hatefulmemes"]
VQA = ["vqav2", "okvqa", "textvqa", "vizwiz"]
SEVEN = [*CAPTIONS, *VQA, "hatefulmemes"]
SEED = 42

needs_java = pytest.mark.skipif(
    not HAS_JAVA, reason="CIDEr splits captions with Java, and there is no `java` on the PATH"
)


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
    assert len(one.columns) == 2 * len(MIXED)
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
    # 4 documents of each data set, and what of their 6 training images is shown with 2 shots.
    used = {
        (name, index)
        for name in MIXED
        for row in shown(load_results(world / "batch-4"), f"{name}_2shot_seed{SEED}")
        for index in row
    }
    documents = 4 * len(MIXED)
    assert summary["images_encoded"] == documents + len(used)
    assert summary["images_encoded"] + summary["images_reused"] == documents + documents * 3


def test_scores_are_those_computed_by_hand(scripted: Results) -> None:
    # "red", "2", "yes, ..." and "dog": all of it, all of it, all of it and nothing.
    for name in ("vqav2", "textvqa", "vizwiz"):
        assert scripted.columns[f"{name}_2shot_seed42"]["score"] == pytest.approx(75.0)
    # For this language "yes" is the plural of "ye", which no annotator says.
    assert scripted.columns["okvqa_2shot_seed42"]["score"] == pytest.approx(50.0)
    # P("yes") is 0.2, 0.9, 0.6, 0.5 for no, yes, no, yes: three of four pairs are in order.
    assert scripted.columns["hatefulmemes_2shot_seed42"]["score"] == pytest.approx(75.0)
    rows = scripted.rows("vqav2_2shot_seed42")
    assert [row.score for row in rows] == [100.0, 100.0, 100.0, 0.0]
    assert [row.failed for row in rows] == [False] * 4


@needs_java
def test_perfect_captions_score_higher_than_mixed_ones(world: Path, scripted: Results) -> None:
    task = "flickr30k_2shot_seed42"
    assert scripted.columns["coco_2shot_seed42"]["score"] > 0
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
    # The same annotations without numbers vanish together, "two" and "2" among them. Where all
    # agree nobody is left; where eight of ten do, only the two others count: 0, 0.2, 0.2 and 0.
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
    assert settings == [[5, 3, 0.0], [10, 3, 0.0], *([[20, 3, 0.0]] if HAS_JAVA else [])]
    # A recipe may set another one.
    settings = read_json(world / "calls.json")["released"]["settings"]
    assert settings == [[5, 3, -2.0]]


def test_mistakes_end_in_one_clear_line(world: Path) -> None:
    errors = read_json(world / "errors.json")
    assert "document 0: the prompt has" in errors["context"]
    assert "hatefulmemes_4shot_seed42" in errors["context"]
    # "yes" is three tokens here, of which the last is not fed.
    assert "more than the 254 there is room for" in errors["context"]
    assert "7 demonstrations were asked for, but there are only 6" in errors["pool"]
    assert "COCO_val2014_000000000003.jpg does not exist." in errors["image"]
    assert "takes no demonstrations" in errors["runtime"]
    for message in errors.values():
        assert len(message.splitlines()) <= 2
    assert not list(world.glob("x*"))


def test_resumed_evaluation_equals_an_uninterrupted_one(world: Path) -> None:
    report = read_json(world / "resumed.json")
    columns = 2 * len(MIXED)
    # It was stopped within the last column but one.
    assert report["kept"] == columns - 2
    assert not report["out_existed"]
    assert report["asked_again"] == 2
    whole, resumed = load_results(world / "batch-4"), load_results(world / "resumed")
    assert resumed.columns == whole.columns
    assert resumed.summary["fewshot"]["trials"] == whole.summary["fewshot"]["trials"]
    for folder in ("samples", "fewshot", "thumbnails", "lmms"):
        assert contents(resumed.path / folder) == contents(whole.path / folder)
    assert not (world / "resumed.unfinished").exists()


def contents(folder: Path) -> dict[str, Any]:
    """Return all files of a folder, without the times in lmms-eval's."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*.*"):
        name = re.sub(r"^\d+_\d+_", "", path.name)
        if name == "results.json":
            merged = read_json(path)
            found[name] = [merged["results"], merged["n-samples"], merged["task_hashes"]]
        else:
            found[f"{path.parent.name}/{name}"] = path.read_bytes()
    return found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("neither", "an unfinished evaluation lies in .*: {kept}.*Add --resume"),
        ("shots", "--resume: key 'fewshot.shots' is .0, 3., and .* was started with .0, 2."),
        ("limit", "--resume: key 'limit' is 2, and .* was started with None"),
        ("model", "--resume: the model is not that of the unfinished evaluation"),
        ("versions", "--resume: torch is 0.1, and the unfinished evaluation was started with"),
        ("data", "--resume: .* of vqav2_0shot_seed42 are not those of the finished column"),
    ],
)
def test_resumption_of_something_else_is_refused(name: str, message: str, world: Path) -> None:
    report = read_json(world / "resumed.json")
    error = report["errors"][name]
    assert re.search(message.replace("{kept}", str(report["kept"])), error, re.DOTALL), error
    assert len(error.splitlines()) == 2


@pytest.mark.parametrize("shots", [0, 4])
@pytest.mark.parametrize("name", SEVEN)
def test_answers_of_a_real_model_score_what_they_should(name: str, shots: int, world: Path) -> None:
    results = load_results(world / "seven")
    task = f"{name}_{shots}shot_seed{SEED}"
    rows, score = results.rows(task), results.columns[task]["score"]
    assert [row.failed for row in rows] == [False] * 4
    assert all(row.question.count("<image>") == 1 + shots for row in rows)
    truth = read_json(world / "truth.json")[name]
    if name in CAPTIONS:
        from kuea_mllm.evaluation.fewshot.captions import score_captions

        cut = [row.answer.partition("Output")[0].replace('"', "") for row in rows]
        assert score == pytest.approx(100 * score_captions(cut, truth)[0])
        # The first reference of each image is what the model says without demonstrations.
        assert shots or score > 100
    elif name == "hatefulmemes":
        chances = [json.loads(row.answer) for row in rows]
        sure = [chance["yes"] - chance["no"] for chance in chances]
        pairs = [(yes, no) for yes in (sure[1], sure[3]) for no in (sure[0], sure[2])]
        assert score == pytest.approx(25 * sum((yes > no) + (yes == no) / 2 for yes, no in pairs))
    else:
        assert [row.score for row in rows] == pytest.approx(
            [100 * accuracy(row.answer, said, name) for row, said in zip(rows, truth, strict=True)]
        )
        assert score == pytest.approx(sum(row.score or 0.0 for row in rows) / 4)
        # Ten, two, one and none of ten annotators say what the model says.
        assert shots or [row.score for row in rows] == pytest.approx([100, 60, 30, 0])


def accuracy(answer: str, annotated: list[str], name: str) -> float:
    from kuea_mllm.evaluation.fewshot.vqa_accuracy import normalise_answer

    said = normalise_answer(cut_by_hand(answer, name))
    agrees = [normalise_answer(other) == said for other in annotated]
    return sum(min(1.0, (sum(agrees) - own) / 3) for own in agrees) / 10


def cut_by_hand(answer: str, name: str) -> str:
    for word in ("Question", "Answer", "Short", ", "):
        answer = answer.split(word, maxsplit=1)[0]
    if name == "okvqa":
        answer = " ".join(word.removesuffix("s") for word in answer.split())
    return answer


def test_suite_names_protocol_and_columns(world: Path) -> None:
    results = load_results(world / "seven")
    settings = results.summary["settings"]
    assert (settings["suite"], settings["protocol"]) == ("flamingo-paper", "open-flamingo")
    found = {name: (entry["column"], entry["protocol"]) for name, entry in results.columns.items()}
    assert found["vqav2_4shot_seed42"] == ("VQAv2, 4 shots", "open-flamingo")
    assert found["hatefulmemes_0shot_seed42"] == ("HatefulMemes, 0 shots", "open-flamingo")


def test_special_tokens_in_a_data_set_are_words(world: Path) -> None:
    results = load_results(world / "hostile")
    for shots in (0, 2):
        for row in results.rows(f"vqav2_{shots}shot_seed{SEED}"):
            assert not row.failed
            assert row.question.count("<image>") == 1 + shots
            assert row.question.count("<|endofchunk|>") == 2
            assert row.question.count("< image> in < |endofchunk|>") == 3


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
    import gc

    import torch
    from fewshot_data import write_all
    from lmms_eval.api.task import ConfigurableTask
    from tenacity import wait_none

    from kuea_mllm.config.evaluate import FewShotSettings
    from kuea_mllm.evaluation import runner
    from kuea_mllm.evaluation.fewshot import scoring, task_files

    # lmms-eval collects garbage twice after each task, and all libraries are there to be looked at.
    gc.freeze()
    torch.set_num_threads(1)
    ConfigurableTask.download.retry.wait = wait_none()
    ConfigurableTask.process_results.retry.wait = wait_none()
    vars(scoring)["load_language"] = vars(task_files)["load_language"] = FakeLanguage
    data = write_all(folder / "data")
    model, small = build_model(folder / "model", 700), build_model(folder / "small", 256)
    find = runner.choose_adapter

    def score(
        out: str, model: Path = model, batch_size: int = 4, others: Any = None, **settings: Any
    ) -> None:
        runner.evaluate(
            model,
            [],
            folder / out,
            batch_size=batch_size,
            device="cpu",
            show_progress=False,
            thumbnails=1,
            fewshot=FewShotSettings(**settings),
            **{"data": data, **(others or {})},
        )

    for size in (1, 4):
        score(f"batch-{size}", batch_size=size, datasets=MIXED, shots=[0, 2])
    interrupt_and_resume(folder, model, data, score)
    score_seven(folder, score)
    errors = {
        "context": message_of(lambda: score("x", small, datasets=["hatefulmemes"], shots=[4])),
        "pool": message_of(lambda: score("x", datasets=["vqav2"], shots=[7])),
    }
    calls = {}
    for out, compat, trials in (("scripted", "correct", 2), ("released", "released", 1)):
        runtime = ScriptedRuntime()
        vars(runner)["choose_adapter"] = lambda *_, runtime=runtime: FakeAdapter(runtime)
        names, penalty = (SEVEN, 0.0) if compat == "correct" else (["vqav2", "vizwiz"], -2.0)
        both = {"compat": compat, "length_penalty": penalty}
        score(out, datasets=names, shots=[2], trials=trials, **both)
        score(f"{out}-memes", datasets=["hatefulmemes"], shots=[0], **both)
        calls[compat] = runtime.calls
    write_json(folder / "calls.json", calls)
    vars(runner)["choose_adapter"] = lambda *_: FakeAdapter(PlainRuntime())
    errors["runtime"] = message_of(lambda: score("x", datasets=["vqav2"], shots=[2]))
    vars(runner)["choose_adapter"] = find
    Path(data["vqav2"], "val2014", "COCO_val2014_000000000003.jpg").unlink()
    errors["image"] = message_of(lambda: score("x", datasets=["vqav2"], shots=[2]))
    write_json(folder / "errors.json", errors)


def interrupt_and_resume(folder: Path, model: Path, data: dict[str, str], score: Any) -> None:
    """Stop an evaluation within a column, try to go on with others, go on with it."""
    from kuea_mllm.evaluation import column_run, runner

    run_lmms_eval, versions = column_run.run_lmms_eval, runner.library_versions
    asked: list[str] = []

    def run(session: Any, tasks: Any, **options: Any) -> Any:
        asked.extend(tasks)
        found = run_lmms_eval(session, tasks, **options)
        if len(asked) == 2 * len(MIXED) - 1:
            # All is answered and nothing of it is written.
            raise KeyboardInterrupt
        return found

    def again(**changes: Any) -> None:
        others = {"resume": True, "data": data, **changes}
        shots = others.pop("shots", [0, 2])
        base = others.pop("base", model)
        score("resumed", base, datasets=MIXED, shots=shots, others=others)

    vars(column_run)["run_lmms_eval"] = run
    with contextlib.suppress(KeyboardInterrupt):
        again(resume=False)
    kept = list((folder / "resumed.unfinished" / "columns").iterdir())
    report: dict[str, Any] = {"kept": len(kept), "out_existed": (folder / "resumed").exists()}
    changed = shutil.copytree(folder / "model", folder / "changed")
    (changed / "generation_config.json").write_text("{}")
    questions = Path(data["vqav2"], "v2_OpenEnded_mscoco_val2014_questions.json")
    before = questions.read_text()
    errors = {
        "neither": message_of(lambda: again(resume=False)),
        "shots": message_of(lambda: again(shots=[0, 3])),
        "limit": message_of(lambda: again(limit=2)),
        "model": message_of(lambda: again(base=changed)),
    }
    vars(runner)["library_versions"] = lambda: {**versions(), "torch": "0.1"}
    errors["versions"] = message_of(again)
    vars(runner)["library_versions"] = versions
    questions.write_text(before.replace("val 1?", "val one?"))
    errors["data"] = message_of(again)
    questions.write_text(before)
    asked.clear()
    again(max_failures=1)
    vars(column_run)["run_lmms_eval"] = run_lmms_eval
    write_json(folder / "resumed.json", {**report, "errors": errors, "asked_again": len(asked)})


def score_seven(folder: Path, score: Any) -> None:
    """Let a real model answer all data sets, after telling some annotators what it says."""
    from fewshot_data import write_all

    data = write_all(folder / "told")
    score("asked", datasets=SEVEN, shots=[0], others={"data": data})
    truth: dict[str, Any] = {"hatefulmemes": None}
    for name in VQA:
        rows = load_results(folder / "asked").rows(f"{name}_0shot_seed{SEED}")
        file = next(Path(data[name]).glob("*val*annotations*.json"))
        content = read_json(file)
        told = sorted(content["annotations"], key=lambda each: each["question_id"])
        for row, annotation, count in zip(rows, told, (10, 2, 1, 0), strict=True):
            for answer in annotation["answers"][:count]:
                answer["answer"] = cut_by_hand(row.answer, name)
            for place, answer in enumerate(annotation["answers"][count:]):
                answer["answer"] = f"zz{place}"
        file.write_text(json.dumps(content))
        truth[name] = [[answer["answer"] for answer in each["answers"]] for each in told]
    for name in CAPTIONS:
        rows = load_results(folder / "asked").rows(f"{name}_0shot_seed{SEED}")
        file = Path(data[name], f"dataset_{name}.json")
        content = read_json(file)
        told = [image for image in content["images"] if image["split"] == "test"]
        for row, image in zip(rows, told, strict=True):
            said = row.answer.partition("Output")[0].replace('"', "")
            image["sentences"][0]["raw"] = said
        file.write_text(json.dumps(content))
        truth[name] = [[each["raw"] for each in image["sentences"]] for image in told]
    write_json(folder / "truth.json", truth)
    columns = [column for column, name in FLAMINGO_COLUMNS.items() if name in SEVEN]
    suite = SuiteSettings(name="flamingo-paper", columns=columns)
    score("seven", datasets=SEVEN, shots=[0, 4], others={"data": data, "suite": suite})
    for part in ("train", "val"):
        file = Path(data["vqav2"], f"v2_OpenEnded_mscoco_{part}2014_questions.json")
        file.write_text(file.read_text().replace("?", "? <image> in <|endofchunk|>"))
    score("hostile", datasets=["vqav2"], shots=[0, 2], others={"data": data})


if __name__ == "__main__":
    run_everything(Path(sys.argv[1]))
