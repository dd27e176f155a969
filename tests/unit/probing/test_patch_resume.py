"""A patch probe that was killed between or inside of epochs goes on, with equal numbers."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_samples import write_colours
from torch import Tensor, nn

from kuea_mllm.errors import DataError, UserError
from kuea_mllm.log import LOGGER
from kuea_mllm.probing.patch_checkpoint import FILE
from kuea_mllm.probing.patch_heads import Task, TokenShape
from kuea_mllm.probing.patch_labels import LabelledPictures, open_coco_stuff
from kuea_mllm.probing.patch_order import epoch_order
from kuea_mllm.probing.patch_tally import Tally
from kuea_mllm.probing.patch_training import PatchSettings, TokenEncoder, train_heads

HOW = PatchSettings(epochs=3, batch_size=4, lr=5e-2, warmup_steps=2, workers=0)
SHAPE = TokenShape(width=12, heads=2, prefix=1, patches=4)
BATCHES = 3 + 2  # of an epoch: twelve pictures to train on, six to score
CHECK = 1

Found = list[dict[Task, Tally]]
Coco = tuple[LabelledPictures, LabelledPictures]


class Colours(nn.Module):
    """Tokens that hold the mean colour of their patch; ends at a call, however it is told to."""

    def __init__(self, last: int | None = None, *, is_killed: bool = False) -> None:
        super().__init__()
        self.calls, self.last, self.is_killed = 0, last, is_killed

    def forward(self, pixels: Tensor) -> Tensor:
        if self.calls == self.last:
            if self.is_killed:
                os.kill(os.getpid(), 9)
            raise KeyboardInterrupt
        self.calls += 1
        means = nn.functional.avg_pool2d(pixels, 8).flatten(2).transpose(1, 2)  # (n, 4, 3)
        patches = nn.functional.pad(4 * (means - 0.5), (0, 9))
        return torch.cat([patches.mean(1, keepdim=True), patches], dim=1)


def encoder(module: nn.Module | None = None, fingerprint: str = "colours") -> TokenEncoder:
    return TokenEncoder(module or Colours(), SHAPE, 16, 8, fingerprint, "mean colours")


def open_coco(folder: Path) -> Coco:
    return open_coco_stuff(folder, "train"), open_coco_stuff(folder, "val")


@pytest.fixture
def coco(tmp_path: Path) -> Coco:
    write_colours(tmp_path, "train", 12, seed=1)
    write_colours(tmp_path, "val", 6, seed=2)
    return open_coco(tmp_path)


def stop_in_epoch(coco: Coco, kept: Path, epoch: int, how: PatchSettings = HOW) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_heads(encoder(Colours(CHECK + (epoch - 1) * BATCHES + 1)), *coco, how, kept)


def require_equal(one: Found, other: Found) -> None:
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        assert first.keys() == second.keys()
        for task in first:
            for field in dataclasses.fields(Tally):
                values = [getattr(each[task], field.name) for each in (first, second)]
                assert values[0].dtype == values[1].dtype
                assert np.array_equal(*values)


def heads_of(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    from kuea_mllm.probing import patch_training

    made: list[nn.Module] = []
    make_head = patch_training.make_head

    def keep(*arguments: Any, **options: Any) -> nn.Module:
        made.append(make_head(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(patch_training, "make_head", keep)
    return made


def test_resumed_training_ends_in_the_bits_of_an_uninterrupted_one(
    coco: Coco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = heads_of(monkeypatch)
    whole = train_heads(encoder(), *coco, HOW)
    expected = [head.state_dict() for head in made]
    stop_in_epoch(coco, tmp_path / "kept", 2)
    stop_in_epoch(coco, tmp_path / "kept", 2)  # after the first, which is not trained again
    made.clear()
    module = Colours()
    resumed = train_heads(encoder(module), *coco, HOW, tmp_path / "kept")
    assert module.calls == CHECK + BATCHES
    require_equal(resumed, whole)
    assert whole[-1]["local"].claimed.any()
    for head, weights in zip(made, expected, strict=True):
        for name, value in head.state_dict().items():
            assert torch.equal(value, weights[name])


def test_killed_process_goes_on_with_equal_numbers(coco: Coco, tmp_path: Path) -> None:
    """SIGKILL in the second epoch: nothing of the process could tidy up."""
    code = (
        "import sys; from pathlib import Path; from test_patch_resume import *; "
        "where = Path(sys.argv[1]); "
        "module = Colours(CHECK + BATCHES + 2, is_killed=True); "
        "train_heads(encoder(module), *open_coco(where), HOW, where / 'kept')"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -9, killed.stderr.decode()
    assert (tmp_path / "kept" / FILE).is_file()
    module = Colours()
    resumed = train_heads(encoder(module), *coco, HOW, tmp_path / "kept")
    assert module.calls == CHECK + 2 * BATCHES
    require_equal(resumed, train_heads(encoder(), *coco, HOW))


def test_finished_training_is_not_repeated(coco: Coco, tmp_path: Path) -> None:
    whole = train_heads(encoder(), *coco, HOW, tmp_path / "kept")
    module = Colours()
    require_equal(train_heads(encoder(module), *coco, HOW, tmp_path / "kept"), whole)
    assert module.calls == CHECK


@pytest.mark.parametrize("what", ["tower", "settings", "training pictures", "validation pictures"])
def test_kept_epochs_of_something_else_are_refused(coco: Coco, tmp_path: Path, what: str) -> None:
    stop_in_epoch(coco, tmp_path / "kept", 2)
    how, other = HOW, encoder()
    if what == "tower":
        other = encoder(fingerprint="another")
    elif what == "settings":
        how = dataclasses.replace(HOW, lr=1e-2)
    else:
        split = "train" if what.startswith("train") else "val"
        folder = tmp_path / "annotations" / f"{split}2017"
        first, second = sorted(folder.iterdir())[:2]
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    with pytest.raises(UserError, match=f"--resume: the {what} of the patch probe changed"):
        train_heads(other, *coco, how, tmp_path / "kept")


def test_number_of_workers_may_change_between_sittings(coco: Coco, tmp_path: Path) -> None:
    stop_in_epoch(coco, tmp_path / "kept", 2, dataclasses.replace(HOW, workers=1))
    resumed = train_heads(encoder(), *coco, HOW, tmp_path / "kept")
    require_equal(resumed, train_heads(encoder(), *coco, HOW))


def test_damaged_file_of_epochs_is_one_clear_line(coco: Coco, tmp_path: Path) -> None:
    stop_in_epoch(coco, tmp_path / "kept", 2)
    path = tmp_path / "kept" / FILE
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match=rf"the kept epochs .*{FILE} are damaged"):
        train_heads(encoder(), *coco, HOW, tmp_path / "kept")


def test_full_disk_costs_an_epoch_at_a_stop_and_not_the_training(
    coco: Coco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from kuea_mllm.probing import patch_checkpoint

    monkeypatch.setattr(LOGGER, "propagate", True)  # off once a command has run
    stop_in_epoch(coco, tmp_path / "kept", 2)
    before = (tmp_path / "kept" / FILE).read_bytes()

    def write_half(_: Any, path: Path, __: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(patch_checkpoint, "save_file", write_half)
    found = train_heads(encoder(), *coco, HOW, tmp_path / "kept")
    assert "no space left on device" in caplog.text
    assert "Epoch 2 is not kept" in caplog.text
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [FILE]
    assert (tmp_path / "kept" / FILE).read_bytes() == before
    require_equal(found, train_heads(encoder(), *coco, HOW))


def test_order_of_an_epoch_is_that_of_a_shuffling_loader() -> None:
    """As long as the loader reads no batch ahead."""
    generator = torch.Generator().manual_seed(3)
    data: Any = list(range(7))
    loader = torch.utils.data.DataLoader(data, shuffle=True, generator=generator)
    for epoch in range(3):
        batches = iter(loader)
        seen = [int(next(batches)) for _ in data]
        assert seen == epoch_order(7, 3, epoch).tolist()
