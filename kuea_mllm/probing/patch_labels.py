"""What is to be seen in each patch of a picture: COCO 2017 with the label maps of COCO-Stuff.

After the probing benchmark of Covert et al.: pictures and label maps are cut to their largest
centred square and brought to the size of the tower, label maps by nearest neighbour. The classes of
a patch are all those that one of its pixels has; "unlabeled" counts only where there is no other.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kuea_mllm.data.folder import FolderImages
from kuea_mllm.data.source import ImageSource, read_image
from kuea_mllm.data.transforms import resizable, to_channels_first
from kuea_mllm.errors import DataError
from kuea_mllm.probing.datasets.content import sample_checksums
from kuea_mllm.probing.datasets.dataset import SomeImages, total_count

Flags = NDArray[np.bool_]

UNLABELED = 0
_NAMES = """unlabeled|person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|
fire hydrant|street sign|stop sign|parking meter|bench|bird|cat|dog|horse|sheep|cow|elephant|bear|
zebra|giraffe|hat|backpack|umbrella|shoe|eye glasses|handbag|tie|suitcase|frisbee|skis|snowboard|
sports ball|kite|baseball bat|baseball glove|skateboard|surfboard|tennis racket|bottle|plate|
wine glass|cup|fork|knife|spoon|bowl|banana|apple|sandwich|orange|broccoli|carrot|hot dog|pizza|
donut|cake|chair|couch|potted plant|bed|mirror|dining table|window|desk|toilet|door|tv|laptop|mouse|
remote|keyboard|cell phone|microwave|oven|toaster|sink|refrigerator|blender|book|clock|vase|
scissors|teddy bear|hair drier|toothbrush|hair brush|banner|blanket|branch|bridge|building-other|
bush|cabinet|cage|cardboard|carpet|ceiling-other|ceiling-tile|cloth|clothes|clouds|counter|cupboard|
curtain|desk-stuff|dirt|door-stuff|fence|floor-marble|floor-other|floor-stone|floor-tile|floor-wood|
flower|fog|food-other|fruit|furniture-other|grass|gravel|ground-other|hill|house|leaves|light|mat|
metal|mirror-stuff|moss|mountain|mud|napkin|net|paper|pavement|pillow|plant-other|plastic|platform|
playingfield|railing|railroad|river|road|rock|roof|rug|salad|sand|sea|shelf|sky-other|skyscraper|
snow|solid-other|stairs|stone|straw|structural-other|table|tent|textile-other|towel|tree|vegetable|
wall-brick|wall-concrete|wall-other|wall-panel|wall-stone|wall-tile|wall-wood|water-other|
waterdrops|window-blind|window-other|wood"""
COCO_STUFF_CLASSES = tuple(_NAMES.replace("\n", "").split("|"))
"""Names of the classes by number; 183 with "unlabeled", which is number 0."""

_YEAR = "2017"
# Of pictures and of label maps; a split may be called with its year or without.
_IMAGE_FOLDERS = ("images/{split}2017", "{split}2017", "images/{split}", "{split}")
_LABEL_FOLDERS = (
    "annotations/{split}2017",
    "stuffthingmaps/{split}2017",
    "annotations/{split}",
    "stuffthingmaps/{split}",
)


@dataclass(frozen=True, eq=False)
class LabelledPictures:
    """Pictures and the class of each of their pixels.

    Attributes:
        split: "train" or "val".
        images: The pictures.
        labels: Folder of their label maps, `<name of the picture>.png`.
    """

    split: str
    images: ImageSource
    labels: Path

    def __len__(self) -> int:
        return len(self.images)

    @property
    def total(self) -> int:
        """Pictures of the whole split, of which a limit may have left only some."""
        return total_count(self.images)

    def name(self, index: int) -> str:
        """Return the name of a picture, which its label map shares."""
        return Path(self.images.name(index)).stem

    def label_file(self, index: int) -> Path:
        """Return the label map of a picture."""
        return self.labels / f"{self.name(index)}.png"

    def read(self, index: int, side: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Return the largest centred square of a picture and the classes of its pixels.

        Args:
            index: Position of the picture.
            side: Side of the square in pixels.

        Returns:
            Pixels, (3, side, side), and classes in 0..182, (side, side).

        Raises:
            UnreadableImage: If one of the two files is damaged.
            DataError: If the label map is of another size than the picture, has several channels,
                or holds a value that is no class.
        """
        picture, path = resizable(self.images.read(index)), self.label_file(index)
        stored = read_image(path)
        if stored.size != picture.size:
            raise DataError(
                f"label map {path} has {stored.width} x {stored.height} pixels, its picture "
                f"{picture.width} x {picture.height}.",
                "It belongs to another picture; unpack stuffthingmaps_trainval2017.zip again.",
            )
        if stored.mode not in ("L", "P"):
            raise DataError(
                f"label map {path} is a picture of mode {stored.mode}, not one number per pixel.",
                "Use the maps of stuffthingmaps_trainval2017.zip.",
            )
        pixels = _cut(picture).resize((side, side), Image.Resampling.BILINEAR)
        classes = Image.fromarray(class_numbers(np.asarray(stored), str(path)))
        classes = _cut(classes).resize((side, side), Image.Resampling.NEAREST)
        return to_channels_first(pixels), np.asarray(classes)

    def limited(self, count: int) -> LabelledPictures:
        """Return the same with `count` of its pictures, spread evenly over the listing."""
        if count >= len(self):
            return self
        chosen = np.linspace(0, len(self) - 1, count).round().astype(np.int64)
        return replace(self, images=SomeImages(self.images, chosen))

    def fingerprint(self) -> str:
        """Hash names and sizes of pictures and label maps."""
        digest = hashlib.sha256(self.images.fingerprint().encode())
        for index in range(len(self)):
            path = self.label_file(index)
            digest.update(f"{path.name}:{path.stat().st_size};".encode())
        return f"sha256:{digest.hexdigest()}"

    def content_fingerprint(self) -> str:
        """Hash the same, and the pixels of a few pictures and label maps."""
        pixels = sample_checksums(len(self), self.images.read)
        maps = sample_checksums(len(self), lambda index: read_image(self.label_file(index)))
        content = json.dumps([self.fingerprint(), pixels, maps])
        return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"


def open_coco_stuff(folder: Path, split: str) -> LabelledPictures:
    """Open pictures of COCO 2017 and the label maps of COCO-Stuff ("stuffthingmaps").

    Pictures lie in `images/<split>2017` or `<split>2017`, label maps in `annotations/<split>2017`
    or `stuffthingmaps/<split>2017`; `2017` may be missing.

    Args:
        folder: Folder of both.
        split: "train" or "val", with its year or without.

    Raises:
        DataError: If one of the folders is missing, or a picture has no label map; names it.
    """
    images = FolderImages(_find(folder, _IMAGE_FOLDERS, split, "pictures"))
    labels = _find(folder, _LABEL_FOLDERS, split, "label maps")
    found = LabelledPictures(split, images, labels)
    present = {path.stem for path in labels.glob("*.png")}
    missing = [i for i in range(len(found)) if found.name(i) not in present]
    if missing:
        raise DataError(
            f"picture {images.name(missing[0])} has no label map {found.label_file(missing[0])} "
            f"({len(missing)} of {len(found)} are missing).",
            "Unpack stuffthingmaps_trainval2017.zip of COCO-Stuff there.",
        )
    return found


def class_numbers(values: NDArray[np.uint8], where: str) -> NDArray[np.uint8]:
    """Return the classes of a stored label map: one more than what is stored, 0 for 255.

    Args:
        values: As stored, any shape.
        where: What to call the map in errors.

    Raises:
        DataError: If a value is no class; names it.
    """
    classes: NDArray[np.uint8] = values.astype(np.uint8) + np.uint8(1)  # 255 becomes 0
    highest = int(classes.max(initial=0))
    if highest >= len(COCO_STUFF_CLASSES):
        raise DataError(
            f"label map {where} holds the value {highest - 1}; COCO-Stuff has 0 to "
            f"{len(COCO_STUFF_CLASSES) - 2}, and 255 for unlabeled.",
            "It is no map of stuffthingmaps_trainval2017.zip.",
        )
    return classes


def patch_classes(
    classes: NDArray[np.uint8], patch: int, count: int = len(COCO_STUFF_CLASSES)
) -> Flags:
    """Return which classes each patch holds.

    Args:
        classes: Class of each pixel, (side, side).
        patch: Side of a patch; what does not fill one at the right and the bottom is left out.
        count: Number of classes.

    Returns:
        (patches, classes), row by row. "unlabeled" only in patches that hold nothing else.
    """
    grid = len(classes) // patch
    inside = classes[: grid * patch, : grid * patch]
    down, right = np.indices(inside.shape) // patch
    flags = np.zeros((grid * grid, count), dtype=np.bool_)
    flags[(down * grid + right).ravel(), inside.ravel()] = True
    flags[flags[:, UNLABELED + 1 :].any(1), UNLABELED] = False
    return flags


def picture_classes(
    classes: NDArray[np.uint8], patch: int, count: int = len(COCO_STUFF_CLASSES)
) -> Flags:
    """Return which classes a whole picture holds, "unlabeled" among them, (classes,).

    Args:
        classes: Class of each pixel, (side, side).
        patch: Side of a patch; pixels that lie in none are left out.
        count: Number of classes.
    """
    covered = len(classes) // patch * patch
    flags = np.zeros(count, dtype=np.bool_)
    flags[np.unique(classes[:covered, :covered])] = True
    return flags


def _cut(picture: Image.Image) -> Image.Image:
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def _find(folder: Path, choices: tuple[str, ...], split: str, what: str) -> Path:
    name = split.removesuffix(_YEAR)
    tried = [folder / choice.format(split=name) for choice in choices]
    for path in tried:
        if path.is_dir():
            return path
    raise DataError(
        f"{folder} holds no {what} of split {split}: neither "
        f"{' nor '.join(str(path.relative_to(folder)) for path in tried)} is there.",
        "Give the folder that COCO 2017 and stuffthingmaps_trainval2017.zip were unpacked in.",
    )
