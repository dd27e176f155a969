"""What the target cache promises: whole rows, of the right images, from any number of builders."""

import json
import os
import pickle
import random
import shutil
import time
from pathlib import Path

import fake_targets
import numpy as np
import pytest
import torch
from fake_targets import (
    COUNT,
    CPU,
    WIDTH,
    Builder,
    Encoder,
    Pictures,
    build,
    embedder,
    embedders,
    opened,
)

from kuea_mllm.alignment import target_build, target_writer
from kuea_mllm.alignment.target_cache import CachedImages, cache_root, probe_storage
from kuea_mllm.alignment.target_store import EmbeddingStore, list_stores, remove_store
from kuea_mllm.alignment.target_verify import verify_store
from kuea_mllm.alignment.target_writer import StoreWriter
from kuea_mllm.data.unreadable import SkipPolicy
from kuea_mllm.errors import (
    DataError,
    EnvironmentFailure,
    RecipeError,
    TowerError,
    UnreadableImage,
    UserError,
)


def contents(stores):
    return {
        name: (store.embeddings.tobytes(), store.checksums.tobytes(), store.done.tobytes())
        for name, store in stores.items()
    }


def wait_for_rows(root, builder, count=1):
    """Wait until a builder has finished some rows, or ended; return the stores."""
    while True:
        is_over = not builder.is_running
        stores = [store for _, store, _ in list_stores(root) if store is not None]
        if is_over or sum(int(store.done.sum()) for store in stores) >= count:
            return stores
        time.sleep(0.002)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    stores, _ = build(tmp_path_factory.mktemp("whole"))
    torch.set_num_threads(threads)
    return contents(stores)


# Keys


@pytest.mark.parametrize(
    "change",
    [
        {"source": "sha256:other"},
        {"transform": "other"},
        {"precision": "bf16"},
        {"count": COUNT + 1},
        {"models": {"original": embedder(Encoder(3))}},
        {"models": {"original": embedder(Encoder(2), storage="bfloat16")}},
    ],
)
def test_anything_that_changes_the_numbers_changes_the_store(tmp_path, change):
    models = {"original": embedder(Encoder(2))}
    first = opened(tmp_path, models)["original"]
    other = opened(tmp_path, **{"models": models, **change})["original"]
    assert first.directory != other.directory


def test_one_model_has_one_store_whatever_it_is_trained_against(tmp_path):
    teacher = embedder(Encoder(1))
    first = opened(tmp_path, {"teacher_0": teacher, "original": embedder(Encoder(2))})
    other = opened(tmp_path, {"teacher_0": teacher, "original": embedder(Encoder(3))})
    assert first["teacher_0"].directory == other["teacher_0"].directory
    assert first["original"].directory != other["original"].directory


def test_root_is_the_folder_given_then_the_variable_then_below_hf_home(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("KUEA_MLLM_CACHE", raising=False)
    assert cache_root() == tmp_path / "hf" / "kuea_mllm"
    monkeypatch.setenv("KUEA_MLLM_CACHE", str(tmp_path / "variable"))
    assert cache_root() == tmp_path / "variable"
    assert cache_root(tmp_path / "given") == tmp_path / "given"


# Building


def test_a_part_of_the_images_is_built_first_and_the_rest_later(tmp_path):
    dataset, models = Pictures(), embedders()
    quarter = np.arange(0, COUNT, 4)
    stores, report = build(tmp_path, positions=quarter, dataset=dataset, models=models)
    assert report.computed == dataset.reads == len(quarter)
    assert np.array_equal(np.flatnonzero(stores["original"].done), quarter)
    kept = contents(stores)["original"][0]
    stores, report = build(tmp_path, dataset=dataset, models=models)
    assert report.computed == COUNT - len(quarter)
    assert dataset.reads == COUNT
    assert stores["original"].done.all()
    whole = np.frombuffer(kept, np.float32).reshape(COUNT, WIDTH)
    assert np.array_equal(stores["original"].embeddings[quarter], whole[quarter])


def test_a_finished_build_runs_nothing(tmp_path):
    build(tmp_path)
    dataset, models = Pictures(), embedders()
    _, report = build(tmp_path, dataset=dataset, models=models)
    assert report.computed == dataset.reads == models["original"].module.calls == 0


def test_a_store_that_is_complete_is_not_computed_again_for_another_student(tmp_path):
    build(tmp_path)
    models = {"teacher_0": embedder(Encoder(1)), "original": embedder(Encoder(7))}
    _, report = build(tmp_path, models=models)
    assert report.computed == COUNT
    assert models["teacher_0"].module.calls == 0


def test_two_names_of_one_model_share_their_rows(tmp_path):
    model = embedder(Encoder(1))
    models = {"teacher_0": model, "teacher_1": model, "original": embedder(Encoder(2))}
    build(tmp_path, models=models)
    assert model.module.calls == -(-COUNT // 16)


def test_decoding_workers_change_no_bit(tmp_path, uninterrupted):
    torch.set_num_threads(1)
    stores, _ = build(tmp_path, workers=2)
    assert contents(stores) == uninterrupted


def test_a_build_that_is_killed_again_and_again_ends_with_the_bits_of_one_that_was_not(
    tmp_path, uninterrupted
):
    chance = random.Random(5)
    kills, seen = 0, 0
    while kills < 8:
        with Builder(tmp_path, 0.05) as builder:
            wait_for_rows(tmp_path, builder, seen + 1)
            time.sleep(chance.uniform(0, 0.1))
            if not builder.is_running:
                break
            builder.kill()
        kills += 1
        stores = [store for _, store, _ in list_stores(tmp_path) if store is not None]
        seen = sum(int(store.done.sum()) for store in stores)
        # Whatever counts as done is whole, whenever the process died.
        for store in stores:
            for position in np.flatnonzero(store.done):
                store.row(int(position))
    assert kills >= 3
    torch.set_num_threads(1)
    stores, _ = build(tmp_path)
    assert contents(stores) == uninterrupted


def test_builders_started_at_once_share_the_work_and_agree(tmp_path, uninterrupted):
    with Builder(tmp_path, 0.05) as first, Builder(tmp_path, 0.05) as second:
        computed = [first.computed(), second.computed()]
    assert sum(computed) == COUNT
    assert min(computed) > 0
    assert contents(opened(tmp_path, embedders())) == uninterrupted


def test_a_builder_waits_for_rows_that_another_process_computes(tmp_path):
    with Builder(tmp_path, 0.05) as builder:
        wait_for_rows(tmp_path, builder)
        stores, report = build(tmp_path)
        assert all(store.done.all() for store in stores.values())
        assert builder.computed() + report.computed == COUNT


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_rank_begins_elsewhere_and_finishes_all(tmp_path, rank):
    order = []

    class Watched(Pictures):
        def __getitem__(self, draw):
            order.append(draw)
            return super().__getitem__(draw)

    stores, _ = build(tmp_path, dataset=Watched(), rank=rank, world_size=3)
    assert order[0] == [0, 64, 128][rank]
    assert stores["original"].done.all()


def test_an_error_keeps_what_was_computed_before(tmp_path):
    with pytest.raises(UnreadableImage, match="picture-100"):
        build(tmp_path, dataset=Pictures(broken={100}), commit_seconds=1e9)
    stores = opened(tmp_path, embedders())
    assert np.array_equal(np.flatnonzero(stores["original"].done), np.arange(96))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_in_one_line_without_traceback(tmp_path, workers):
    with pytest.raises(UnreadableImage) as caught:
        build(tmp_path, dataset=Pictures(broken={3}), workers=workers)
    assert caught.value.problem == "image picture-3.png cannot be read: torn."


def test_the_image_that_stands_in_for_an_unreadable_one_is_built_too(tmp_path):
    dataset = Pictures(broken={10, 12}, replace=True)
    stores, report = build(tmp_path, dataset=dataset, positions=np.array([4, 10, 12, 13]))
    assert report.replaced == (10, 12)
    assert np.flatnonzero(stores["original"].done).tolist() == [4, 11, 13]
    assert CachedImages(dataset, stores)[10]["index"] == 11


def test_more_unreadable_images_than_allowed_end_the_build(tmp_path):
    dataset = Pictures(broken={10, 12, 14}, replace=True)
    dataset.skip = SkipPolicy(2)
    with pytest.raises(UnreadableImage, match=r"3 images cannot be read, 2 are allowed"):
        build(tmp_path, dataset=dataset)
    dataset.skip = SkipPolicy(3)
    assert build(tmp_path, dataset=dataset)[1].replaced == (10, 12, 14)


def test_an_embedding_that_is_not_finite_names_image_and_model(tmp_path):
    class Broken(Encoder):
        def forward(self, pixels01):
            rows = super().forward(pixels01)
            rows[2, 5] = float("nan")
            return rows

    models = {"teacher_0": embedder(Broken(1), description="dinov2")}
    with pytest.raises(TowerError, match=r"teacher_0 \(dinov2\).*not finite.*picture-2\.png"):
        build(tmp_path, models=models)
    assert not opened(tmp_path, models)["teacher_0"].done.any()


def test_a_random_transform_is_refused(tmp_path):
    dataset = Pictures(augment="flip")
    with pytest.raises(RecipeError, match=r"data\.augment=flip"):
        build(tmp_path, dataset=dataset)
    with pytest.raises(RecipeError, match=r"data\.augment=flip"):
        CachedImages(dataset, {})


def test_an_embedding_of_another_width_or_dtype_is_refused(tmp_path):
    with pytest.raises(TowerError, match=r"gives torch\.float32 \(16, 12\)"):
        build(tmp_path, models={"original": embedder(Encoder(2, width=12))})
    with pytest.raises(TowerError, match=r"torch\.float32.*holds bfloat16"):
        build(tmp_path, models={"original": embedder(Encoder(2), storage="bfloat16")})


# Disk


def test_a_disk_without_room_is_refused_before_any_work(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(target_build.shutil, "disk_usage", lambda _: usage)
    models = embedders()
    with pytest.raises(EnvironmentFailure, match=r"needs up to \d\.\d MB .* 0\.0 MB are free"):
        build(tmp_path, models=models)
    assert models["original"].module.calls == 0


def test_a_disk_that_fills_up_is_one_line_and_the_build_goes_on_later(tmp_path, monkeypatch):
    real, left = os.pwrite, [20_000]

    def pwrite(descriptor, data, offset):
        if left[0] <= 0:
            raise OSError(28, "No space left on device")
        part = data[: left[0]]  # a full disk takes a part of the last write
        left[0] -= len(part)
        return real(descriptor, part, offset)

    monkeypatch.setattr(target_writer.os, "pwrite", pwrite)
    with pytest.raises(EnvironmentFailure, match="no space left on device while writing"):
        build(tmp_path)
    monkeypatch.setattr(target_writer.os, "pwrite", real)
    stores, report = build(tmp_path)
    assert 0 < report.computed < COUNT
    for store in stores.values():
        for position in range(COUNT):
            store.row(position)


def test_a_quarter_of_the_images_takes_no_disk_for_the_rest(tmp_path):
    count = 20_000
    first, _ = build(tmp_path, dataset=Pictures(count), positions=np.arange(16))
    store = first["original"]
    assert (store.directory / "embeddings.npy").stat().st_size > count * WIDTH * 4
    assert store.disk_bytes() < count * WIDTH * 4 / 10
    assert store.disk_bytes() < store.needed_bytes(16) + 6 * 4096


# Use


def test_items_bring_their_rows_and_every_worker_reads_them(tmp_path):
    dataset = Pictures()
    stores, _ = build(tmp_path, dataset=dataset)
    cached = CachedImages(dataset, stores)
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(cached, batch_size=50, num_workers=workers)
        rows = torch.cat([batch["teacher_0"] for batch in loader])
        assert np.array_equal(rows.numpy(), stores["teacher_0"].embeddings)


def test_a_pickled_store_carries_no_rows(tmp_path):
    stores, _ = build(tmp_path)
    store = stores["original"]
    copy = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 2000
    assert np.array_equal(copy.row(7), store.row(7))


def test_a_later_epoch_reads_the_same_rows(tmp_path):
    stores, _ = build(tmp_path)
    cached = CachedImages(Pictures(), stores)
    assert torch.equal(cached[5]["original"], cached[5 + 3 * COUNT]["original"])


def test_an_image_that_changed_is_named_with_the_remedy(tmp_path):
    stores, _ = build(tmp_path)
    cached = CachedImages(Pictures(changed={9}), stores)
    cached[8]
    digest = stores["teacher_0"].key.digest
    with pytest.raises(DataError, match=f"picture-9.png changed.*\n.*cache rm {digest}"):
        cached[9]


def test_an_image_without_row_is_named(tmp_path):
    stores, _ = build(tmp_path, positions=np.arange(10))
    with pytest.raises(DataError, match=r"picture-10\.png is not in the cache"):
        CachedImages(Pictures(), stores)[10]


def test_a_flipped_bit_in_a_row_is_found(tmp_path):
    stores, _ = build(tmp_path)
    path = stores["original"].directory / "embeddings.npy"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    cached = CachedImages(Pictures(), {"original": stores["original"]})
    with pytest.raises(EnvironmentFailure, match=r"embeddings\.npy: row 199 is damaged"):
        cached[COUNT - 1]


def test_a_listing_of_another_length_is_refused(tmp_path):
    stores, _ = build(tmp_path)
    with pytest.raises(DataError, match="is of 200 images, the listing holds 100"):
        CachedImages(Pictures(100), stores)


# Damage


@pytest.mark.parametrize("name", ["embeddings.npy", "checksums.npy", "done.npy"])
@pytest.mark.parametrize("kept", [0, 60, 300])
def test_a_truncated_file_is_named(tmp_path, name, kept):
    stores, _ = build(tmp_path)
    path = stores["original"].directory / name
    os.truncate(path, kept)
    with pytest.raises(DataError, match=rf"{name} is truncated or no \.npy file"):
        build(tmp_path)


def test_an_array_of_another_shape_is_named(tmp_path):
    stores, _ = build(tmp_path)
    np.save(stores["original"].directory / "done.npy", np.ones(7, np.uint8))
    with pytest.raises(DataError, match=r"done\.npy holds uint8 \(7,\), its key says"):
        build(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    stores, _ = build(tmp_path)
    (stores["original"].directory / "done.npy").unlink()
    with pytest.raises(DataError, match=r"done\.npy is missing"):
        build(tmp_path)


def test_an_edited_key_is_refused(tmp_path):
    stores, _ = build(tmp_path)
    path = stores["original"].directory / "cache.json"
    content = json.loads(path.read_text())
    content["key"]["transform"] = "another"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"the key in cache\.json is not the one it is named by"):
        build(tmp_path)


def test_an_unknown_or_missing_entry_of_the_key_is_refused(tmp_path):
    stores, _ = build(tmp_path)
    path = stores["original"].directory / "cache.json"
    content = json.loads(path.read_text())
    del content["key"]["width"]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"cache\.json lacks or holds an unknown key.*width"):
        EmbeddingStore.at(path.parent)


def test_a_creation_that_was_killed_is_made_again(tmp_path, uninterrupted):
    stores = opened(tmp_path, embedders())
    (stores["original"].directory / "cache.json").unlink()
    os.truncate(stores["original"].directory / "done.npy", 5)
    torch.set_num_threads(1)
    stores, _ = build(tmp_path)
    assert contents(stores) == uninterrupted


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/embeddings-.* cannot be created: Not a directory"):
        opened(tmp_path / "file", embedders())


# bfloat16


def test_bfloat16_rows_come_back_bit_for_bit(tmp_path):
    model = probe_storage(
        embedder(Encoder(2)), image_size=fake_targets.SIZE, device=CPU, precision="bf16"
    )
    assert model.storage == "bfloat16"
    stores, _ = build(tmp_path, models={"original": model}, precision="bf16")
    assert stores["original"].row_bytes() == 2 * WIDTH
    dataset = Pictures()
    cached = CachedImages(dataset, stores)
    pixels = torch.stack([dataset[i]["pixels"] for i in range(16)]).float() / 255
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        live = model.module(pixels)
    rows = torch.stack([cached[i]["original"] for i in range(16)])
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, live)


def test_a_model_that_returns_float32_under_autocast_is_stored_as_float32(tmp_path):
    class Wide(Encoder):
        def forward(self, pixels01):
            return super().forward(pixels01).float()

    model = probe_storage(
        embedder(Wide(2)), image_size=fake_targets.SIZE, device=CPU, precision="bf16"
    )
    assert model.storage == "float32"
    build(tmp_path, models={"original": model}, precision="bf16")


# Verifying, listing, removing


def test_verification_finds_rows_of_other_weights_and_images(tmp_path):
    models = embedders()
    stores, _ = build(tmp_path, models=models)
    store = stores["original"]
    sound = verify_store(store, Pictures(), models["original"], count=50, device=CPU, batch_size=7)
    assert sound.checked == 50
    assert sound.max_relative_error <= 1e-6
    assert sound.changed == ()
    others = verify_store(store, Pictures(), embedder(Encoder(5)), count=50, device=CPU)
    assert others.max_relative_error > 0.1
    every = range(COUNT)
    changed = verify_store(store, Pictures(changed=every), models["original"], count=5, device=CPU)
    assert len(changed.changed) == 5
    assert changed.changed[0].startswith("picture-")


def test_verification_of_an_empty_store_is_refused(tmp_path):
    models = embedders()
    store = opened(tmp_path, models)["original"]
    with pytest.raises(DataError, match="holds no row yet"):
        verify_store(store, Pictures(), models["original"], device=CPU)


def test_listing_shows_damaged_stores_too(tmp_path):
    stores, _ = build(tmp_path)
    os.truncate(stores["original"].directory / "done.npy", 3)
    listed = {path: (store, problem) for path, store, problem in list_stores(tmp_path)}
    assert listed[stores["teacher_0"].directory][1] == ""
    store, problem = listed[stores["original"].directory]
    assert store is None
    assert "done.npy is truncated" in problem


def test_a_store_that_is_being_built_is_not_removed(tmp_path):
    with Builder(tmp_path, 0.2) as builder:
        directory = next(s.directory for s in wait_for_rows(tmp_path, builder) if s.done.any())
        with pytest.raises(UserError, match="is being built by another process"):
            remove_store(directory)
        builder.kill()
    remove_store(directory)
    assert not directory.exists()


def test_claims_of_a_dead_process_are_free_again(tmp_path):
    with Builder(tmp_path, 30) as builder:  # claims its first batch and sleeps
        while not (directories := [store for _, store, _ in list_stores(tmp_path) if store]):
            time.sleep(0.002)
        with StoreWriter(directories[0]) as writer:
            deadline = time.monotonic() + 30
            while writer.claim(9, 12) and time.monotonic() < deadline:
                writer.release(9, 12)
                time.sleep(0.002)
            assert not writer.claim(9, 12)
            assert writer.claim(16, 20)
            builder.kill()
            assert writer.claim(0, 12)


def test_the_directory_has_no_surprises(tmp_path):
    stores, _ = build(tmp_path)
    names = sorted(path.name for path in Path(stores["original"].directory).iterdir())
    assert names == ["cache.json", "checksums.npy", "done.npy", "embeddings.npy", "lock"]
