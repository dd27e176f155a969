"""Encoder probes against clip-benchmark: the same tower, webdatasets and scores.

    python benchmarks/probe.py                                     # tiny, CPU
    python benchmarks/probe.py --size vit_l_14 --device cuda --train 20000 --test 8000

One open_clip model with random weights, and webdatasets of JPEG files in the shape of the paper's
Table 3: one labelled set (as SVHN), two label sets of the same pictures (as CLEVR's distances and
counts), one set with captions. Both sides run in turn, each stage in a process of its own, with the
same batch size and number of decoding processes:

extraction   embeddings of the three splits of the first labelled set, written to disk
linear       linear probe on those embeddings, weight decay 0 (the paper's protocol)
search       the same with clip-benchmark's search over weight decays on the third split (minutes;
             only where `--stages` names it)
all          zero-shot and linear probe of the three labelled sets, and retrieval, from nothing:
             what one tower costs

Imports are in no number; peak memory is that of the whole process, imports included. `ratio` is one
of wall times, `cpu_ratio` one of CPU seconds with those of decoding processes, which is the one to
read where other work runs on the machine. clip-benchmark's linear probe asserts CUDA: on a CPU that
assertion is stepped around. Its `accuracy`, which newer numpy does not run, is replaced by the same
sum. It brings the training features into a random order before it trains on them in random order;
the first is replaced by the order of the files (several decoding processes hand them out in
another one), so that both sides train on the same batches and their scores can be compared.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

STAGES = ("extraction", "linear", "all", "search")
DEFAULT_STAGES = STAGES[:3]
SIDES = ("clip_benchmark", "ours")
CLASSES = [f"thing {number}" for number in range(10)]
SHARDS = 8
# Heading, folder; the second and third are two label sets of the same pictures.
LABELLED = (
    ("svhn", "vtab-svhn"),
    ("distance", "vtab-clevr_closest_object_distance"),
    ("count", "vtab-clevr_count_all"),
)
TEMPLATES = ["a photo of a {c}.", "a drawing of the {c}", "this is {c}"]
WORDS = ("dog", "cat", "tree", "boat", "red", "blue", "street", "child", "snow", "table")
VISION: dict[str, dict[str, int]] = {
    "tiny": {"image_size": 64, "layers": 3, "width": 64, "head_width": 32, "patch_size": 16},
    "vit_b_16": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16},
    "vit_l_14": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14},
}
EMBEDDING = {"tiny": 64, "vit_b_16": 512, "vit_l_14": 768}
TEXT_WIDTH = {"tiny": 64, "vit_b_16": 512, "vit_l_14": 768}


def write_inputs(folder: Path, options: argparse.Namespace) -> None:
    """Write the model and both data sets."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    config: dict[str, Any] = {
        "model_cfg": {
            "embed_dim": EMBEDDING[options.size],
            "quick_gelu": True,
            "vision_cfg": VISION[options.size],
            "text_cfg": {
                "context_length": 77,
                "vocab_size": 49408,
                "width": TEXT_WIDTH[options.size],
                "heads": TEXT_WIDTH[options.size] // 64,
                "layers": 3 if options.size == "tiny" else 12,
            },
        },
        "preprocess_cfg": {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]},
    }
    torch.manual_seed(0)
    model = open_clip.CLIP(**config["model_cfg"])
    (folder / "clip").mkdir()
    (folder / "clip" / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "clip" / "open_clip_model.safetensors")
    counts = {"train": options.train, "val": options.test // 2, "test": options.test}
    for kind, (name, key) in enumerate(LABELLED):
        data = folder / "data" / key
        for number, (split, count) in enumerate(counts.items()):
            labels = [str(_factors(index)[name == "count"]) for index in range(count)]
            seed = 10 * bool(kind) + number
            _write_shards(data, split, labels, "cls", options.side, seed)
        (data / "classnames.txt").write_text("\n".join(CLASSES))
        (data / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    captions = ["\n".join(_captions(index)) for index in range(options.captioned)]
    _write_shards(folder / "data" / "flickr30k", "test", captions, "txt", options.side, 3)
    (folder / "data" / "flickr30k" / "dataset_type.txt").write_text("retrieval")


def _factors(number: int) -> tuple[int, int]:
    """Return the classes of a picture: of its hue, and of its brightness."""
    return number % len(CLASSES), number * 7 // len(CLASSES) % len(CLASSES)


def _captions(number: int) -> list[str]:
    import numpy as np

    rng = np.random.default_rng([number, 1])
    return [" ".join(rng.choice(WORDS, 8)) + f" number {number}" for _ in range(5)]


def _write_shards(
    folder: Path, split: str, texts: Sequence[str], extension: str, side: int, seed: int
) -> None:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    (folder / split).mkdir(parents=True)
    (folder / split / "nshards.txt").write_text(str(SHARDS))
    hues = np.random.default_rng(9).integers(0, 256, (len(CLASSES), 3))
    for shard, numbers in enumerate(np.array_split(np.arange(len(texts)), SHARDS)):
        with tarfile.open(folder / split / f"{shard}.tar", "w") as archive:
            for number in numbers.tolist():
                noise = rng.integers(0, 256, (6, 8, 3))
                # A hue and a brightness for each class, so that there is something to learn.
                hue, light = _factors(number)
                coarse = (noise * 3 + hues[hue]) // 4 * (len(CLASSES) + light)
                coarse //= 2 * len(CLASSES)
                picture = Image.fromarray(coarse.astype(np.uint8))
                file = io.BytesIO()
                picture.resize((side * 4 // 3, side), Image.Resampling.BICUBIC).save(
                    file, "JPEG", quality=90
                )
                stem = f"s{number:07d}"
                _add(archive, f"{stem}.{extension}", texts[number].encode())
                _add(archive, f"{stem}.jpg", file.getvalue())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


class _Device(str):
    """A device that passes for CUDA where clip-benchmark insists on it."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return other in ("cuda", str(self))


def run_theirs(stage: str, work: Path, options: argparse.Namespace) -> dict[str, float]:
    """Run one stage by clip-benchmark; return scores in percent."""
    import open_clip
    from clip_benchmark.metrics import linear_probe, zeroshot_classification, zeroshot_retrieval

    config = json.loads((work / "clip" / "open_clip_config.json").read_text())
    model: Any = open_clip.CLIP(**config["model_cfg"]).eval()
    from safetensors.torch import load_file

    model.load_state_dict(load_file(work / "clip" / "open_clip_model.safetensors"))
    model = model.to(options.device)
    tokenizer = open_clip.SimpleTokenizer()
    transform = open_clip.image_transform(
        config["model_cfg"]["vision_cfg"]["image_size"], is_train=False, **config["preprocess_cfg"]
    )
    device = options.device

    def loader(folder: Path, split: str, task: str) -> Any:
        return _their_loader(folder, split, task, transform, options)

    def probe_linearly(key: str) -> float | None:
        splits = ["train", "test", *(["val"] if stage in ("extraction", "search") else [])]
        loaders = {s: loader(work / "data" / key, s, "linear_probe")[0] for s in splits}
        with (
            _their_linear_probe(linear_probe, options, stops=stage == "extraction"),
            contextlib.suppress(_StopAfterFeaturesError),
        ):
            found = linear_probe.evaluate(
                model,
                loaders["train"],
                loaders["test"],
                fewshot_k=-1,
                batch_size=64,
                num_workers=options.workers,
                lr=0.1,
                epochs=10,
                # Its command line names features by model and data set too.
                model_id=f"{'all' if stage == 'all' else 'tower'}-{key}",
                seed=0,
                feature_root=str(work / "their_features"),
                device=_Device(device),
                val_dataloader=loaders.get("val"),
                amp=False,
            )
            return 100 * float(found["lp_acc1"])
        return None

    if stage != "all":
        score = probe_linearly(LABELLED[0][1])
        return {} if score is None else {"svhn linear": score}
    scores: dict[str, float] = {}
    for name, key in LABELLED:
        test, dataset = loader(work / "data" / key, "test", "zeroshot_classification")
        with mock.patch.object(zeroshot_classification, "accuracy", _accuracy):
            found = zeroshot_classification.evaluate(
                model, test, tokenizer, dataset.classes, dataset.templates, device, amp=False
            )
        scores[name] = 100 * float(found["acc1"])
        scores[f"{name} linear"] = probe_linearly(key) or 0.0
    pairs, _ = loader(work / "data" / "flickr30k", "test", "zeroshot_retrieval")
    found = zeroshot_retrieval.evaluate(
        model, pairs, tokenizer, device, amp=False, recall_k_list=[1, 5, 10]
    )
    for k in (1, 5, 10):
        scores[f"flickr I2T R@{k}"] = 100 * float(found[f"text_retrieval_recall@{k}"])
        scores[f"flickr T2I R@{k}"] = 100 * float(found[f"image_retrieval_recall@{k}"])
    return scores


def _their_loader(
    folder: Path, split: str, task: str, transform: Any, options: argparse.Namespace
) -> tuple[Any, Any]:
    import torch
    from clip_benchmark.datasets.builder import build_dataset, image_captions_collate_fn

    dataset = build_dataset("wds/local", str(folder), transform=transform, split=split, task=task)
    is_retrieval = task == "zeroshot_retrieval"
    batches = (
        dataset.batched(options.batch, collation_fn=image_captions_collate_fn)
        if is_retrieval
        else dataset.batched(options.batch)
    )
    # As its command line does for webdatasets.
    loader: Any = torch.utils.data.DataLoader(
        batches, batch_size=None, shuffle=False, num_workers=options.workers
    )
    return loader, dataset


def _accuracy(output: Any, target: Any, topk: tuple[int, ...] = (1,)) -> list[float]:
    right = output.topk(max(topk), 1)[1].eq(target[:, None])
    return [right[:, :k].any(1).double().mean().item() for k in topk]


class _StopAfterFeaturesError(Exception):
    """Ends their linear probe before anything is trained."""


@contextlib.contextmanager
def _their_linear_probe(module: Any, options: argparse.Namespace, *, stops: bool) -> Iterator[None]:
    import torch

    device = options.device
    train, infer, shuffle = module.train, module.infer, torch.randperm

    def train_plainly(*arguments: Any) -> Any:
        if stops:
            raise _StopAfterFeaturesError
        *others, _, seed = arguments
        return train(*others, device, seed)

    def in_order(*arguments: Any, **keywords: Any) -> Any:
        return shuffle(*arguments, **keywords) if keywords else _order_of_files(*arguments, options)

    with contextlib.ExitStack() as patched:
        patched.enter_context(mock.patch.object(module, "accuracy", _accuracy))
        patched.enter_context(mock.patch.object(module, "train", train_plainly))
        patched.enter_context(
            mock.patch.object(
                module, "infer", lambda layer, data, amp, _: infer(layer, data, amp, device)
            )
        )
        patched.enter_context(mock.patch.object(torch, "randperm", in_order))
        if device == "cpu":
            patched.enter_context(mock.patch.object(torch.nn.Module, "cuda", lambda self: self))
            patched.enter_context(mock.patch.object(torch.Tensor, "cuda", lambda self: self))
        yield


def _order_of_files(count: int, options: argparse.Namespace) -> Any:
    """Return the positions, in what webdataset hands out, of images in the order of the files.

    Each worker reads every so-manieth shard; their batches come in turn.
    """
    import numpy as np
    import torch

    shards = np.array_split(np.arange(count), SHARDS)
    workers = max(options.workers, 1)
    streams = [np.concatenate(shards[worker::workers]) for worker in range(workers)]
    batches = [np.split(s, range(options.batch, len(s), options.batch)) for s in streams]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*batches))
    handed_out = np.concatenate([batch for batch in turns if batch is not None])
    return torch.from_numpy(np.argsort(handed_out))


def run_ours(stage: str, work: Path, options: argparse.Namespace) -> dict[str, float]:
    """Run one stage by the code behind `kuea-mllm probe`; return scores in percent."""
    from kuea_mllm.config.probe import ProbeRecipe
    from kuea_mllm.probing.datasets.open import open_dataset
    from kuea_mllm.probing.features import extract
    from kuea_mllm.probing.linear import probe_linear
    from kuea_mllm.probing.linear_training import LinearSettings
    from kuea_mllm.workflows.probe_subject import open_subject
    from kuea_mllm.workflows.probe_suites import ProbePlace, plan_jobs, run_job

    subject = open_subject(str(work / "clip"), device=options.device)
    place = ProbePlace(work / "data", options.device, workers=options.workers)
    shared: dict[str, Any] = {"kind": "probe", "batch_size": options.batch}
    labelled: list[dict[str, Any]] = [
        {"name": name, "key": key, "source": "here", "layout": "wds", "documents": options.test}
        for name, key in LABELLED
    ]
    pairs = {**labelled[0], "name": "flickr", "key": "flickr30k", "documents": options.captioned}
    linear = [{**one, "train_split": "train", "metric": "lp_acc1"} for one in labelled]
    contents: list[dict[str, Any]] = [
        {"suite": "zero-shot", "datasets": [{**one, "metric": "acc1"} for one in labelled]},
        {"suite": "linear", "linear": {}, "datasets": linear},
        {"suite": "retrieval", "datasets": [{**pairs, "metric": "recall@k"}]},
    ]
    recipes = [ProbeRecipe.parse({**shared, **one}, origin="of the benchmark") for one in contents]
    if stage == "all":
        found = [run_job(job, subject, place) for job in plan_jobs(recipes)]
        return {column.name: column.score for one in found for column in one.columns}
    job = plan_jobs(recipes[1:2])[0]
    if stage == "linear":
        return {"svhn linear": run_job(job, subject, place).columns[0].score}
    splits = {s: open_dataset(job.data, place.data, split=s) for s in ("train", "test", "val")}
    how = place.extraction(job.recipe)
    stores = {s: extract(splits[s].images, subject.embedder(), how) for s in splits}
    if stage == "extraction":
        return {}
    rows = {split: store.embeddings for split, store in stores.items()}
    column = probe_linear(
        rows["train"],
        splits["train"],
        rows["test"],
        splits["test"],
        validation=(rows["val"], splits["val"]),
        how=LinearSettings(device=options.device),
    )
    return {"svhn linear": column.score}


def run_stage(side: str, stage: str, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run one stage of one side in this process and measure it."""
    import clip_benchmark.metrics.linear_probe
    import open_clip
    import transformers

    import kuea_mllm.workflows.probe_suites  # noqa: F401 - imports are in no number

    _ = clip_benchmark, open_clip, transformers
    run = run_theirs if side == "clip_benchmark" else run_ours
    before = _cpu_seconds()
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        scores = run(stage, work, options)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": _cpu_seconds() - before,
        "peak_gib": _peak_gib(options.device),
        "scores": scores,
    }


def _cpu_seconds() -> float:
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _peak_gib(device: str) -> dict[str, float]:
    import torch

    found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if device.startswith("cuda"):
        found["device"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def measure(work: Path, options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Run the stages of both sides in turn, and say so as each ends."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {
        stage: {side: [] for side in SIDES} for stage in options.stages
    }
    for number in range(1, options.rounds + 1):
        for stage in options.stages:
            _forget(work, stage)
            # The second to run finds warm file caches: each goes first in every other round.
            for side in SIDES if number % 2 else reversed(SIDES):
                run = _in_own_process(side, stage, work, arguments)
                found[stage][side].append(run)
                print(
                    f"round {number} of {options.rounds}, {stage}, {side}: "
                    f"{run['seconds']:.1f} s, {run['cpu_seconds']:.1f} CPU s",
                    file=sys.stderr,
                    flush=True,
                )
    return {stage: _summary(stage, runs, options) for stage, runs in found.items()}


def _forget(work: Path, stage: str) -> None:
    """Drop embeddings that a stage is to compute itself."""
    if stage in ("extraction", "all"):
        for folder in (work / "their_features", _our_cache(work, stage)):
            shutil.rmtree(folder, ignore_errors=True)


def _our_cache(work: Path, stage: str) -> Path:
    return work / ("our_cache_all" if stage == "all" else "our_cache")


def _in_own_process(side: str, stage: str, work: Path, arguments: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments, "--work", str(work), "--one", side, stage]
    environment = {**os.environ, "KUEA_MLLM_CACHE": str(_our_cache(work, stage))}
    answer = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if answer.returncode:
        raise RuntimeError(f"{side}, {stage}: {answer.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return result


def _summary(
    stage: str, runs: dict[str, list[dict[str, Any]]], options: argparse.Namespace
) -> dict[str, Any]:
    theirs, ours = (runs[side] for side in SIDES)
    splits = options.train + options.test + options.test // 2
    images = splits if stage == "extraction" else None
    summary: dict[str, Any] = {
        side: {
            "seconds": _median([run["seconds"] for run in runs[side]]),
            "cpu_seconds": _median([run["cpu_seconds"] for run in runs[side]]),
            "peak_gib": {
                place: round(max(run["peak_gib"][place] for run in runs[side]), 2)
                for place in runs[side][0]["peak_gib"]
            },
            "scores": runs[side][0]["scores"],
        }
        for side in SIDES
    }
    if images is not None:
        for side in SIDES:
            summary[side]["images_per_second"] = round(images / summary[side]["seconds"], 1)
    differences = [abs(theirs[0]["scores"][n] - s) for n, s in ours[0]["scores"].items()]
    return {
        **summary,
        "ratio": _ratios(theirs, ours, "seconds"),
        "cpu_ratio": _ratios(theirs, ours, "cpu_seconds"),
        "largest_score_difference": max(differences, default=None),
    }


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 2)


def _ratios(
    theirs: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]], key: str
) -> list[float]:
    """Return median, lowest and highest of the rounds' ratios."""
    ratios = [a[key] / b[key] for a, b in zip(theirs, ours, strict=True)]
    return [round(value, 2) for value in (statistics.median(ratios), min(ratios), max(ratios))]


def _hardware(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads, {os.cpu_count()} cores"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print one JSON object."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=list(VISION), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--train", type=int, default=3000, help="training images")
    parser.add_argument("--test", type=int, default=1000, help="test images")
    parser.add_argument("--captioned", type=int, default=400, help="images with five captions")
    parser.add_argument("--side", type=int, default=96, help="height of an image file")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(DEFAULT_STAGES))
    parser.add_argument("--work", type=Path, help="folder to keep inputs in")
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "STAGE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        side, stage = options.one
        print(json.dumps(run_stage(side, stage, options.work, options)))
        return
    with tempfile.TemporaryDirectory() as name:
        work = options.work or Path(name)
        work.mkdir(parents=True, exist_ok=True)
        if not (work / "clip").is_dir():
            write_inputs(work, options)
        found = measure(work, options, arguments)
    record = {
        "options": {key: str(value) for key, value in vars(options).items() if key != "one"},
        "hardware": _hardware(options.device),
        "stages": found,
    }
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
