"""Cached latents: the losses of a run without them, built once, whole after a kill, refused where they cannot be kept."""

import collections
import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from omniid.config import ConfigError, preset_to_toml
from omniid.data import latent_cache
from omniid.data.latent_cache import LatentCache, LatentCacheError, LatentSource
from omniid.data.records import open_records
from omniid.models import flux
from omniid.train import latents as building
from omniid.train.checkpoint import complete_checkpoints
from omniid.train.flow import FlowStage
from omniid.train.prompt_cache import NUM_PIECES, PIECE_BYTES, prompt_path
from omniid.train.run import run_stage

CACHE = "train.{}.cache_latents=true"


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(latent_cache, "PHOTOS_PER_SHARD", 7)
    monkeypatch.setattr(latent_cache, "PHOTOS_AT_ONCE", 3)


@pytest.fixture
def train(tiny, weights, records, tmp_path):
    """`train(stage, run, *overrides)` in a copy of the weights folder."""

    def run(stage, name, *overrides, data=records, resume=False):
        folder = tmp_path / f"{name}-weights"
        shutil.copytree(weights, folder, dirs_exist_ok=True)
        preset = tmp_path / "tiny.toml"
        preset.write_text(preset_to_toml(tiny))
        return run_stage(
            stage, preset, data, tmp_path / name, weights=folder, overrides=overrides, resume=resume, device="cpu",
            progress=False,
        )  # fmt: skip

    return run


def write(rows, folder, split="train"):
    """A shard of a list of rows."""
    import datasets

    folder.mkdir(exist_ok=True)
    number = len(list(folder.glob(f"{split}-*")))
    datasets.Dataset.from_list(rows).to_parquet(str(folder / f"{split}-{number}.parquet"))


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def build(folder, rows, mirror=0.0, vae=None, **more):
    """A cache of photos through an autoencoder that keeps their means."""
    vae = vae or Means()
    caches = building.cached_latents(
        ("latents",), folder, vae, rows, 32, mirror, torch.device("cpu"), lambda: torch.autocast("cpu", enabled=False), **more
    )  # fmt: skip
    return caches["latents"]


class Means(torch.nn.Module):
    """Stands for an autoencoder."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Conv2d(3, 2, 8, stride=8)
        with torch.no_grad():
            self.encoder.weight.copy_(torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8))
            self.encoder.bias.zero_()

    def encode(self, images):
        return collections.namedtuple("Encoded", "latents")(self.encoder(images).detach())


@pytest.mark.parametrize("stage", ["flow", "control"])
def test_losses_are_those_of_a_run_without_a_cache(train, tmp_path, small_shards, stage):
    mirror = f"train.{stage}.mirror=0.5"
    plain = train(stage, "plain", mirror)
    cached = train(stage, "cached", mirror, CACHE.format(stage))
    assert cached.losses == pytest.approx(plain.losses, rel=1e-6)
    assert cached.validation_loss == pytest.approx(plain.validation_loss, rel=1e-6)
    folders = [path for path in (tmp_path / "cached" / "cache").iterdir() if path.is_dir()]
    assert len(folders) == (2 if stage == "flow" else 4)  # both ways, of photos and of landmarks


def test_a_second_run_computes_nothing_of_it_again(train, tmp_path, monkeypatch):
    folder = f"train.flow.cache_folder={tmp_path / 'shared'}"
    first = train("flow", "first", CACHE.format("flow"), folder, "train.flow.num_workers=1")
    before = files_of(tmp_path / "shared")

    def refuse(*arguments, **named):
        raise AssertionError("computed again")

    monkeypatch.setattr(LatentCache, "build_shard", refuse)
    monkeypatch.setattr("omniid.train.flow.embed_text", refuse)
    again = train("flow", "again", CACHE.format("flow"), folder)
    assert again.losses == first.losses and again.validation_loss == first.validation_loss
    assert files_of(tmp_path / "shared") == before


def test_what_the_cache_stands_for_leaves_memory(tiny, weights, records, tmp_path):
    FlowStage(tiny, weights, cache=tmp_path)
    parts, load = [], flux.load_base

    def note(*arguments, **named):
        parts.append(named)
        return load(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("omniid.train.flow.load_base", note)
        stage = FlowStage(tiny, weights, cache=tmp_path)
    assert parts == [{"with_text": False}] and stage.pipeline.text_encoder_2 is None
    for mine, computed in zip(
        dataclasses.astuple(stage.text), dataclasses.astuple(FlowStage(tiny, weights).text), strict=True
    ):
        assert torch.equal(mine, computed)
    stage.drop_encoder()
    assert not any(name.startswith("encoder.") for name in stage.vae.state_dict())


def test_resuming_is_exact(train, tmp_path):
    settings = (CACHE.format("flow"), "train.flow.mirror=0.5", "train.flow.keep_checkpoints=9")
    whole = train("flow", "run", *settings)
    for folder in complete_checkpoints(tmp_path / "run")[1:]:
        shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "run" / "cache")  # made again, to the bit
    rest = train("flow", "run", *settings, resume=True)
    assert rest.losses == whole.losses[3:] and rest.validation_loss == whole.validation_loss


def test_damaged_photos_and_masks_are_replaced_as_without_a_cache(train, records, tmp_path):
    rows = open_records(records, "train").to_list()
    rows[2]["images"][3] = b"no photo"
    rows[5]["masks"] = [b"no mask"] * 6
    write(rows, tmp_path / "data")
    write(open_records(records, "validation").to_list(), tmp_path / "data", "validation")
    plain, cached = (
        train("flow", name, *settings, data=tmp_path / "data")
        for name, settings in (("plain", ()), ("cached", (CACHE.format("flow"),)))
    )
    assert plain.bad_records == cached.bad_records > 2
    assert cached.losses == pytest.approx(plain.losses, rel=1e-6)


def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(records, tmp_path, small_shards, monkeypatch):
    rows = open_records(records, "train")
    build(tmp_path / "whole", rows)
    built, make = [], LatentCache.build_shard

    def die_at_the_third(self, shard, *functions):
        if len(built) == 2:
            raise KeyboardInterrupt
        built.append(shard)
        make(self, shard, *functions)

    monkeypatch.setattr(LatentCache, "build_shard", die_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "killed", rows)
    cache = LatentCache(tmp_path / "killed", LatentSource(rows), (2, 4, 4), torch.float32, {})
    assert cache.num_shards == 9
    monkeypatch.setattr(
        LatentCache, "build_shard", lambda self, shard, *functions: (built.append(shard), make(self, shard, *functions))
    )
    build(tmp_path / "killed", rows)
    assert built == list(range(9))
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_processes_share_the_work_and_finish_what_another_leaves(records, tmp_path, small_shards, monkeypatch):
    built, make = [], LatentCache.build_shard
    monkeypatch.setattr(
        LatentCache, "build_shard", lambda self, shard, *functions: (built.append(shard), make(self, shard, *functions))
    )
    build(tmp_path, open_records(records, "train"), rank=1, world_size=2)
    assert built == [1, 3, 5, 7, 0, 2, 4, 6, 8]


def test_latents_are_found_by_row_and_photo_and_a_mirrored_photo_has_its_own(records, tmp_path, small_shards):
    rows, vae = open_records(records, "train"), Means()
    plain, mirrored = build(tmp_path, rows, mirror=0.5, vae=vae)
    for row, photos in ((0, [0]), (1, [5, 2]), (9, [5, 5, 0])):
        for way, cache in ((False, plain), (True, mirrored)):
            pictures = np.stack([building.photo_picture(rows[row], photo, 32, way) for photo in photos])
            images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
            torch.testing.assert_close(cache.read(row, np.array(photos)), vae.encode(images).latents)
    assert not torch.allclose(mirrored.read(0, np.array([0])), plain.read(0, np.array([0])).flip(-1), atol=1e-3)
    assert build(tmp_path, rows)[1] is None and build(tmp_path, rows, mirror=1.0)[0] is None


def test_a_cache_is_found_again_only_for_the_same_photos_and_encoder(records, tmp_path):
    rows = open_records(records, "train")
    folder = build(tmp_path / "cache", rows)[0].folder
    others = rows.to_list()
    for part in (others[:3], others[3:]):
        write(part, tmp_path / "same")
    assert LatentSource(open_records(tmp_path / "same", "train")).fingerprint == LatentSource(rows).fingerprint
    others[4]["landmarks"][1][7][0] += 1.0
    write(others, tmp_path / "other")
    other = open_records(tmp_path / "other", "train")
    assert LatentSource(other).fingerprint != LatentSource(rows).fingerprint
    vae = Means()
    with torch.no_grad():
        vae.encoder.weight[0, 0, 0, 0] += 1
    assert (
        len({folder, build(tmp_path / "cache", rows, vae=vae)[0].folder, build(tmp_path / "cache", other)[0].folder})
        == 3
    )


def test_a_small_disk_is_refused_before_anything_is_computed(records, tmp_path, monkeypatch):
    monkeypatch.setattr(building.shutil, "disk_usage", lambda folder: collections.namedtuple("U", "free")(1000))
    with pytest.raises(LatentCacheError, match=r"latents of 60 photos take 7\.7\de-06 GB, but .* has 1e-06 GB free"):
        build(tmp_path / "cache", open_records(records, "train"))
    assert files_of(tmp_path) == {}


def test_a_disk_that_fills_up_is_named_and_leaves_no_part_of_a_file(records, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("omniid.files.sync_file", full)
    with pytest.raises(LatentCacheError, match=r"No space left on device.*make room and start again"):
        build(tmp_path, open_records(records, "train"))
    assert files_of(tmp_path) == {}


def test_a_truncated_shard_is_named(records, tmp_path):
    cache = build(tmp_path, open_records(records, "train"))[0]
    whole = cache.path(0).read_bytes()
    cache.path(0).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LatentCacheError, match=r"000000\.safetensors .* delete the file"):
        cache.read(0, np.array([0]))


def test_the_prompt_belongs_to_its_text_encoders(weights, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(weights / "base", base)
    one = prompt_path(tmp_path, base, "photo of a person.", 24)
    assert prompt_path(tmp_path, base, "photo", 24) != one != prompt_path(tmp_path, base, "photo of a person.", 32)
    large = base / "text_encoder_2" / "model.safetensors"
    large.write_bytes(bytes(NUM_PIECES * PIECE_BYTES * 5))  # a file of which only pieces are read
    zeros = prompt_path(tmp_path, base, "photo of a person.", 24)
    with open(large, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"1")
    assert len({one, zeros, prompt_path(tmp_path, base, "photo of a person.", 24)}) == 3
    assert prompt_path(tmp_path, "nobody/has-this-base", "photo of a person.", 24) is None


def test_other_stages_refuse_a_cache(tiny, weights, records, tmp_path):
    t2i = dataclasses.replace(tiny.train.t2i, cache_latents=True)
    (tmp_path / "tiny.toml").write_text(
        preset_to_toml(dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, t2i=t2i)))
    )
    with pytest.raises(ConfigError, match=r"cache_latents is for the stages flow, control, recogniser"):
        run_stage("t2i", tmp_path / "tiny.toml", records, tmp_path / "run", weights=weights)
