"""Images and models small enough to build a target cache of them in milliseconds."""

import functools
import hashlib
import multiprocessing
import multiprocessing.forkserver
import os
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from kuea_mllm.alignment.target_build import build_missing
from kuea_mllm.alignment.target_cache import Embedder, open_stores
from kuea_mllm.errors import UnreadableImage

SIZE, COUNT, WIDTH = 8, 200, 16
CPU = torch.device("cpu")


class Source:
    def name(self, position):
        return f"picture-{position}.png"


class Pictures(torch.utils.data.Dataset):
    """Each picture a function of its position; `changed` ones are of another day."""

    def __init__(self, count=COUNT, *, changed=(), broken=(), replace=False, augment="none"):
        self.count, self.changed, self.broken, self.replace = count, changed, broken, replace
        self.augment = augment
        self.source = Source()
        self.reads = 0

    def __len__(self):
        return self.count

    def __getitem__(self, draw):
        position = draw % self.count
        self.reads += 1
        if position in self.broken:
            if not self.replace:
                raise UnreadableImage(f"image picture-{position}.png cannot be read: torn.")
            position += 1
        seed = position + 10_000 * (position in self.changed)
        pixels = np.random.default_rng(seed).integers(0, 256, (3, SIZE, SIZE), dtype=np.uint8)
        checksum = zlib.crc32(pixels)
        return {"pixels": torch.from_numpy(pixels), "index": position, "checksum": checksum}


class Encoder(nn.Module):
    """Two layers, so that rounding depends on how a batch is cut, as in a real tower."""

    def __init__(self, seed=0, width=WIDTH, pause=0.0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 64), nn.GELU(), nn.Linear(64, width)
        ).eval()
        self.pause, self.calls, self.batches = pause, 0, []

    def forward(self, pixels01):
        self.calls += 1
        self.batches.append(len(pixels01))
        time.sleep(self.pause)
        return self.net(pixels01)


def embedder(module, **changes):
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.numpy().tobytes())
    fields = {
        "fingerprint": digest.hexdigest(),
        "width": WIDTH,
        "module": module,
        "description": "a tiny encoder",
    }
    return Embedder(**{**fields, **changes})


def embedders(pause=0.0):
    return {
        "teacher_0": embedder(Encoder(1, pause=pause)),
        "original": embedder(Encoder(2)),
    }


def opened(root, models, *, count=COUNT, source="sha256:listing", transform="t", precision="fp32"):
    return open_stores(
        Path(root),
        source_fingerprint=source,
        population=count,
        transform_fingerprint=transform,
        embedders=models,
        precision=precision,
    )


def build(root, *, positions=None, models=None, dataset=None, **settings):
    """Build the cache of the fake world; returns its stores and the report."""
    models = models or embedders()
    dataset = dataset or Pictures()
    precision = settings.get("precision", "fp32")
    stores = opened(root, models, count=len(dataset), precision=precision)
    positions = np.arange(len(dataset)) if positions is None else positions
    settings = {"device": CPU, "batch_size": 16, "commit_seconds": 0.0, **settings}
    report = build_missing(stores, dataset, positions, models, **settings)
    return stores, report


class Builder:
    """A process that builds the cache slowly, so that a test can kill it, or build beside it."""

    def __init__(self, root, pause, *, workers=0):
        context = _fork_server()
        self._receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_build_slowly, args=(root, pause, workers, sender))
        self.process.start()
        sender.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self._receiver.close()
        self.process.close()

    @property
    def is_running(self):
        return self.process.is_alive()

    def kill(self):
        self.process.kill()
        self.process.join()

    def computed(self):
        """Wait for its end and return how many images it computed."""
        self.process.join(60)
        assert self.process.exitcode == 0
        return self._receiver.recv()


@functools.cache
def _fork_server():
    """Start a process that imports torch once: a fresh interpreter would take seconds each time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fake_targets"])
    before = os.environ.get("PYTHONPATH")
    # The server finds what it preloads by this alone (Python 3.11 does not hand on sys.path).
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def _build_slowly(root, pause, workers, sender):
    torch.set_num_threads(1)
    # Its own lock is a named semaphore, which a killed process leaves behind.
    tqdm.set_lock(threading.RLock())
    _, report = build(root, models=embedders(pause), workers=workers, commit_seconds=0.01)
    sender.send(report.computed)
    sender.close()
