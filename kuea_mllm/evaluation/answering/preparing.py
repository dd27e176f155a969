"""Images of the next questions, read and preprocessed by threads while the model is at work."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kuea_mllm.adapters.base import ChatRequest, PreprocessingRuntime

if TYPE_CHECKING:
    from PIL.Image import Image

    from kuea_mllm.evaluation.answering.questions import PendingQuestion

MOST_THREADS = 4
BATCHES_AHEAD = 2


class Preparer:
    """Turns questions into requests, ahead of the batches that ask for them.

    At most `BATCHES_AHEAD` batches are in memory beside the one that is answered.

    Args:
        questions: All of them.
        order: Their places, in the order in which they will be asked for.
        runtime: Preprocesses images if it can.
        batch_size: Questions of a batch.
        names_images: Whether images are looked at to know which are the same.
    """

    def __init__(
        self,
        questions: Sequence[PendingQuestion],
        order: Sequence[int],
        runtime: object,
        *,
        batch_size: int,
        names_images: bool,
    ) -> None:
        self._questions = questions
        self._waiting = iter(order)
        self._ahead = BATCHES_AHEAD * batch_size
        self._names_images = names_images
        self._runtime = runtime if isinstance(runtime, PreprocessingRuntime) else None
        self._images = _DistinctImages(self._runtime, capacity=self._ahead + batch_size)
        self._futures: dict[int, Future[Any]] = {}
        self._threads = ThreadPoolExecutor(_thread_count(), thread_name_prefix="images")

    def __enter__(self) -> Preparer:
        """Begin with the first questions."""
        self._top_up()
        return self

    def __exit__(self, *_: object) -> None:
        """Drop what nobody asked for."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def take(self, places: Sequence[int]) -> list[Future[Any]]:
        """Return the requests of the next questions, each as a finished future.

        A request is a `ChatRequest`; of a few-shot prompt it is its images as they come.
        """
        taken = []
        for place in places:
            while place not in self._futures:
                self._submit(next(self._waiting))
            taken.append(self._futures.pop(place))
        self._top_up()
        for future in taken:
            future.exception()  # waits
        return taken

    def _top_up(self) -> None:
        while len(self._futures) < self._ahead:
            place = next(self._waiting, None)
            if place is None:
                return
            self._submit(place)

    def _submit(self, place: int) -> None:
        self._futures[place] = self._threads.submit(self._prepare, self._questions[place])

    def _prepare(self, question: PendingQuestion) -> Any:
        from PIL.Image import Image

        loaded = tuple(question.load_images() or ())
        if question.settings.completes:
            return loaded
        for image in loaded:
            if not isinstance(image, Image):
                raise TypeError(f"only images are supported, the task gives {type(image).__name__}")
        images = tuple(image.convert("RGB") for image in loaded)
        if not self._names_images:
            read = () if self._runtime is None else map(self._runtime.preprocess, images)
            return ChatRequest(question.prompt, images, pixels=tuple(read))
        keys = tuple(image_key(image) for image in images)
        found = [self._images.get(key, image) for key, image in zip(keys, images, strict=True)]
        return ChatRequest(
            question.prompt,
            tuple(image for image, _ in found),
            image_keys=keys,
            pixels=() if self._runtime is None else tuple(pixels for _, pixels in found),
        )


class _DistinctImages:
    """Images by their key, each preprocessed once; the least recently used go first."""

    def __init__(self, runtime: PreprocessingRuntime | None, capacity: int) -> None:
        self._runtime = runtime
        self._capacity = capacity
        self._kept: OrderedDict[str, Future[tuple[Image, Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str, image: Image) -> tuple[Image, Any]:
        """Return the first image of this key, and what the model reads of it."""
        with self._lock:
            known = self._kept.get(key)
            future: Future[tuple[Image, Any]] = Future() if known is None else known
            self._kept[key] = future
            self._kept.move_to_end(key)
            while len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
        if known is None:
            try:
                pixels = None if self._runtime is None else self._runtime.preprocess(image)
                future.set_result((image, pixels))
            # Whoever else waits for this image has to hear of it, too.
            except Exception as error:
                future.set_exception(error)
        return future.result()


def image_key(image: Image) -> str:
    """Return a digest of the decoded pixels, which only equal images have in common."""
    digest = hashlib.blake2b(f"{image.mode} {image.size}\0".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


@contextmanager
def strict_image_files() -> Iterator[None]:
    """Make PIL refuse truncated files inside the block.

    lmms-eval switches that off for the whole process, so half an image would be scored in silence.
    """
    from PIL import ImageFile

    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _thread_count() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(MOST_THREADS, (cores or 1) - 1))
