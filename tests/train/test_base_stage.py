"""Stage `base`: the autoencoder and the transformer learn, and the folder between them is a FLUX pipeline."""

import dataclasses
import shutil
import signal

import numpy as np
import pytest
import torch

from omniid.config import ConfigError, load_preset, preset_to_toml
from omniid.data.few_to_many import FewToManyBatches
from omniid.data.records import open_records
from omniid.errors import OmniIDError
from omniid.models.encoder import load_encoder
from omniid.models.flux import encode_images, load_base
from omniid.models.identity_adapter import IdentityAdapter
from omniid.models.latent_recogniser import LatentRecogniser
from omniid.train.base import AutoencoderStage, BaseStage, random_crops, shortened, vary_captions
from omniid.train.run import run_stage


@pytest.fixture(scope="module")
def batch(records):
    rows = open_records(records, "train")
    return FewToManyBatches(rows, 32, 4, (1, 3), 2, seed=0, steps=1)[0].to_device(torch.device("cpu"))


@pytest.fixture(scope="module")
def trained_autoencoder(tiny, batch):
    stage = AutoencoderStage(tiny)
    return stage, descend(stage, batch, steps=30)


def descend(stage, batch, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in stage.model.parameters() if p.requires_grad], lr=1e-3)
    stage.model.train()
    losses = []
    for step in range(steps):
        loss, _ = stage.loss(batch, [torch.Generator().manual_seed(step)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    stage.model.eval()
    return losses


def test_the_autoencoder_learns(trained_autoencoder):
    _, losses = trained_autoencoder
    assert losses[-1] < 0.8 * losses[0]


def test_exported_latents_are_normalised(trained_autoencoder, batch, tmp_path):
    stage, _ = trained_autoencoder
    images = batch.targets.flatten(0, 1)
    with torch.no_grad():
        expected = stage.model.encode(images)
        stage.export(tmp_path)
        latents = encode_images(load_base(tmp_path / "base").vae, images)
    torch.testing.assert_close(latents, expected, atol=0.1, rtol=0.1)  # stored in bf16
    assert latents.std().item() == pytest.approx(1, abs=0.3)


def test_the_transformer_and_both_text_encoders_learn(tiny, trained_autoencoder, batch, tmp_path, generator):
    trained_autoencoder[0].export(tmp_path)
    stage = BaseStage(tiny, tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in stage.model.named_parameters()}
    losses = descend(stage, batch, steps=25)
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    for part in ("transformer", "text_encoder", "text_encoder_2"):
        parameters = [(name, p) for name, p in stage.model.named_parameters() if name.startswith(part + ".")]
        assert any(not torch.equal(before[name], p) for name, p in parameters), part
    assert all(parameter.grad is None for parameter in stage.vae.parameters())
    assert stage.sample(batch, generator).shape == (4, 3, 3, 32, 32)
    stage.export(tmp_path)
    exported = load_base(tmp_path / "base").transformer
    assert not torch.equal(exported.proj_out.weight, before["transformer.proj_out.weight"])


def told(tiny, share: float, **settings):
    settings = dataclasses.replace(tiny.train.base, identity_share=share, **settings)
    return dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, base=settings))


def test_with_identities_an_adapter_learns_along(tiny, weights, batch, tmp_path, generator):
    shutil.copytree(weights, tmp_path, dirs_exist_ok=True)
    stage = BaseStage(told(tiny, 0.8), tmp_path)
    assert stage.reads_inputs and not BaseStage(tiny, tmp_path).reads_inputs
    encoder = {name: value.clone() for name, value in stage.encoder.state_dict().items()}
    descend(stage, batch, steps=5)
    assert all(to_v.weight.any() for to_v in stage.adapter.to_v_id)
    assert all(torch.equal(encoder[name], value) for name, value in stage.encoder.state_dict().items())
    assert stage.sample(batch, generator).shape == (4, 3, 3, 32, 32)  # captions alone
    stage.export(tmp_path)
    adapter = IdentityAdapter.load(tmp_path / "adapter.safetensors")
    assert adapter.encoder_fingerprint == load_encoder(tmp_path).fingerprint()
    again = BaseStage(told(tiny, 0.8), tmp_path)  # goes on from what was exported
    assert torch.equal(again.adapter.to_v_id[0].weight, adapter.to_v_id[0].weight)


def test_the_share_of_pictures_says_how_many_are_told_who_they_show(tiny, weights, batch, tmp_path):
    """With another person's code the loss changes where all are told, and does not where none is."""
    shutil.copytree(weights, tmp_path, dirs_exist_ok=True)
    trained = BaseStage(told(tiny, 1.0), tmp_path)
    descend(trained, batch, steps=5)
    trained.export(tmp_path)
    others = dataclasses.replace(batch, inputs=batch.inputs.flip(0))

    def losses(share: float) -> list[float]:
        stage = BaseStage(told(tiny, share), tmp_path)
        stage.model.eval()
        return [stage.loss(one, [torch.Generator().manual_seed(0)])[0].item() for one in (batch, others)]

    own, other = losses(1.0)
    assert own != other
    own, other = losses(1e-9)
    assert own == other == losses(0.0)[0]


def test_identities_need_an_encoder(tiny, trained_autoencoder, tmp_path):
    trained_autoencoder[0].export(tmp_path)
    with pytest.raises(OmniIDError, match=r"encoder\.safetensors does not exist"):
        BaseStage(told(tiny, 0.5), tmp_path)
    with pytest.raises(ConfigError, match=r"identity_share must lie in 0\.\.1, got 1\.5"):
        told(tiny, 1.5)


def test_an_identity_loss_counts_those_who_are_told_of(tiny, weights, batch, tmp_path):
    shutil.copytree(weights, tmp_path, dirs_exist_ok=True)
    recogniser = tmp_path / "recogniser.safetensors"
    LatentRecogniser(16, 4).save(recogniser)
    weighted = {"identity_loss_weight": 0.5, "recogniser": str(recogniser)}

    def loss(preset) -> tuple[float, dict]:
        value, numbers = BaseStage(preset, tmp_path).loss(batch, [torch.Generator().manual_seed(0)])
        return value.item(), numbers

    value, numbers = loss(told(tiny, 1.0, **weighted))
    assert value == pytest.approx(loss(told(tiny, 1.0))[0] + 0.5 * numbers["identity_loss"].item(), rel=1e-5)
    assert loss(told(tiny, 1e-9, **weighted))[1] == {}
    with pytest.raises(ConfigError, match="identity_share above 0"):
        BaseStage(told(tiny, 0.0, **weighted), tmp_path)


def test_a_recogniser_of_pictures_sees_decoded_faces(tiny, weights, records, recogniser, tmp_path):
    """Its gradient reaches the adapter, and the number of faces that it looks at is what was asked for."""
    weighted = {"identity_loss_weight": 0.5, "recogniser": str(recogniser)}
    batch = FewToManyBatches(open_records(records, "train"), 32, 4, (1, 2), 2, seed=0, steps=1, landmarks=True)[0]
    batch = batch.to_device(torch.device("cpu"))
    seen = []
    for limit in (0, 3, 100):
        stage = BaseStage(told(tiny, 1.0, **weighted, identity_loss_pictures=limit), weights)
        assert stage.needs_landmarks
        stage.identity_loss.register_forward_pre_hook(lambda _, given: seen.append(given))
        value, numbers = stage.loss(batch, [torch.Generator().manual_seed(0)])
        plain = BaseStage(told(tiny, 1.0), weights).loss(batch, [torch.Generator().manual_seed(0)])[0]
        assert value.item() == pytest.approx(plain.item() + 0.5 * numbers["identity_loss"].item(), rel=1e-5)
        (gradient,) = torch.autograd.grad(numbers["identity_loss"], stage.adapter.to_v_id[0].weight)
        assert gradient.abs().max() > 0
    seen = [given for given in seen if not given[0].requires_grad]  # the drawn ones left out
    assert [len(photos) for photos, _ in seen] == [8, 3, 8]
    photos, landmarks = seen[1]
    assert torch.equal(photos, batch.targets[:3, 0])  # everybody's first target before anybody's second
    assert np.array_equal(landmarks, batch.landmarks[:3, 0])
    with pytest.raises(ConfigError, match="identity_loss_pictures must not be negative, got -1"):
        told(tiny, 1.0, identity_loss_pictures=-1)


def test_faces_may_be_drawn_from_noise_alone(tiny, weights, records, recogniser):
    """What the identity loss sees then depends on nothing of the photos but who they show."""
    weighted = {"identity_loss_weight": 0.5, "recogniser": str(recogniser), "identity_loss_steps": 3}
    batch = FewToManyBatches(open_records(records, "train"), 32, 4, (1, 2), 2, seed=0, steps=1, landmarks=True)[0]
    batch = batch.to_device(torch.device("cpu"))
    captions = [[caption.replace("e", "o") for caption in own] for own in batch.captions]
    assert captions != batch.captions
    others = dataclasses.replace(batch, targets=batch.targets.flip(-1), captions=captions)
    seen, gradients = [], []
    for one, steps in ((batch, 3), (others, 3), (batch, 0), (others, 0)):
        torch.manual_seed(0)  # of the adapter
        stage = BaseStage(told(tiny, 1.0, **{**weighted, "identity_loss_steps": steps}), weights)
        stage.identity_loss.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        _, numbers = stage.loss(one, [torch.Generator().manual_seed(0)])
        gradients.append(torch.autograd.grad(numbers["identity_loss"], stage.adapter.to_v_id[0].weight)[0])
    seen = [faces for faces in seen if faces.requires_grad]  # the photographed ones left out
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[2], seen[3])
    assert gradients[0].abs().max() > 0


def test_a_signal_while_the_autoencoder_is_written_ends_the_stage_after_it(tiny, records, tmp_path, monkeypatch):
    export = AutoencoderStage.export

    def signalled(stage, folder):
        signal.raise_signal(signal.SIGTERM)
        export(stage, folder)

    monkeypatch.setattr(AutoencoderStage, "export", signalled)
    (tmp_path / "tiny.toml").write_text(preset_to_toml(tiny))
    result = run_stage("base", tmp_path / "tiny.toml", records, tmp_path / "run", device="cpu", progress=False)
    assert result.interrupted and result.step == 4
    assert (tmp_path / "run" / "weights" / "base" / "vae").is_dir()
    assert not (tmp_path / "run" / "transformer").exists()


def test_a_preset_with_a_trained_base_is_refused():
    with pytest.raises(ConfigError, match=r"preset 'paper' has no \[base.sizes\]"):
        AutoencoderStage(load_preset("paper"))


def test_crops_lie_on_the_latent_grid_and_small_images_stay_whole(generator):
    rows = torch.arange(64.0).view(1, 1, 64, 1).expand(5, 3, 64, 64)
    for _ in range(5):
        crops = random_crops(rows, 3, 32, generator)
        assert crops.shape == (3, 3, 32, 32)
        assert crops[0, 0, 0, 0] % 8 == 0
    assert random_crops(rows, 9, 128, generator).shape == (5, 3, 64, 64)


def test_captions_are_dropped_and_get_odd_words_at_the_given_rates(generator):
    captions = ["photo of a person"] * 2000
    varied = vary_captions(captions, 0.1, generator)
    assert varied.count("") == pytest.approx(200, abs=60)
    odd = [caption for caption in varied if len(caption.split()) == 5]
    assert {caption.removesuffix(".") for caption in varied if caption and caption not in odd} == {captions[0]}
    assert len(odd) == pytest.approx(270, abs=70)
    assert len(set(odd)) > 0.9 * len(odd)
    assert vary_captions(captions, 1.0, generator) == [""] * 2000


def test_shortened_captions_keep_the_opening_and_whole_phrases(generator):
    caption = "photo of a person with short hair, a goatee and blue eyes, smiling, soft light, red background"
    short = [shortened(caption, generator) for _ in range(400)]
    assert all(text.startswith("photo of a person") for text in short)
    phrases = set(caption.split(", ")) | {"photo of a person"}
    assert all(phrase in phrases for text in short for phrase in text.removesuffix(".").split(", "))
    bare = sum(text.removesuffix(".") == "photo of a person" for text in short)
    assert bare == pytest.approx(200, abs=50)
    assert sum(text.endswith(".") for text in short) == pytest.approx(200, abs=50)
