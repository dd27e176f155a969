"""Patch probing: recall by hand, heads against timm's block, and a run on two colours."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_samples import write_colours, write_pair
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from kuea_mllm.errors import DataError, TowerError, TrainingDiverged
from kuea_mllm.probing.patch_heads import Block, Task, TokenShape, TransformerHead, make_head
from kuea_mllm.probing.patch_labels import LabelledPictures, open_coco_stuff
from kuea_mllm.probing.patch_tally import join, tally
from kuea_mllm.probing.patch_training import (
    PatchSettings,
    TokenEncoder,
    learning_rate,
    train_heads,
)
from kuea_mllm.probing.patches import probe_patches, tower_tokens
from kuea_mllm.towers.model.encode import TowerEncoder
from kuea_mllm.towers.spec import TowerSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "towers"))
from tower_samples import CLIP, SIGLIP, make_tower

QUICK = PatchSettings(epochs=2, batch_size=4, warmup_steps=2, workers=0)
SHAPE = TokenShape(width=12, heads=2, prefix=1, patches=4)


class Colours(nn.Module):
    """Tokens that hold the mean colour of their patch, class token first."""

    def forward(self, pixels: Tensor) -> Tensor:
        means = nn.functional.avg_pool2d(pixels, 8).flatten(2).transpose(1, 2)  # (n, 4, 3)
        patches = nn.functional.pad(4 * (means - 0.5), (0, 9))
        return torch.cat([patches.mean(1, keepdim=True), patches], dim=1)


def colour_encoder(module: nn.Module | None = None) -> TokenEncoder:
    return TokenEncoder(module or Colours(), SHAPE, 16, 8, "colours", "mean colours")


@pytest.fixture
def coco(tmp_path: Path) -> tuple[LabelledPictures, LabelledPictures]:
    write_colours(tmp_path, "train", 12, seed=1)
    write_colours(tmp_path, "val", 6, seed=2)
    return open_coco_stuff(tmp_path, "train"), open_coco_stuff(tmp_path, "val")


def test_macro_recall_is_the_one_by_hand() -> None:
    """Two pictures of two patches, four classes; class 3 is nowhere."""
    flags = torch.tensor([[[1, 0, 1, 0], [1, 0, 0, 0]], [[0, 1, 0, 0], [1, 1, 0, 0]]]).bool()
    logits = torch.tensor(
        [
            [[0.1, 9.0, -0.1, 9.0], [-1.0, -1.0, -1.0, -1.0]],
            [[-1.0, 1e-6, -1.0, -1.0], [2.0, 0.0, -1.0, -1.0]],
        ]
    )
    found = tally(logits, flags)
    assert found.hits.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
    assert found.positives.tolist() == [[2, 0, 1, 0], [1, 2, 0, 0]]
    assert found.claimed.tolist() == [[True, True, False, True], [True, True, False, False]]
    # Class 0: 2 of 3 patches; class 1: 1 of 2 (a logit of 0 is no claim); class 2: 0 of 1.
    assert found.macro_recall == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)


def test_recall_is_over_all_pictures_and_no_mean_of_batches() -> None:
    flags = torch.zeros(3, 1, 2).bool()
    flags[:, 0, 0] = True
    logits = torch.tensor([[[1.0, -1.0]], [[-1.0, -1.0]], [[-1.0, -1.0]]])
    parts = [tally(logits[:1], flags[:1]), tally(logits[1:], flags[1:])]
    assert join(parts).macro_recall == pytest.approx(100 / 3)


def test_learning_rate_rises_in_a_line_and_falls_along_a_cosine() -> None:
    how = PatchSettings()
    assert [learning_rate(step, 1000, how) for step in (0, 250, 499)] == pytest.approx(
        [0.0, 5e-4, 9.98e-4]
    )
    # The cosine is at its middle when the warm-up of 500 steps ends.
    assert learning_rate(500, 1000, how) == pytest.approx((1e-3 + 1e-4) / 2)
    assert learning_rate(999, 1000, how) == pytest.approx(1e-4, rel=1e-4)


def test_block_equals_that_of_timm() -> None:
    torch.manual_seed(0)
    theirs = TimmBlock(12, 2, qkv_bias=False, init_values=0.01)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = Block(12, 2)
    names = {
        "norm1.weight": "norm_attention.weight",
        "norm1.bias": "norm_attention.bias",
        "attn.qkv.weight": "queries_keys_values.weight",
        "attn.proj.weight": "output.weight",
        "attn.proj.bias": "output.bias",
        "ls1.gamma": "scale_attention",
        "norm2.weight": "norm_mlp.weight",
        "norm2.bias": "norm_mlp.bias",
        "mlp.fc1.weight": "mlp.0.weight",
        "mlp.fc1.bias": "mlp.0.bias",
        "mlp.fc2.weight": "mlp.2.weight",
        "mlp.fc2.bias": "mlp.2.bias",
        "ls2.gamma": "scale_mlp",
    }
    fresh = TimmBlock(12, 2, qkv_bias=False, init_values=0.01).state_dict()
    assert torch.equal(fresh["ls1.gamma"], ours.scale_attention.detach())
    ours.load_state_dict({names[name]: value for name, value in theirs.state_dict().items()})
    tokens = torch.randn(3, 5, 12)
    torch.testing.assert_close(ours(tokens), theirs(tokens))


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_global_transformer_averages_what_its_prefix_says(prefix: int) -> None:
    shape = dataclasses.replace(SHAPE, prefix=prefix)
    head: Any = make_head("transformer", "global", shape, 5, seed=0)
    assert isinstance(head, TransformerHead)
    tokens = torch.randn(2, prefix + 4, 12)
    every = head.classifier(head.norm_after(head.blocks(head.norm_before(tokens + head.positions))))
    expected = every[:, :prefix].mean(1) if prefix else every.mean(1)
    torch.testing.assert_close(head(tokens), expected[:, None])
    local: Any = make_head("transformer", "local", shape, 5, seed=0)
    torch.testing.assert_close(local(tokens), every[:, prefix:])


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_tokenwise_heads_read_patches_or_the_class_token(kind: Any) -> None:
    tokens = torch.randn(2, 5, 12)
    local: Any = make_head(kind, "local", SHAPE, 7, seed=0)
    overall: Any = make_head(kind, "global", SHAPE, 7, seed=0)
    torch.testing.assert_close(local(tokens), local.inside(tokens[:, 1:]))
    torch.testing.assert_close(overall(tokens), overall.inside(tokens[:, :1]))
    without = dataclasses.replace(SHAPE, prefix=0)
    mean: Any = make_head(kind, "global", without, 7, seed=0)
    torch.testing.assert_close(mean(tokens), mean.inside(tokens.mean(1, keepdim=True)))


@pytest.mark.parametrize("spec", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_tokens_come_after_the_final_norm(spec: TowerSpec) -> None:
    tower = make_tower(spec, seed=1)
    encoder = tower_tokens(tower)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tokens = encoder.module(pixels)
    assert tokens.shape == (2, encoder.shape.prefix + encoder.shape.patches, spec.width)
    model: Any = tower.model
    body = getattr(model, "vision_model", model)
    last = TowerEncoder(tower).hidden_states(pixels)[-1]
    torch.testing.assert_close(tokens, body.post_layernorm(last))
    if spec.family == "clip":
        pooled = TowerEncoder(tower)(pixels)
        torch.testing.assert_close(model.visual_projection(tokens[:, 0]), pooled)


def test_tower_without_projection_has_tokens() -> None:
    tower = make_tower(CLIP, with_projection=False)
    assert tower_tokens(tower).module(torch.rand(1, 3, 16, 16)).shape == (1, 5, 64)


@pytest.mark.parametrize("head", ["transformer", "linear"])
def test_two_colours_are_told_apart(
    coco: tuple[LabelledPictures, LabelledPictures], head: Any
) -> None:
    how = dataclasses.replace(QUICK, head=head, epochs=25, lr=2e-2)
    local, overall = probe_patches(colour_encoder(), *coco, how=how)
    assert local.name == "local"
    assert overall.name == "global"
    assert local.score > 95
    for column in (local, overall):
        assert column.statistic == "macro_recall"
        assert column.details["metrics"]["last"] == column.score
        _require_score_of_counts(column)
    # Quarters are red or blue, patches are quarters: each holds one class.
    for row in local.rows:
        assert sum(positives for _, positives in (row.counts or {}).values()) == 4


def _require_score_of_counts(column: Any) -> None:
    """The score follows from the counts of the rows alone."""
    hits: dict[str, int] = {}
    positives: dict[str, int] = {}
    for row in column.rows:
        for name, (hit, positive) in row.counts.items():
            hits[name] = hits.get(name, 0) + hit
            positives[name] = positives.get(name, 0) + positive
    recalls = [hits[name] / positives[name] for name in positives]
    assert column.score == pytest.approx(100 * sum(recalls) / len(recalls))


def test_heads_trained_together_equal_heads_trained_alone(
    coco: tuple[LabelledPictures, LabelledPictures],
) -> None:
    together = train_heads(colour_encoder(), *coco, dataclasses.replace(QUICK, lr=5e-2))
    tasks: tuple[Task, ...] = ("local", "global")
    for task in tasks:
        how = dataclasses.replace(QUICK, lr=5e-2, tasks=(task,))
        alone = train_heads(colour_encoder(), *coco, how)
        for epoch, other in zip(together, alone, strict=True):
            assert np.array_equal(epoch[task].hits, other[task].hits)
            assert np.array_equal(epoch[task].claimed, other[task].claimed)
    assert together[0]["local"].claimed.any()


def test_training_is_the_one_by_hand(
    coco: tuple[LabelledPictures, LabelledPictures], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A linear head, step by step: order, loss, optimizer and schedule."""
    built: list[nn.Module] = []

    def keep(*arguments: Any, **options: Any) -> nn.Module:
        built.append(make_head(*arguments, **options))
        return built[-1]

    monkeypatch.setattr("kuea_mllm.probing.patch_training.make_head", keep)
    how = dataclasses.replace(QUICK, head="linear", tasks=("local",), lr=1e-2)
    found = train_heads(colour_encoder(), *coco, how)
    by_hand: Any = make_head("linear", "local", SHAPE, 183, seed=0)
    optimizer = torch.optim.AdamW(by_hand.parameters(), weight_decay=0.01)
    order = torch.Generator().manual_seed(0)
    for step in range(6):  # twice twelve pictures, four at a time
        if step % 3 == 0:
            torch.empty((), dtype=torch.int64).random_(generator=order)  # as every DataLoader does
            positions = torch.randperm(12, generator=order)
        chosen = positions[4 * (step % 3) :][:4].tolist()
        pairs = [coco[0].read(index, 16) for index in chosen]
        tokens = Colours()(torch.from_numpy(np.stack([pixels for pixels, _ in pairs])) / 255.0)
        answers = tokens[:, 1:] @ by_hand.inside.weight.T + by_hand.inside.bias
        truth = torch.zeros(4, 4, 183)
        for number, (_, classes) in enumerate(pairs):
            for patch, (top, left) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):
                truth[number, patch, int(classes[top, left])] = 1
        chances = answers.sigmoid()
        loss = -(truth * chances.log() + (1 - truth) * (1 - chances).log()).mean()
        optimizer.param_groups[0]["lr"] = (
            (0, 5e-3)[step] if step < 2 else learning_rate(step, 6, how)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (trained,) = built
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[name], rtol=0, atol=1e-6)
    assert len(found) == 2


def test_nothing_of_the_tower_is_trained(coco: tuple[LabelledPictures, LabelledPictures]) -> None:
    tower = make_tower(CLIP)
    before = tower.fingerprint
    columns = probe_patches(tower_tokens(tower), *coco, how=QUICK)
    assert tower.fingerprint == before
    assert len(columns[0].rows) == 6
    assert all(parameter.grad is None for parameter in tower.model.parameters())


def test_last_epoch_is_scored_unless_the_best_is_asked_for(
    coco: tuple[LabelledPictures, LabelledPictures], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = torch.ones(6, 4, 2).bool()
    right, half = torch.ones(6, 4, 2), torch.ones(6, 4, 2)
    half[..., 1] = -1
    epochs: list[dict[Task, Any]] = [
        {"local": tally(logits, flags)} for logits in (half, right, half)
    ]
    monkeypatch.setattr("kuea_mllm.probing.patches.train_heads", lambda *_: epochs)
    how = dataclasses.replace(QUICK, tasks=("local",))
    (last,) = probe_patches(colour_encoder(), *coco, how=how)
    (best,) = probe_patches(colour_encoder(), *coco, how=dataclasses.replace(how, selection="best"))
    assert (last.score, best.score) == (50, 100)
    for column in (last, best):
        metrics = column.details["metrics"]
        assert metrics["by_epoch"] == [50, 100, 50]
        assert (metrics["last"], metrics["best"], metrics["best_epoch"]) == (50, 100, 2)
    assert best.rows[0].counts == {"unlabeled": [4, 4], "person": [4, 4]}
    assert last.rows[0].counts == {"unlabeled": [4, 4], "person": [0, 4]}


def test_tokens_that_are_not_finite_name_the_picture(
    coco: tuple[LabelledPictures, LabelledPictures],
) -> None:
    class Broken(Colours):
        def forward(self, pixels: Tensor) -> Tensor:
            tokens = super().forward(pixels)
            if len(pixels) == 2:  # the second batch of the six validation pictures
                tokens[1, 0] = float("nan")
            return tokens

    with pytest.raises(TowerError, match=r"picture .*000000000005\.png hold NaN"):
        train_heads(colour_encoder(Broken()), *coco, QUICK)


def test_damaged_tower_is_refused_before_it_costs_an_epoch(
    coco: tuple[LabelledPictures, LabelledPictures],
) -> None:
    class Broken(Colours):
        calls = 0

        def forward(self, pixels: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(pixels) * float("nan")

    broken = Broken()
    with pytest.raises(TowerError, match=r"picture .*000000000000\.png hold NaN"):
        train_heads(colour_encoder(broken), *coco, QUICK)
    assert broken.calls == 1


def test_training_picture_without_finite_tokens_is_no_divergence(
    coco: tuple[LabelledPictures, LabelledPictures],
) -> None:
    class Broken(Colours):
        calls = 0

        def forward(self, pixels: Tensor) -> Tensor:
            self.calls += 1
            # The first is the check, the third the second training batch.
            return super().forward(pixels) * (float("inf") if self.calls == 3 else 1.0)

    with pytest.raises(TowerError, match="tokens of a training picture hold NaN"):
        train_heads(colour_encoder(Broken()), *coco, QUICK)


def test_divergence_is_told_from_damage(
    coco: tuple[LabelledPictures, LabelledPictures],
) -> None:
    how = dataclasses.replace(QUICK, lr=1e30, last_lr=1e30, weight_decay=1e10)
    with pytest.raises(TrainingDiverged, match="diverged in epoch 1"):
        train_heads(colour_encoder(), *coco, how)


def test_damaged_label_map_in_a_worker_is_one_clear_line(tmp_path: Path) -> None:
    write_colours(tmp_path, "train", 4)
    write_colours(tmp_path, "val", 4)
    bad = np.full((16, 16), 190, dtype=np.uint8)
    write_pair(tmp_path, "train", "000000000002", np.zeros((16, 16, 3), np.uint8), bad)
    pictures = [open_coco_stuff(tmp_path, split) for split in ("train", "val")]
    how = dataclasses.replace(QUICK, workers=1)
    with pytest.raises(DataError, match=r"^label map .*train2017/000000000002.png holds the value"):
        train_heads(colour_encoder(), *pictures, how)


def test_fewer_pictures_than_a_batch_are_refused(
    coco: tuple[LabelledPictures, LabelledPictures],
) -> None:
    with pytest.raises(DataError, match="12 training pictures are fewer than one batch of 32"):
        train_heads(colour_encoder(), *coco, PatchSettings(workers=0))
