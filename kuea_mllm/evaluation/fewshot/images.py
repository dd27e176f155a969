"""Images by their path: opened when they are needed, encoded once and kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kuea_mllm.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from torch import Tensor

    from kuea_mllm.adapters.base import FewShotRuntime

AT_ONCE = 64
"""Images that go through the tower together."""


@dataclass(frozen=True)
class StoredImage:
    """An image that is on disk."""

    path: str

    def open(self) -> Picture:
        """Decode the image, in the mode that it has.

        Raises:
            DataError: Naming the file.
        """
        from PIL import Image

        try:
            with Image.open(self.path) as file:
                file.load()
                return file
        # PIL's decoders fail in many ways.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise DataError(f"image {self.path} cannot be decoded: {reason}.") from error


class FeatureCache:
    """What the model makes of each image, computed once while it is remembered.

    Args:
        runtime: Encodes images.
        capacity: Most images that are remembered; the least recently used go first.
    """

    def __init__(self, runtime: FewShotRuntime, capacity: int) -> None:
        self.runtime = runtime
        self.capacity = capacity
        self.encoded = 0
        self.reused = 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def features(self, rows: Sequence[Sequence[StoredImage]]) -> list[list[Tensor]]:
        """Return the features of the images of each row.

        Raises:
            DataError: If an image cannot be decoded.
        """
        wanted = list(dict.fromkeys(image for row in rows for image in row))
        found = {image: self._kept[image.path] for image in wanted if image.path in self._kept}
        missing = [image for image in wanted if image not in found]
        for start in range(0, len(missing), AT_ONCE):
            part = missing[start : start + AT_ONCE]
            encoded = self.runtime.encode_images([image.open() for image in part])
            found.update(zip(part, encoded, strict=True))
        self.encoded += len(missing)
        self.reused += sum(map(len, rows)) - len(missing)
        for image in wanted:
            self._kept[image.path] = found[image]
            self._kept.move_to_end(image.path)
        while len(self._kept) > self.capacity:
            self._kept.popitem(last=False)
        return [[found[image] for image in row] for row in rows]
