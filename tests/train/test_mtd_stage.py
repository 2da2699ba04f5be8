"""Stage `mtd` may teach codes who is shown, through a recogniser of photos."""

import dataclasses

import pytest
import torch

from omniid.config import ConfigError, preset_to_toml
from omniid.data.few_to_many import FewToManyBatches
from omniid.data.records import open_records
from omniid.models.latent_recogniser import LatentRecogniser
from omniid.train.draws import identity_generators
from omniid.train.mtd import MTDStage
from omniid.train.run import run_stage


@pytest.fixture
def batch(records):
    """Four people with two targets each."""
    batches = FewToManyBatches(open_records(records, "train"), 32, 4, (1, 2), 2, seed=0, steps=1, landmarks=True)
    return batches[0].to_device(torch.device("cpu"))


def asked(tiny, recogniser, **changes):
    mtd = dataclasses.replace(tiny.train.mtd, identity_loss_weight=0.5, recogniser=str(recogniser), **changes)
    return dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, mtd=mtd))


def loss_of(preset, batch):
    torch.manual_seed(0)
    stage = MTDStage(preset)
    return stage, *stage.loss(batch, identity_generators(0, batch.places))


def test_the_identity_loss_is_added_and_reaches_the_encoder(tiny, batch, recogniser):
    stage, value, numbers = loss_of(asked(tiny, recogniser), batch)
    _, plain, _ = loss_of(tiny, batch)
    distance = numbers["identity_loss"]
    assert value.item() == pytest.approx(plain.item() + 0.5 * distance.item(), rel=1e-5)
    assert stage.needs_landmarks and not MTDStage(tiny).needs_landmarks
    distance.backward()
    assert stage.encoder.tower.get_parameter("embeddings.patch_embedding.weight").grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in stage.decoder.parameters())


def test_what_is_read_from_codes_is_compared_with_everybodys_photos(tiny, batch, recogniser):
    """1 - cos over all targets, by hand; with a bound over the first of the first people."""
    for limit, count in ((0, 8), (3, 3)):
        stage, _, numbers = loss_of(asked(tiny, recogniser, identity_loss_pictures=limit), batch)
        codes = stage.encoder(batch.inputs, batch.cu_inputs).flatten(1)
        read = torch.nn.functional.normalize(stage.model["identity_head"](codes), dim=-1)
        order = [(person, target) for target in range(2) for person in range(4)][:count]
        cosines = [
            (
                read[person]
                * stage.identity_loss(batch.targets[person, target][None], batch.landmarks[person, target][None])[0]
            ).sum()
            for person, target in order
        ]
        assert numbers["identity_loss"].item() == pytest.approx(1 - torch.stack(cosines).mean().item(), abs=1e-5)


def test_a_trained_map_tells_people_apart(tiny, batch, recogniser):
    """With the encoder's help it finds everybody among the four."""
    stage, value, numbers = loss_of(asked(tiny, recogniser, identity_loss_temperature=0.1), batch)
    optimizer = torch.optim.Adam(stage.model.parameters(), 3e-3)
    first = numbers["identity_loss"].item()
    for _ in range(60):
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        value, numbers = stage.loss(batch, identity_generators(0, batch.places))
    assert numbers["identity_loss"].item() < 0.5 * first


def test_settings_that_cannot_act_are_refused(tiny, recogniser, tmp_path):
    with pytest.raises(ConfigError, match="teaches the encoder; leave it out with encoder_lr_scale = 0"):
        MTDStage(asked(tiny, recogniser, encoder_lr_scale=0.0))
    with pytest.raises(ConfigError, match="identity_loss_steps is for stages that draw from noise"):
        MTDStage(asked(tiny, recogniser, identity_loss_steps=2))
    LatentRecogniser(16, 4).save(tmp_path / "recogniser.safetensors")
    with pytest.raises(ConfigError, match=r"needs a recogniser of pictures, .*recogniser\.safetensors reads latents"):
        MTDStage(asked(tiny, tmp_path / "recogniser.safetensors"))


def test_the_map_is_resumed_and_not_exported(tiny, records, recogniser, tmp_path):
    (tmp_path / "tiny.toml").write_text(preset_to_toml(asked(tiny, recogniser, identity_loss_temperature=0.1)))

    def run(name, steps, resume=False):
        return run_stage(
            "mtd", tmp_path / "tiny.toml", records, tmp_path / name, weights=tmp_path / f"{name}-weights", device="cpu",
            overrides=[f"train.mtd.steps={steps}", "train.mtd.min_lr_ratio=1.0", "train.mtd.save_every=3"],
            progress=False, resume=resume,
        )  # fmt: skip

    whole = run("whole", 6).losses
    assert [*run("parts", 3).losses, *run("parts", 6, resume=True).losses] == whole
    assert {file.name for file in (tmp_path / "whole-weights").iterdir()} >= {
        "encoder.safetensors",
        "decoder.safetensors",
    }
    MTDStage(tiny).load(tmp_path / "whole-weights")
