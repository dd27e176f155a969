"""The LLaVA suite under all protocols through lmms-eval, in one process of its own.

See test_evaluation_end_to_end: this file runs itself once, the tests read what that left behind.
Scripted answers have scores that are computed by hand here; tiny random models show that real ones
run through all columns.
"""

from __future__ import annotations

import gc
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from kuea_mllm.adapters.base import TowerSlot
from kuea_mllm.config.evaluate import LLAVA_COLUMNS, QUICK_COLUMNS, SuiteSettings
from kuea_mllm.errors import KueaError
from kuea_mllm.evaluation.results import Results, load_results
from kuea_mllm.io import read_json, write_json

TESTS = Path(__file__).parents[1]
JUDGED = ("llava-wild", "llava-coco")
LETTERS = "ABCDEFGHIJKLMNOP"
BOXES = ("RefCOCOg", "RefCOCO+", "RefCOCO")

# Ten, eight and seven of ten annotators agree, and two: 0.6.
TEXT = (1 + 1 + 1 + 0.6 + 1 + 1) / 6
VQA = (1 + 1 + 0.6 + 1 + 1 + 0) / 6
BY_HAND: dict[str, dict[str, float]] = {
    "paper": {
        "AI2D": 2 / 6,
        "text-ocr": TEXT,
        "text-pure": TEXT,
        # Three of four, three of four, three of three.
        "pope": (3 / 4 + 3 / 4 + 1) / 3,
        "tallyQA": 1 / 6,
        "vsr": 4 / 6,
        "RefCOCOg": 3 / 6,
        "RefCOCO+": 3 / 6,
        "RefCOCO": 3 / 6,
        "vqa-v2": VQA,
        # Two of four pairs.
        "MMVP": 1 / 2,
    },
    "lmms-eval": {
        # Only the diagrams of the test part.
        "AI2D": 1 / 3,
        "text-ocr": TEXT,
        "text-pure": TEXT,
        # All in one.
        "pope": 9 / 11,
        "tallyQA": 1 / 6,
        "vsr": 4 / 6,
        "RefCOCOg": 3 / 6,
        "RefCOCO+": 3 / 6,
        "RefCOCO": 3 / 6,
        "vqa-v2": VQA,
        "MMVP": 1 / 2,
    },
}
BY_HAND["padded"] = BY_HAND["paper"] | dict.fromkeys(BOXES, 4 / 6)

# What the scripted model says to prompts that hold these words.
SAID = {
    "brand of this camera": "Dakota",
    "does it cost": "unanswerable",
    "white text spell": "copenhagen",
    "who is it by": "nous",
    "what's the time": "ten",
    "on the label": "the label",
    "what colour": "Red.",
    "how many are there": "two",
    "is it raining": "no",
    "what is this": "a cat",
    "where is it": "table",
    "who?": "nobody",
    "snowboard": "Yes",
    "backpack": "Yes",
    "car in the image": "Yes",
    "a dog in the image": "No",
    "dining table": "No",
    "person in": "Yes",
    "toaster": "No",
    # Right where the box is mapped from the square (w 64, h 48: 8 pixels above and below).
    "the ball": "[0.4, 0.1625, 0.5, 0.275]",
    'ball "on top"': "[0.4, 0.05, 0.5, 0.2]",
    "the box in the middle": "[0.35, 0.3, 0.65, 0.7]",
    "lower left": "there",
    "the {mat}": "[0.1, 0.5, 0.6, 1.0]",
    "describes: mat": "[0.1, 0.5, 0.6, 0.74]",
    'describes: "mat"': "[0.1, 0.5, 0.6, 0.74]",
}
# MMVP's questions come in pairs of equal words: these answers go by the size of the image.
PAIRS = {(48, 64): "(a)", (50, 50): "(b)", (81, 40): "(a)", (64, 48): "(b)"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suites")
    # Parquet files are copied into the cache of `datasets`.
    own = {"HF_HOME": str(folder / "hf"), "HF_DATASETS_CACHE": str(folder / "hf" / "datasets")}
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **own, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def by_column(results: Results) -> dict[str, str]:
    """Return the task of each column."""
    return {str(entry["column"]): task for task, entry in results.columns.items()}


@pytest.mark.parametrize("protocol", list(BY_HAND))
def test_scores_are_those_computed_by_hand(world: Path, protocol: str) -> None:
    results = load_results(world / f"scripted-{protocol}")
    tasks = by_column(results)
    assert set(tasks) == set(LLAVA_COLUMNS)
    for column, score in BY_HAND[protocol].items():
        entry = results.columns[tasks[column]]
        assert entry["score"] == pytest.approx(score * entry["scale"], abs=1e-9), column
        assert entry["protocol"] == protocol
        assert entry["failed"] == 0
        assert entry["paired"], column


@pytest.mark.parametrize("protocol", list(BY_HAND))
def test_judged_columns_without_a_judge_are_missing(world: Path, protocol: str) -> None:
    results = load_results(world / f"scripted-{protocol}")
    tasks = by_column(results)
    for column in JUDGED:
        entry = results.columns[tasks[column]]
        assert entry["score"] is None
        assert "no judge" in entry["missing"]
        assert [row.answer for row in results.rows(tasks[column])] == ["A place."] * 6


def test_summary_states_suite_and_protocol(world: Path) -> None:
    settings = load_results(world / "scripted-padded").summary["settings"]
    assert settings["suite"] == "llava-paper"
    assert settings["protocol"] == "padded"
    assert settings["limit"] is None
    assert settings["limit_seed"] == 0


def test_pope_shows_its_three_subsets(world: Path) -> None:
    results = load_results(world / "scripted-paper")
    found = results.columns[by_column(results)["pope"]]["breakdown"]
    scale = results.columns[by_column(results)["pope"]]["scale"]
    expected = {"adversarial": 0.75, "popular": 0.75, "random": 1.0}
    assert found == pytest.approx({name: scale * score for name, score in expected.items()})


PROMPTS = {
    "AI2D": "Which letter is the root?\nA. A1\nB. B1\nC. C1\nD. D1\n"
    "Answer with the option's letter from the given choices directly.",
    "text-ocr": "what is the brand of this camera?\nReference OCR token: DAKOTA, 5MP\n"
    "Answer the question using a single word or phrase.",
    "text-pure": "what is the brand of this camera?\n"
    "Answer the question using a single word or phrase.",
    "pope": "Is there a snowboard in the image?\n"
    "Answer the question using a single word or phrase.",
    "vsr": 'Based on the image, is this statement "True" or "False"? '
    'The oven is at the right side of the cat.\nRespond with "True" or "False" directly.',
    "RefCOCO": "Please provide the bounding box coordinate of the region this sentence "
    'describes: "the ball"',
    "vqa-v2": "What colour is it?\nAnswer the question using a single word or phrase.",
}


@pytest.mark.parametrize("column", list(PROMPTS))
def test_prompts_are_those_of_the_papers_harness(world: Path, column: str) -> None:
    results = load_results(world / "scripted-paper")
    assert results.rows(by_column(results)[column])[0].question == PROMPTS[column]


def test_stock_tasks_are_asked_in_their_own_words(world: Path) -> None:
    results = load_results(world / "scripted-lmms-eval")
    tasks = by_column(results)
    with_ocr = results.rows(tasks["text-ocr"])[0].question
    without = results.rows(tasks["text-pure"])[0].question
    assert "\nReference OCR token: DAKOTA, 5MP\n" in with_ocr
    assert "OCR" not in without
    box = results.rows(tasks["RefCOCO"])[0].question
    assert box.startswith("Bounding box coordinates are specified in the format")
    assert results.columns[tasks["RefCOCO"]]["metric"] == "refcoco_ACC@0.5"


def test_tiny_llava_answers_every_column(world: Path) -> None:
    paper, padded = (load_results(world / f"llava-{name}") for name in ("paper", "padded"))
    tasks, others = by_column(paper), by_column(padded)
    for column in LLAVA_COLUMNS:
        rows = paper.rows(tasks[column])
        assert not any(row.failed for row in rows)
        assert [row.question for row in rows] == [
            row.question for row in load_results(world / "scripted-paper").rows(tasks[column])
        ]
    for column in BOXES:
        # The protocols score boxes differently, and ask the same.
        assert [row.answer for row in paper.rows(tasks[column])] == [
            row.answer for row in padded.rows(others[column])
        ]
    for column, choices in (("pope", "Yes No"), ("vsr", "True False"), ("AI2D", "A B C D")):
        rows = paper.rows(tasks[column])
        assert {row.answer for row in rows} <= set(choices.split())
        entry = paper.columns[tasks[column]]
        assert [row.score for row in rows] == [
            entry["scale"] * (row.answer == row.target) for row in rows
        ]


@pytest.mark.parametrize("name", ["vlm", "flamingo", "mof"])
def test_every_runtime_answers_every_column(world: Path, name: str) -> None:
    results = load_results(world / f"{name}-paper")
    tasks = by_column(results)
    assert set(tasks) == set(LLAVA_COLUMNS)
    adapter = {"vlm": "hf_vlm", "flamingo": "openflamingo", "mof": "llava_mof"}[name]
    assert results.summary["model"]["adapter"] == adapter
    asked = load_results(world / "scripted-paper")
    for column, task in tasks.items():
        rows = results.rows(task)
        assert not any(row.failed for row in rows)
        assert [row.question for row in rows] == [row.question for row in asked.rows(task)]
        assert column not in BOXES or results.columns[task]["remarks"] == [
            "6 of 6 answers are no box and count as wrong"
        ]
    for column, choices in (("vsr", "True False"), ("pope", "Yes No"), ("AI2D", "A B C D")):
        assert {row.answer for row in results.rows(tasks[column])} <= set(choices.split())
    entry, rows = results.columns[tasks["vsr"]], results.rows(tasks["vsr"])
    right = sum(row.answer == row.target for row in rows) / len(rows)
    assert entry["score"] == pytest.approx(right * entry["scale"])


def test_boxes_of_a_square_that_a_model_never_saw_are_remarked(world: Path) -> None:
    (entry,) = load_results(world / "flamingo-padded").columns.values()
    assert entry["column"] == "RefCOCO"
    assert "this model's images are not padded" in entry["remarks"][1]


def test_answers_longer_than_a_context_are_shortened(world: Path) -> None:
    # lmms-eval allows 4096 tokens, and OpenFlamingo has 2048.
    (entry,) = load_results(world / "flamingo-wild").columns.values()
    assert (entry["column"], entry["failed"]) == ("llava-wild", 0)


def test_limit_draws_the_same_whole_pairs_for_every_model(world: Path) -> None:
    first, second = (load_results(world / "pair" / half) for half in ("baseline", "candidate"))
    tasks = by_column(first)
    assert set(tasks) == set(QUICK_COLUMNS)
    for task in tasks.values():
        asked = [row.question for row in first.rows(task)]
        assert asked == [row.question for row in second.rows(task)]
        assert len(asked) == 4
    pairs = [row.cluster for row in first.rows(tasks["MMVP"])]
    assert sorted(pairs.count(pair) for pair in set(pairs)) == [2, 2]
    settings = first.summary["settings"]
    assert (settings["limit"], settings["limit_seed"]) == (4, 0)
    assert "at random" in settings["limit_rule"]
    drawn = {row.question for row in first.rows(tasks["pope"])}
    every = load_results(world / "scripted-paper")
    assert drawn <= {row.question for row in every.rows(by_column(every)["pope"])}


def test_limit_on_stock_tasks_keeps_pairs_whole(world: Path) -> None:
    results = load_results(world / "stock-limited")
    tasks = by_column(results)
    assert len(results.rows(tasks["RefCOCO"])) == 3
    pairs = [row.cluster for row in results.rows(tasks["MMVP"])]
    assert len(pairs) == 2
    assert len(set(pairs)) == 1


def test_changed_copy_under_a_finished_stock_column_is_noticed(world: Path) -> None:
    log = read_json(world / "stock-resumed.json")
    assert log["finished before"] == ["kuea_lmms_eval_refcoco"]
    # The questions and right answers are what they were; the pictures are not.
    assert "images of kuea_lmms_eval_refcoco are not those of the finished" in log["changed"]
    assert f"data set refcoco ({world / 'hub' / 'refcoco'}) have changed" in log["changed"]
    assert log["restored"] == "no error"
    results = load_results(world / "stock-resumed")
    assert set(by_column(results)) == {"RefCOCO", "MMVP"}


def test_pair_is_resumed_and_compared(world: Path) -> None:
    log = read_json(world / "pair.json")
    assert log["finished_before_interruption"] == ["baseline"]
    assert log["evaluated_after"] == ["candidate"]
    assert "key 'limit' is 5" in log["errors"]["recipe"]
    assert "an unfinished comparison lies in" in log["errors"]["neither"]
    assert "fingerprint of its files" in log["errors"]["model"]
    assert "exists already" in log["errors"]["complete"]
    comparison = read_json(world / "pair" / "comparison.json")
    assert comparison["kind"] == "comparison"
    assert set(comparison["columns"]) == set(load_results(world / "pair" / "baseline").columns)
    assert (world / "pair" / "report.html").stat().st_size > 1000


def test_mistakes_are_found_before_a_model_is_opened(world: Path) -> None:
    errors = read_json(world / "errors.json")
    assert "vsr" in errors["image"]
    assert "000000085637.jpg" in errors["image"]
    assert "test.jsonl" in errors["schema"]
    assert "'caption'" in errors["schema"] or "caption" in errors["schema"]
    assert "data set vsr has no folder" in errors["folder"]
    assert "data/test-*.parquet" in errors["copy"]
    assert "nearest" in errors["schema"] or "docs/evaluation.md" in errors["schema"]


class Scripted:
    """Adapter and runtime that answer by the words of the prompt; see `SAID`."""

    name = "scripted"

    def __init__(self, always: str | None = None) -> None:
        self.always = always

    def check_base(self, base: Path) -> None:
        pass

    def tower_slot(self, base: Path) -> TowerSlot:
        return TowerSlot({}, "tower", None, "clip")

    def open_runtime(self, model_dir: Path, *, dtype: str, device: str) -> Scripted:
        return self

    def generate(self, requests: Sequence[Any], **options: Any) -> list[str]:
        return [self.answer(request) for request in requests]

    def choose(self, requests: Sequence[Any], candidates: Sequence[str]) -> list[str]:
        fixed = {"True": "True", "A": "B" if len(candidates) < 16 else "C"}.get(candidates[0])
        return [fixed or self.answer(request) for request in requests]

    def answer(self, request: Any) -> str:
        if self.always is not None:
            return self.always
        prompt = request.prompt.lower()
        if "(a)" in prompt or "\na. " in prompt:
            is_diagram = len(prompt.split("\n")) > 4
            return "B" if is_diagram else PAIRS[request.images[0].size]
        if "the statement" in prompt or "statement" in prompt:
            return "True"
        if prompt.startswith("how many") and "are there" not in prompt:
            return "2"
        if "how many dogs are there" in prompt:
            return "2"
        found = [said for words, said in SAID.items() if words in prompt]
        return found[-1] if found else "A place."

    def describe(self) -> dict[str, Any]:
        return {"dtype": "float32"}

    def vision_state(self) -> Mapping[str, Any]:
        import torch

        return {"encoder.layers.0.weight": torch.zeros(2)}


def choosing_tokenizer() -> Any:
    """A Llama tokenizer in which the answers to choose from are one token each."""
    from tiny_llava_files import make_tokenizer
    from transformers import LlamaTokenizer

    known = make_tokenizer().get_vocab()
    names = [name for name, _ in sorted(known.items(), key=lambda pair: pair[1])]
    names = [name for name in names if name not in ("<pad>", "<image>")]
    merges: list[tuple[str, str]] = []
    for word in ("True", "False", "Yes", "No", *"ABCDEFGHIJKLMNOP"):
        piece = "▁"
        for letter in word:
            if (piece, letter) not in merges:
                merges.append((piece, letter))
                names.append(piece + letter)
            piece += letter
    vocabulary = {name: place for place, name in enumerate(names)}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<image>"]})
    return tokenizer


def write_models(folder: Path) -> None:
    import tiny_llava_files
    from hf_vlm_samples import PINPOINTS, clip, llama
    from test_hf_vlm_runtime import TEMPLATE, random_weights
    from transformers import (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    tokenizer = choosing_tokenizer()
    vars(tiny_llava_files)["make_tokenizer"] = lambda: tokenizer
    tiny_llava_files.write_tiny_llava(folder / "llava")
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        image_grid_pinpoints=PINPOINTS,
    )
    processor = LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE.replace("TAG", "<image>"),
        num_additional_image_tokens=1,
    )
    config = LlavaNextConfig(
        vision_config=clip(),
        text_config=llama(max_position_embeddings=1024),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
    )
    random_weights(LlavaNextForConditionalGeneration(config)).save_pretrained(folder / "vlm")
    processor.save_pretrained(folder / "vlm")


def write_other_models(folder: Path) -> None:
    """Write an OpenFlamingo, and a LLaVA with a second encoder beside CLIP."""
    import tiny_flamingo
    from test_llava_mof import write_expert

    from kuea_mllm.adapters.llava_mof.adapter import LlavaMofAdapter

    tokenizer = tiny_flamingo.tiny_tokenizer()
    # The blank that its prompt lacks is a part of them.
    tokenizer.add_tokens([f" {word}" for word in ("True", "False", "Yes", "No", *LETTERS)])
    vars(tiny_flamingo)["tiny_tokenizer"] = lambda: tokenizer
    tiny_flamingo.save_tiny_base(folder / "flamingo")
    config = read_json(folder / "flamingo" / "config.json")
    config["text_config"]["max_position_embeddings"] = 2048
    write_json(folder / "flamingo" / "config.json", config)
    expert = write_expert(folder / "expert", width=32)
    LlavaMofAdapter().import_released(
        folder / "llava", folder / "mof", tower=str(expert), command=None
    )


@contextmanager
def short_answers() -> Iterator[None]:
    """Let models write a few tokens of the thousand that they may."""
    from transformers import GenerationMixin

    generate = GenerationMixin.generate

    def few(self: Any, *inputs: Any, max_new_tokens: int, **options: Any) -> Any:
        return generate(self, *inputs, max_new_tokens=min(max_new_tokens, 6), **options)

    vars_of: Any = GenerationMixin
    vars_of.generate = few
    try:
        yield
    finally:
        vars_of.generate = generate


def message_of(run: Callable[[], Any]) -> str:
    try:
        run()
    except KueaError as error:
        return str(error)
    return "no error"


def run_everything(folder: Path) -> None:
    places = ("unit/evaluation", "adapters", "adapters/openflamingo")
    sys.path += [str(TESTS / place) for place in places]
    import torch
    from lmms_eval.api.task import ConfigurableTask
    from suite_data import make_hub_copies, make_suite_data
    from tenacity import wait_none

    from kuea_mllm.evaluation import runner

    # lmms-eval collects garbage twice after each task, and all libraries are there to be looked at.
    gc.freeze()
    torch.set_num_threads(1)
    ConfigurableTask.download.retry.wait = wait_none()
    ConfigurableTask.process_results.retry.wait = wait_none()
    own = {name: str(path) for name, path in make_suite_data(folder / "data").items()}
    copies = {name: str(path) for name, path in make_hub_copies(folder / "hub").items()}
    copies |= {name: own[name] for name in ("vsr", "tallyqa")}
    write_models(folder)
    write_other_models(folder)
    for name in ("scripted", "model-baseline", "model-candidate"):
        # Only their files are looked at.
        shutil.copytree(folder / "llava", folder / name)
    find = runner.choose_adapter

    def score(out: str, model: str, data: Any, columns: Any = None, **options: Any) -> Any:
        named = {key: options.pop(key) for key in ("name", "protocol") if key in options}
        return runner.evaluate(
            folder / model,
            [],
            folder / out,
            suite=SuiteSettings(**{"name": "llava-paper", **named}, columns=columns),
            **{"device": "cpu", "show_progress": False, "thumbnails": 1, "limit_seed": 0},
            **{"data": data, **options},
        )

    vars(runner)["choose_adapter"] = lambda *_: Scripted()
    for protocol in BY_HAND:
        data = copies if protocol == "lmms-eval" else own
        score(f"scripted-{protocol}", "scripted", data, protocol=protocol)
    score("stock-limited", "scripted", copies, ["RefCOCO", "MMVP"], protocol="lmms-eval", limit=3)
    write_json(folder / "stock-resumed.json", resume_stock(folder, copies, score))
    run_pair(folder, own)
    write_json(folder / "errors.json", collect_mistakes(folder, own, score))
    vars(runner)["choose_adapter"] = find
    with short_answers():
        score("llava-paper", "llava", own)
        score("llava-padded", "llava", own, [*BOXES], protocol="padded")
        for name in ("vlm", "flamingo", "mof"):
            score(f"{name}-paper", name, own)
        score("flamingo-padded", "flamingo", own, ["RefCOCO"], protocol="padded")
        score("flamingo-wild", "flamingo", copies, ["llava-wild"], protocol="lmms-eval")


def resume_stock(folder: Path, copies: Mapping[str, str], score: Any) -> dict[str, Any]:
    """Stop in the second of two stock columns, and go on with another copy of the first's data."""
    import pyarrow.parquet
    from PIL import Image

    from kuea_mllm.evaluation import runner
    from kuea_mllm.evaluation.unfinished import unfinished_path

    class Stopped(Scripted):
        def generate(self, requests: Sequence[Any], **options: Any) -> list[str]:
            if not requests[0].prompt.startswith("Bounding box"):
                raise KeyboardInterrupt
            return super().generate(requests, **options)

    def run(**options: Any) -> str:
        columns = ["RefCOCO", "MMVP"]
        named = {"protocol": "lmms-eval", "limit": 3}
        return message_of(
            lambda: score("stock-resumed", "scripted", copies, columns, **named, **options)
        )

    vars(runner)["choose_adapter"] = lambda *_: Stopped()
    with suppress(KeyboardInterrupt):
        run()
    path = unfinished_path(folder / "stock-resumed") / "columns"
    log: dict[str, Any] = {"finished before": [column.name for column in path.iterdir()]}
    vars(runner)["choose_adapter"] = lambda *_: Scripted()
    (file,) = Path(copies["refcoco"]).rglob("*.parquet")
    before = file.read_bytes()
    table = pyarrow.parquet.read_table(file)
    rows = table.to_pylist()
    picture = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(picture, "PNG")
    for row in rows:
        row["image"]["bytes"] = picture.getvalue()
    changed = pyarrow.Table.from_pylist(rows, schema=table.schema)
    pyarrow.parquet.write_table(changed, file)
    log["changed"] = run(resume=True)
    file.write_bytes(before)
    log["restored"] = run(resume=True)
    return log


def collect_mistakes(folder: Path, own: Mapping[str, str], score: Any) -> dict[str, str]:
    broken = folder / "broken"
    lines = Path(own["vsr"], "test.jsonl").read_text()
    (broken / "vsr").mkdir(parents=True)
    path = broken / "vsr" / "test.jsonl"
    path.write_text(lines)

    def ask(data: Any, **options: Any) -> str:
        return message_of(lambda: score("never", "scripted", data, ["vsr"], **options))

    errors = {"image": ask({"vsr": str(broken / "vsr")}), "folder": ask({})}
    path.write_text(lines.replace('"caption"', '"captoin"'))
    errors["schema"] = ask({"vsr": str(broken / "vsr")})
    errors["copy"] = message_of(
        lambda: score("never", "scripted", own, ["pope"], protocol="lmms-eval")
    )
    return errors


def run_pair(folder: Path, own: Mapping[str, str]) -> None:
    """Evaluate two models against each other, interrupted between them and resumed."""
    from kuea_mllm.config.evaluate import EvalRecipe
    from kuea_mllm.config.recipes import recipe_to_yaml
    from kuea_mllm.evaluation import runner
    from kuea_mllm.workflows.against import evaluate_pair

    models = {}
    for name in ("baseline", "candidate"):
        models[name] = folder / f"model-{name}"
    content = {"kind": "eval", "suite": {"name": "quick"}, "limit": 4, "data": dict(own)}
    said = {models["baseline"]: Scripted(always="nothing"), models["candidate"]: Scripted()}
    done: list[str] = []
    stop_at: list[str] = ["candidate"]
    errors: dict[str, str] = {}

    def go(resume: bool, **changes: Any) -> None:
        recipe = EvalRecipe.parse({**content, **changes}, origin="test")

        def run(model: Path, out: Path, going_on: bool) -> Any:
            if out.name in stop_at:
                raise KeyboardInterrupt
            vars(runner)["choose_adapter"] = lambda *_: said[model]
            summary = runner.evaluate(
                model,
                [],
                out,
                device="cpu",
                show_progress=False,
                recipe=recipe_to_yaml(recipe),
                suite=recipe.suite,
                data=recipe.data,
                limit=recipe.limit,
                limit_seed=recipe.limit_seed,
                resume=going_on,
            )
            done.append(out.name)
            return summary

        evaluate_pair(
            models,
            folder / "pair",
            run,
            recipe=recipe_to_yaml(recipe),
            device="cpu",
            resume=resume,
            restart=False,
        )

    try:
        go(resume=False)
    except KeyboardInterrupt:
        before = list(done)
    stop_at.clear()
    done.clear()
    errors["neither"] = message_of(lambda: go(resume=False))
    errors["recipe"] = message_of(lambda: go(resume=True, limit=5))
    changed = models["baseline"] / "changed.json"
    changed.write_text("{}")
    errors["model"] = message_of(lambda: go(resume=True))
    changed.unlink()
    go(resume=True, batch_size=2)
    errors["complete"] = message_of(lambda: go(resume=True))
    log = {"finished_before_interruption": before, "evaluated_after": done, "errors": errors}
    write_json(folder / "pair.json", log)
    vars(runner)["choose_adapter"] = lambda *_: Scripted()


if __name__ == "__main__":
    run_everything(Path(sys.argv[1]))
