"""Cached photos: the losses of a run that decodes, whoever built them; stages that read no input photos."""

import shutil

import numpy as np
import pytest
import torch

from omniid.config import ConfigError, preset_to_toml
from omniid.data import latent_cache
from omniid.data.few_to_many import FewToManyBatches
from omniid.data.latent_cache import LatentCacheError
from omniid.data.records import RecordError, decode_image, decode_mask, open_records
from omniid.train import latents as building
from omniid.train.photos import cached_photos
from omniid.train.run import run_stage


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(latent_cache, "PHOTOS_PER_SHARD", 7)


@pytest.mark.parametrize("stage", ["mtd", "base", "control"])
def test_losses_are_those_of_a_run_that_decodes(stage, tiny, weights, records, tmp_path):
    preset = tmp_path / "tiny.toml"
    preset.write_text(preset_to_toml(tiny))

    def losses(name, *wishes):
        folder = tmp_path / f"{name}-weights"
        shutil.copytree(weights, folder)
        overrides = [f"train.{stage}.{wish}" for wish in ("steps=3", "mirror=0.5", *wishes)]
        start = folder if stage == "base" else None
        return run_stage(
            stage, preset, records, tmp_path / name, weights=folder, start_from=start, overrides=overrides, device="cpu",
            progress=False,
        ).losses  # fmt: skip

    kept = f"cache_folder='{tmp_path / 'kept'}'"
    decoded = losses("decoded")
    assert losses("cached", "cache_photos=true", kept) == decoded
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.safetensors")}
    assert files
    assert losses("again", "cache_photos=true", "num_workers=1", kept) == decoded
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.safetensors")} == files


def test_several_processes_build_what_one_does(records, tmp_path):
    rows = open_records(records, "train")
    caches = [cached_photos(tmp_path / str(workers), rows, [16, 24], workers) for workers in (0, 3)]
    for size in (16, 24):
        one, several = (cache[size] for cache in caches)
        assert not several.missing() and one.num_shards > 3
        for shard in range(one.num_shards):
            assert one.path(shard).read_bytes() == several.path(shard).read_bytes()
    photos = caches[0][24].read(1, np.array([2, 0])).numpy()
    for shown, number in zip(photos, (2, 0), strict=True):
        colours, mask = shown[: 3 * 24 * 24].reshape(24, 24, 3), shown[3 * 24 * 24 :].reshape(24, 24)
        assert np.array_equal(colours, decode_image(rows[1]["images"][number], 24))
        assert np.array_equal(mask == 1, decode_mask(rows[1]["masks"][number], 24))


def test_damaged_photos_are_damaged_in_the_cache_too(records, tmp_path):
    import datasets

    people = open_records(records, "train").to_list()
    people[0]["images"] = [b"no JPEG"] * len(people[0]["images"])
    folder = tmp_path / "records"
    folder.mkdir()
    datasets.Dataset.from_list(people).to_parquet(str(folder / "train-0.parquet"))
    rows = open_records(folder, "train")
    kept = cached_photos(tmp_path / "kept", rows, [16])
    with pytest.raises(RecordError, match="damaged photo"):
        kept[16].read(0, np.array([1]))

    def batches(**more):
        return FewToManyBatches(rows, 16, len(rows), (1, 2), 2, seed=0, steps=1, **more)[0]

    plain, cached = batches(), batches(photos_at=kept)
    assert [text.split(":")[0] for text in cached.skipped] == [people[0]["identity_id"]]
    assert cached.identity_ids == plain.identity_ids
    assert torch.equal(cached.inputs, plain.inputs) and torch.equal(cached.masks, plain.masks)


def test_targets_do_not_depend_on_whether_inputs_are_read(records):
    rows = open_records(records, "train")

    def batch(reads_inputs):
        return FewToManyBatches(rows, 16, 4, (1, 3), 2, seed=0, steps=1, mirror=0.5, reads_inputs=reads_inputs)[0]

    shown, hidden = batch(True), batch(False)
    assert hidden.inputs.shape == (len(shown.inputs), 3, 0, 0)
    assert torch.equal(hidden.targets, shown.targets) and torch.equal(hidden.cu_inputs, shown.cu_inputs)
    assert hidden.to_device(torch.device("cpu")).inputs.numel() == 0


def test_refusals(tiny, weights, records, tmp_path, monkeypatch):
    (tmp_path / "tiny.toml").write_text(preset_to_toml(tiny))
    with pytest.raises(ConfigError, match="stage t2i shows scenes"):
        run_stage(
            "t2i", tmp_path / "tiny.toml", records, tmp_path / "run", weights=weights,
            overrides=["train.t2i.cache_photos=true"], device="cpu",
        )  # fmt: skip
    monkeypatch.setattr(building.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(LatentCacheError, match=r"60 decoded photos take .* GB free; .* leave cache_photos out"):
        cached_photos(tmp_path / "kept", open_records(records, "train"), [16])
    assert not list((tmp_path / "kept").rglob("*.safetensors"))
