"""Generating: deterministic, the identity acts when and where it should, and wrong requests get one sentence."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from omniid.data.synthetic import template_landmarks
from omniid.errors import OmniIDError
from omniid.generate import GenerateError, Generator, Schedule, load_generator
from omniid.models.flux import embed_text, predict_velocity
from omniid.models.identity_adapter import AdapterError, IdentityUse, attach_identities
from omniid.models.mini_base import build_base
from omniid.train.base import save_base


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_the_seed_decides_the_picture(generator, make_person):
    first, again, other = (pixels(generator.generate(make_person(0), "photo", seed=seed)) for seed in (7, 7, 8))
    assert (first == again).all()
    assert (first != other).any()


def test_picture_i_of_several_is_the_picture_of_seed_plus_i(generator, make_person):
    several = pixels(generator.generate(make_person(0), "photo", seed=3, num_images=3))
    for index in range(3):
        alone = pixels(generator.generate(make_person(0), "photo", seed=3 + index))
        assert np.abs(several[index] - alone[0]).max() <= 1


def test_the_size_and_the_default_size(generator):
    assert generator.generate(None, "photo")[0].size == (32, 32)
    assert generator.generate(None, "photo", width=48, height=16)[0].size == (48, 16)


def test_without_identity_it_is_the_bases_own_picture(generator, drawing_weights, tiny, make_person):
    from omniid.models.flux import load_base

    plain = load_base(drawing_weights / "base")(
        "photo",
        height=32,
        width=32,
        num_inference_steps=2,
        max_sequence_length=tiny.base.max_sequence_length,
        generator=torch.Generator().manual_seed(5),
    ).images
    assert (pixels(generator.generate(None, "photo", seed=5)) == pixels(plain)).all()
    assert (pixels(generator.generate(make_person(0), "photo", seed=5, id_scale=0)) == pixels(plain)).all()
    assert (pixels(generator.generate(make_person(0), "photo", seed=5)) != pixels(plain)).any()


def test_the_noise_may_be_scaled(generator, drawing_weights, tiny, make_person):
    """As whoever calls the pipeline with latents of their own would do it; each picture keeps its seed's noise."""
    from omniid.models.flux import load_base

    def drawn(**settings):
        return pixels(generator.generate(None, "photo", seed=5, **settings))

    pipeline = load_base(drawing_weights / "base")
    noise = torch.randn(
        1, pipeline.transformer.config.in_channels // 4, 4, 4, generator=torch.Generator().manual_seed(5)
    )
    latents = 0.5 * pipeline._pack_latents(noise, *noise.shape)
    plain = pipeline(
        "photo", height=32, width=32, num_inference_steps=2, max_sequence_length=tiny.base.max_sequence_length,
        latents=latents,
    ).images  # fmt: skip
    halved = drawn(noise_scale=0.5)
    assert (halved == pixels(plain)).all() and (halved != drawn()).any()
    assert (drawn(noise_scale=1.0) == drawn()).all()
    preset = dataclasses.replace(generator.defaults, noise_scale=0.5)
    by_preset = type(generator)(generator.pipeline, generator.adapter, preset)
    assert (pixels(by_preset.generate(None, "photo", seed=5)) == halved).all()
    assert np.abs(pixels(by_preset.generate(None, "photo", seed=4, num_images=2))[1] - halved).max() <= 1
    start = Image.new("RGB", (32, 32), (90, 120, 60))
    on_picture = [pixels(one.generate(None, "photo", image=start)) for one in (generator, by_preset)]
    assert (on_picture[0] == on_picture[1]).all()  # which has no noise to start from
    with pytest.raises(GenerateError, match="noise_scale is for pictures drawn from noise alone"):
        generator.generate(None, "photo", image=start, noise_scale=0.5)
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(GenerateError, match="the scale of the noise must be above 0, got"):
            drawn(noise_scale=scale)


def test_people_look_different(generator, make_person):
    assert (
        pixels(generator.generate(make_person(0), "photo")) != pixels(generator.generate(make_person(1), "photo"))
    ).any()


def test_the_schedule_limits_the_identity_to_its_steps(generator, monkeypatch, make_person):
    import omniid.models.identity_adapter as adapter_module

    strengths = []
    begin = adapter_module.AttachedIdentities.begin_pass

    def watch(self, hidden_states):
        strengths.append(self.uses[0].strength)
        begin(self, hidden_states)

    monkeypatch.setattr(adapter_module.AttachedIdentities, "begin_pass", watch)
    generator.generate(make_person(0), "photo", num_inference_steps=4, id_start=0.25, id_end=0.75)
    assert strengths == [0, 1, 1, 0]
    strengths.clear()
    generator.generate(make_person(0), "photo", num_inference_steps=2, negative_prompt="of")
    assert strengths == [1, 1, 1, 1]  # the pass for the negative prompt has the identity too
    strengths.clear()
    generator.generate(make_person(0), "photo", num_inference_steps=3, id_scale=Schedule((2.0, 1.0)), id_end=0.9)
    assert strengths == [2, 1.5, 1]


def test_keys_and_values_are_computed_once_for_a_person(generator, monkeypatch, make_person):
    calls = []
    project = generator.adapter.project
    monkeypatch.setattr(generator.adapter, "project", lambda tokens: calls.append(1) or project(tokens))
    for seed in range(2):
        generator.generate(make_person(11), "photo", seed=seed)
    generator.generate([make_person(11), make_person(12)], "photo")
    assert len(calls) == 2


def test_several_people_with_maps(generator, make_person):
    left = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    both = pixels(generator.generate([make_person(0), make_person(1)], "photo", id_scale=[left, 1 - left]))
    swapped = pixels(generator.generate([make_person(1), make_person(0)], "photo", id_scale=[1 - left, left]))
    assert np.abs(both - swapped).max() <= 1
    assert (
        both != pixels(generator.generate([make_person(0), make_person(1)], "photo", id_scale=[1 - left, left]))
    ).any()


def test_regions_are_maps_and_scale_with_the_schedule(generator, make_person):
    people, left = [make_person(0), make_person(1)], torch.tensor([1.0, 0.0, 1.0, 0.0])
    by_name = pixels(generator.generate(people, "photo", regions=["left", "right"], region_softness=0, id_scale=0.5))
    by_map = pixels(generator.generate(people, "photo", id_scale=[0.5 * left, 0.5 - 0.5 * left]))
    assert np.abs(by_name - by_map).max() <= 1
    again = generator.generate(people, "photo", regions=["left", "0.5,0,1,1"], region_softness=0, id_scale=0.5)
    assert (by_name == pixels(again)).all()
    assert (by_name != pixels(generator.generate(people, "photo", regions=["right", "left"], id_scale=0.5))).any()


def test_blocks_can_be_left_out(generator, make_person):
    def drawn(blocks: str):
        return pixels(generator.generate(make_person(0), "photo", id_blocks=blocks))

    plain = pixels(generator.generate(None, "photo"))
    assert (drawn("double=0,single=0") == plain).all() and (drawn("0-2=0") == plain).all()
    assert (drawn("double=0") != drawn("single=0")).any() and (drawn("double=0") != plain).any()
    assert (drawn("double=1,single=1") == drawn("")).all()


def test_a_negative_identity_takes_the_place_of_nobody(generator, make_person):
    def drawn(**settings):
        return pixels(generator.generate(make_person(0), "photo", num_inference_steps=1, **settings))

    pushed = drawn(negative_identity=make_person(1), id_guidance=2.0)
    assert (pushed != drawn(id_guidance=2.0)).any()
    assert (pushed != drawn(negative_identity=make_person(2), id_guidance=2.0)).any()
    # v_own + g (v_own - v_own) = v_own
    assert np.abs(drawn(negative_identity=make_person(0), id_guidance=2.0) - drawn(id_guidance=1.0)).max() <= 1
    with pytest.raises(GenerateError, match="negative identity needs an identity to draw and id_guidance other than 1"):
        drawn(negative_identity=make_person(1))


def test_a_batch_of_people_equals_single_runs(generator, make_person):
    people, prompts = [make_person(0), make_person(1)], ["photo of a person", "photo"]
    both = pixels(generator.generate_batch(people, prompts, seeds=[4, 9], id_scale=0.7, negative_prompt="of"))
    for index, (who, prompt, seed) in enumerate(zip(people, prompts, (4, 9), strict=True)):
        alone = pixels(generator.generate(who, prompt, seed=seed, id_scale=0.7, negative_prompt="of"))
        assert np.abs(both[index] - alone[0]).max() <= 1  # the last bit may differ with the size of the batch
    assert np.abs(both[0] - both[1]).max() > 1
    with pytest.raises(
        GenerateError, match="a prompt and a seed for each identity, got 2 identities, 1 prompts and 2 seeds"
    ):
        generator.generate_batch(people, ["photo"])


def test_pictures_can_start_from_one_and_change_in_a_mask(generator, make_person):
    start = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    drawn = pixels(generator.generate(make_person(0), "photo", image=start, image_strength=0.5))
    assert (drawn != pixels(generator.generate(make_person(1), "photo", image=start, image_strength=0.5))).any()
    assert (drawn != pixels(generator.generate(make_person(0), "photo"))).any()
    right = Image.fromarray(np.repeat(np.uint8([[0] * 96 + [255] * 32]), 32, axis=0))
    settings = {"image": start, "mask": right, "image_strength": 1.0, "width": 128}
    people = [pixels(generator.generate(make_person(seed), "photo", **settings)) for seed in (0, 1)]
    changed = np.abs(people[0] - people[1]).sum((0, 1, 3))
    assert changed[96:].any() and not changed[:32].any()  # the decoder reaches over the edge


def test_a_generator_of_another_pipeline_class_draws_the_same(generator, drawing_weights, make_person):
    from diffusers import FluxImg2ImgPipeline

    from omniid.generate import Generator

    parts = generator.pipeline.components
    other = Generator(FluxImg2ImgPipeline(**parts), generator.adapter, generator.defaults)
    start = Image.new("RGB", (32, 32), "grey")
    for settings in ({}, {"image": start}):
        mine = pixels(generator.generate(make_person(0), "photo", **settings))
        assert (mine == pixels(other.generate(make_person(0), "photo", **settings))).all()


def test_the_safety_checker_of_a_pipeline_is_asked(drawing_weights, make_person):
    from transformers import CLIPImageProcessorPil

    careful = load_generator(drawing_weights)
    careful.pipeline.feature_extractor = CLIPImageProcessorPil()
    seen = []

    class Checker(torch.nn.Module):
        def forward(self, images, clip_input):
            seen.append((images.shape, tuple(clip_input.shape)))
            return images, [True, False]

    careful.pipeline.safety_checker = Checker()
    with pytest.warns(UserWarning, match="safety checker blackened picture 0"):
        black, shown = careful.generate(make_person(0), "photo", num_images=2)
    assert not np.asarray(black).any() and np.asarray(shown).any()
    assert seen == [((2, 32, 32, 3), (2, 3, 224, 224))]


def test_a_negative_prompt_changes_the_picture(generator):
    plain = pixels(generator.generate(None, "photo"))
    assert (plain != pixels(generator.generate(None, "photo", negative_prompt="person"))).any()


def test_identities_of_another_encoder_are_refused(generator, make_person):
    with pytest.raises(OmniIDError, match=r"made by encoder eeeeeeeeeeee .* encode the photos again"):
        generator.generate(make_person(0, encoder="e" * 64), "photo")


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
        ({"id_scale": torch.full((4,), torch.nan)}, "scale must be finite"),
        ({"id_blocks": "double:0"}, "'double:0' is no scale of blocks"),
        ({"id_blocks": "1-3=0"}, r"blocks from 0 to 2"),
        ({"regions": ["left", "right"]}, "2 regions for 1 identities"),
        ({"regions": ["up"]}, "'up' is no region"),
        ({"negative_prompt": "of", "negative_scale": 1.0}, "must be above 1"),
        ({"mask": Image.new("L", (32, 32))}, "give the picture too"),
        ({"image": Image.new("RGB", (32, 32)), "image_strength": 0.0}, "image strength must be above 0"),
    ],
)
def test_requests_that_cannot_be_met(generator, arguments, message, make_person):
    with pytest.raises(GenerateError, match=message):
        generator.generate(make_person(0), **({"prompt": "photo"} | arguments))


def test_pictures_of_nan_are_an_error_and_nothing_stays_attached(drawing_weights, make_person):
    broken = load_generator(drawing_weights)
    broken.pipeline.vae.decoder.layers[0].bias.data.fill_(float("nan"))
    with pytest.raises(GenerateError, match="NaN or infinite pixels"):
        broken.generate(make_person(0), "photo")


def test_an_adapter_of_another_base_is_refused(drawing_weights, tiny, tmp_path):
    sizes = dataclasses.replace(tiny.base.sizes, num_single_blocks=3)
    save_base(build_base(sizes, 8, ["photo"], seed=0), tmp_path / "base")
    with pytest.raises(AdapterError, match=r"has 3 blocks .* the base has 4"):
        load_generator(drawing_weights, base=tmp_path / "base")


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(OmniIDError, match="no trained weights for"):
        load_generator(tmp_path)


def test_identity_guidance_takes_the_change_that_many_times(generator, make_person):
    def drawn(**settings):
        return pixels(generator.generate(make_person(0), "photo", num_inference_steps=1, **settings))

    plain, once, twice = drawn(id_scale=0.0), drawn(), drawn(id_guidance=2.0)
    assert (drawn(id_guidance=1.0) == once).all() and (drawn(id_guidance=0.0) == plain).all()
    assert (twice != once).any()
    assert (drawn(id_scale=0.0, id_guidance=3.0) == plain).all()
    with pytest.raises(GenerateError, match="guidance must be finite"):
        drawn(id_guidance=float("inf"))


def test_guidance_is_linear_in_the_velocity(generator, make_person):
    transformer, use = generator.pipeline.transformer, IdentityUse(generator._project(make_person(0)))
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


def test_joint_guidance_takes_the_prompts_change_as_often(generator, make_person):
    def drawn(prompt="photo", **settings):
        return pixels(generator.generate(make_person(0), prompt, num_inference_steps=1, **settings))

    joint = drawn(id_guidance=3.0, joint_guidance=True)
    assert (joint != drawn(id_guidance=3.0)).any()
    assert (drawn(joint_guidance=True) == drawn()).all()
    nobody = pixels(generator.generate(None, "photo", num_inference_steps=1))
    assert (drawn(id_scale=0.0, id_guidance=3.0, joint_guidance=True) == nobody).all()
    # With guidance 0 the prompt says nothing any more.
    unheard = {"id_guidance": 0.0, "joint_guidance": True}
    assert (drawn(**unheard) == drawn("of", **unheard)).all() and (drawn() != drawn("of")).any()
    preset = dataclasses.replace(generator.defaults, id_guidance=3.0, joint_guidance=True)
    by_preset = Generator(generator.pipeline, generator.adapter, preset)
    assert (pixels(by_preset.generate(make_person(0), "photo", num_inference_steps=1)) == joint).all()
    people = [make_person(0), make_person(1)]
    both = pixels(by_preset.generate_batch(people, ["photo", "of"], seeds=[0, 4], num_inference_steps=1))
    assert np.abs(both[0] - joint[0]).max() <= 1
    with_all = {"negative_identity": make_person(1), "negative_prompt": "of"}
    pushed = pixels(by_preset.generate(make_person(0), "photo", num_inference_steps=1, **with_all))
    assert (pushed != joint).any()


def test_landmarks_steer_the_picture_as_strongly_as_said(controlled, generator, make_person, monkeypatch):
    points = template_landmarks(0, 0, 0, size=32)
    plain = pixels(controlled.generate(make_person(0), "photo"))
    assert (plain == pixels(generator.generate(make_person(0), "photo"))).all()
    assert (plain == pixels(controlled.generate(make_person(0), "photo", landmarks=points, landmark_scale=0.0))).all()
    steered = pixels(controlled.generate(make_person(0), "photo", landmarks=points))
    assert (steered != plain).any()
    half = pixels(controlled.generate(make_person(0), "photo", landmarks=points, landmark_scale=0.5))
    with monkeypatch.context() as patch:
        patch.setattr(controlled, "defaults", dataclasses.replace(controlled.defaults, landmark_scale=0.5))
        by_preset = pixels(controlled.generate(make_person(0), "photo", landmarks=points))
    assert (half == by_preset).all() and (half != steered).any()
    # With guidance 0 nothing is heard any more, landmarks neither.
    unheard = {"id_guidance": 0.0, "joint_guidance": True}
    deaf = pixels(controlled.generate(make_person(0), "photo", landmarks=points, **unheard))
    assert (deaf == pixels(generator.generate(make_person(0), "photo", **unheard))).all()
    turned = pixels(controlled.generate(make_person(0), "photo", landmarks=template_landmarks(40, 0, 0, size=32)))
    assert (turned != steered).any()


def test_the_identity_acts_beside_landmarks(controlled, make_person):
    points = template_landmarks(0, 0, 0, size=32)
    pictures = [
        pixels(controlled.generate(who, "photo", landmarks=points, id_scale=scale))
        for who, scale in ((make_person(0), 1.0), (make_person(1), 1.0), (make_person(0), 0.0), (None, 1.0))
    ]
    assert (pictures[0] != pictures[1]).any() and (pictures[0] != pictures[2]).any()
    assert (pictures[2] == pictures[3]).all()


def test_landmarks_go_with_a_picture_to_start_from(controlled, make_person):
    start, mask = Image.new("RGB", (32, 32), "grey"), Image.new("L", (32, 32), 255)
    points = [template_landmarks(yaw, 0, 0, size=32) for yaw in (0, 40)]
    for settings in ({"image": start}, {"image": start, "mask": mask}):
        drawn = [pixels(controlled.generate(make_person(0), "photo", landmarks=one, **settings)) for one in points]
        assert (drawn[0] != drawn[1]).any()
        with pytest.raises(GenerateError, match="takes no negative prompt"):
            controlled.generate(make_person(0), "photo", landmarks=points[0], negative_prompt="of", **settings)


def test_landmarks_that_cannot_be_used(controlled, generator, make_person):
    with pytest.raises(GenerateError, match="these weights hold no landmark ControlNet"):
        generator.generate(make_person(0), "photo", landmarks=template_landmarks(0, 0, 0, size=32))
    with pytest.raises(GenerateError, match=r"landmarks must be \(66, 2\)"):
        controlled.generate(make_person(0), "photo", landmarks=np.zeros((5, 2)))
    with pytest.raises(GenerateError, match="scale must be finite"):
        controlled.generate(
            make_person(0), "photo", landmarks=template_landmarks(0, 0, 0, size=32), landmark_scale=float("nan")
        )
