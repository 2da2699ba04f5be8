"""Generating: deterministic, the identity acts when and where it should, and wrong requests get one sentence."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from omniid.config import preset_to_toml
from omniid.data.synthetic import template_landmarks
from omniid.errors import OmniIDError
from omniid.generate import GenerateError, load_generator
from omniid.identity import Identity
from omniid.models.flux import embed_text, predict_velocity
from omniid.models.identity_adapter import AdapterError, IdentityAdapter, IdentityUse, attach_identities
from omniid.models.landmark_controlnet import build_landmark_controlnet, save_landmark_controlnet
from omniid.models.mini_base import build_base
from omniid.train.base import save_base

ENCODER = "f" * 64


@pytest.fixture(scope="module")
def weights(tiny, tmp_path_factory):
    """A folder of random weights whose adapter has something to say."""
    folder = tmp_path_factory.mktemp("weights")
    random = torch.Generator().manual_seed(0)
    pipeline = build_base(tiny.base.sizes, tiny.base.max_sequence_length, ["photo", "of", "a", "person"], seed=0)
    adapter = IdentityAdapter.for_transformer(pipeline.transformer, tiny.encoder.width)
    adapter.encoder_fingerprint = ENCODER
    with torch.no_grad():
        for parameter in (*pipeline.transformer.parameters(), *(to_v.weight for to_v in adapter.to_v_id)):
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.15)
    save_base(pipeline, folder / "base")
    adapter.save(folder / "adapter.safetensors")
    (folder / "preset.toml").write_text(preset_to_toml(tiny))
    return folder


@pytest.fixture(scope="module")
def generator(weights):
    return load_generator(weights)


def person(seed: int, encoder: str = ENCODER) -> Identity:
    tokens = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed))
    return Identity(tokens=tokens, encoder=encoder, preset="mini", num_images=1)


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_the_seed_decides_the_picture(generator):
    first, again, other = (pixels(generator.generate(person(0), "photo", seed=seed)) for seed in (7, 7, 8))
    assert (first == again).all()
    assert (first != other).any()


def test_picture_i_of_several_is_the_picture_of_seed_plus_i(generator):
    several = pixels(generator.generate(person(0), "photo", seed=3, num_images=3))
    for index in range(3):
        alone = pixels(generator.generate(person(0), "photo", seed=3 + index))
        assert np.abs(several[index] - alone[0]).max() <= 1


def test_the_size_and_the_default_size(generator):
    assert generator.generate(None, "photo")[0].size == (32, 32)
    assert generator.generate(None, "photo", width=48, height=16)[0].size == (48, 16)


def test_without_identity_it_is_the_bases_own_picture(generator, weights, tiny):
    from omniid.models.flux import load_base

    plain = load_base(weights / "base")(
        "photo",
        height=32,
        width=32,
        num_inference_steps=2,
        max_sequence_length=tiny.base.max_sequence_length,
        generator=torch.Generator().manual_seed(5),
    ).images
    assert (pixels(generator.generate(None, "photo", seed=5)) == pixels(plain)).all()
    assert (pixels(generator.generate(person(0), "photo", seed=5, id_scale=0)) == pixels(plain)).all()
    assert (pixels(generator.generate(person(0), "photo", seed=5)) != pixels(plain)).any()


def test_people_look_different(generator):
    assert (pixels(generator.generate(person(0), "photo")) != pixels(generator.generate(person(1), "photo"))).any()


def test_the_schedule_limits_the_identity_to_its_steps(generator, monkeypatch):
    import omniid.models.identity_adapter as adapter_module

    strengths = []
    begin = adapter_module.AttachedIdentities.begin_pass

    def watch(self, num_image_tokens):
        strengths.append(self.strength)
        begin(self, num_image_tokens)

    monkeypatch.setattr(adapter_module.AttachedIdentities, "begin_pass", watch)
    generator.generate(person(0), "photo", num_inference_steps=4, id_start=0.25, id_end=0.75)
    assert strengths == [0, 1, 1, 0]
    strengths.clear()
    generator.generate(person(0), "photo", num_inference_steps=2, negative_prompt="of")
    assert strengths == [1, 1, 1, 1]  # the pass for the negative prompt has the identity too


def test_keys_and_values_are_computed_once_for_a_person(generator, monkeypatch):
    calls = []
    project = generator.adapter.project
    monkeypatch.setattr(generator.adapter, "project", lambda tokens: calls.append(1) or project(tokens))
    for seed in range(2):
        generator.generate(person(11), "photo", seed=seed)
    generator.generate([person(11), person(12)], "photo")
    assert len(calls) == 2


def test_several_people_with_maps(generator):
    left = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    both = pixels(generator.generate([person(0), person(1)], "photo", id_scale=[left, 1 - left]))
    swapped = pixels(generator.generate([person(1), person(0)], "photo", id_scale=[1 - left, left]))
    assert np.abs(both - swapped).max() <= 1
    assert (both != pixels(generator.generate([person(0), person(1)], "photo", id_scale=[1 - left, left]))).any()


def test_a_negative_prompt_changes_the_picture(generator):
    plain = pixels(generator.generate(None, "photo"))
    assert (plain != pixels(generator.generate(None, "photo", negative_prompt="person"))).any()


def test_identities_of_another_encoder_are_refused(generator):
    with pytest.raises(OmniIDError, match=r"made by encoder eeeeeeeeeeee .* encode the photos again"):
        generator.generate(person(0, encoder="e" * 64), "photo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"height": 40}, "multiples of 16, got 32x40"),
        ({"num_inference_steps": 0}, "steps must be at least 1, got 0"),
        ({"num_images": 0}, "images must be at least 1"),
        ({"seed": -1}, "seed must be"),
        ({"id_start": 0.8, "id_end": 0.2}, "start and end"),
        ({"id_scale": float("nan")}, "scale must be finite"),
        ({"id_scale": [1.0, 1.0]}, "2 identity scales for 1 identities"),
        ({"id_scale": torch.ones(3)}, r"one value per image token \(4\)"),
    ],
)
def test_requests_that_cannot_be_met(generator, arguments, message):
    with pytest.raises(GenerateError, match=message):
        generator.generate(person(0), **({"prompt": "photo"} | arguments))


def test_pictures_of_nan_are_an_error_and_nothing_stays_attached(weights):
    broken = load_generator(weights)
    broken.pipeline.vae.decoder.layers[0].bias.data.fill_(float("nan"))
    with pytest.raises(GenerateError, match="NaN or infinite pixels"):
        broken.generate(person(0), "photo")


def test_an_adapter_of_another_base_is_refused(weights, tiny, tmp_path):
    sizes = dataclasses.replace(tiny.base.sizes, num_single_blocks=3)
    save_base(build_base(sizes, 8, ["photo"], seed=0), tmp_path / "base")
    with pytest.raises(AdapterError, match=r"has 3 blocks .* the base has 4"):
        load_generator(weights, base=tmp_path / "base")


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(OmniIDError, match="no trained weights for"):
        load_generator(tmp_path)


def test_identity_guidance_takes_the_change_that_many_times(generator):
    def drawn(**settings):
        return pixels(generator.generate(person(0), "photo", num_inference_steps=1, **settings))

    plain, once, twice = drawn(id_scale=0.0), drawn(), drawn(id_guidance=2.0)
    assert (drawn(id_guidance=1.0) == once).all() and (drawn(id_guidance=0.0) == plain).all()
    assert (twice != once).any()
    assert (drawn(id_scale=0.0, id_guidance=3.0) == plain).all()
    with pytest.raises(GenerateError, match="guidance must be finite"):
        drawn(id_guidance=float("inf"))


def test_guidance_is_linear_in_the_velocity(generator):
    transformer, use = generator.pipeline.transformer, IdentityUse(generator._project(person(0)))
    random = torch.Generator().manual_seed(0)
    text = embed_text(generator.pipeline, ["photo"], 24)
    arguments = (torch.randn(1, 16, 4, 4, generator=random), torch.tensor([0.5]), text, torch.tensor([3.5]))
    velocities = []
    with torch.inference_mode():
        for guidance in (0.0, 1.0, 3.0):
            with attach_identities(transformer, [use], guidance=guidance):
                velocities.append(predict_velocity(transformer, *arguments))
    none, one, three = velocities
    torch.testing.assert_close(three, none + 3 * (one - none))
    torch.testing.assert_close(none, predict_velocity(transformer, *arguments))


@pytest.fixture(scope="module")
def controlled(weights, tmp_path_factory):
    """The generator with a landmark ControlNet that has something to say."""
    folder = tmp_path_factory.mktemp("controlled") / "weights"
    shutil.copytree(weights, folder)
    controlnet = build_landmark_controlnet(load_generator(weights).pipeline.transformer, 1, 1)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.15)
    save_landmark_controlnet(controlnet, folder / "controlnet")
    return load_generator(folder)


def test_landmarks_steer_the_picture_as_strongly_as_said(controlled, generator):
    points = template_landmarks(0, 0, 0, size=32)
    plain = pixels(controlled.generate(person(0), "photo"))
    assert (plain == pixels(generator.generate(person(0), "photo"))).all()
    assert (plain == pixels(controlled.generate(person(0), "photo", landmarks=points, landmark_scale=0.0))).all()
    steered = pixels(controlled.generate(person(0), "photo", landmarks=points))
    assert (steered != plain).any()
    turned = pixels(controlled.generate(person(0), "photo", landmarks=template_landmarks(40, 0, 0, size=32)))
    assert (turned != steered).any()


def test_the_identity_acts_beside_landmarks(controlled):
    points = template_landmarks(0, 0, 0, size=32)
    pictures = [
        pixels(controlled.generate(who, "photo", landmarks=points, id_scale=scale))
        for who, scale in ((person(0), 1.0), (person(1), 1.0), (person(0), 0.0), (None, 1.0))
    ]
    assert (pictures[0] != pictures[1]).any() and (pictures[0] != pictures[2]).any()
    assert (pictures[2] == pictures[3]).all()


def test_landmarks_that_cannot_be_used(controlled, generator):
    with pytest.raises(GenerateError, match="these weights hold no landmark ControlNet"):
        generator.generate(person(0), "photo", landmarks=template_landmarks(0, 0, 0, size=32))
    with pytest.raises(GenerateError, match=r"landmarks must be \(66, 2\)"):
        controlled.generate(person(0), "photo", landmarks=np.zeros((5, 2)))
    with pytest.raises(GenerateError, match="scale must be finite"):
        controlled.generate(
            person(0), "photo", landmarks=template_landmarks(0, 0, 0, size=32), landmark_scale=float("nan")
        )
