"""The adapter beside what people use with diffusers: plain code, compilation, offload, tiling, LoRAs, schedulers."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from omniid.errors import OmniIDError
from omniid.generate import GenerateError, Generator, load_generator
from omniid.models.flux import embed_text, load_base, predict_velocity
from omniid.models.identity_adapter import AdapterError, IdentityAdapter, IdentityUse, attach_identities


@pytest.fixture
def pipe(drawing_weights):
    return load_base(drawing_weights / "base")


@pytest.fixture
def adapter(drawing_weights):
    return IdentityAdapter.from_pretrained(drawing_weights)


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def draw(pipe, prompts="photo", seed: int = 0, **settings):
    prompts = [prompts] if isinstance(prompts, str) else prompts
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    settings = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 24} | settings
    return pixels(pipe(prompts, generator=generators, guidance_scale=3.5, **settings).images)


def test_three_lines_of_plain_code_draw_what_the_generator_draws(
    pipe, drawing_weights, generator, make_person, tmp_path
):
    make_person(0).save(tmp_path / "id.pt", dtype=torch.float32)

    from omniid import Identity

    adapter = IdentityAdapter.from_pretrained(drawing_weights)
    with adapter.drawing(pipe, Identity.load(tmp_path / "id.pt")):
        image = draw(pipe)

    assert (image == pixels(generator.generate(make_person(0), "photo"))).all()
    assert (draw(pipe) == pixels(generator.generate(None, "photo"))).all()


def test_plain_code_draws_several_people_and_batches(pipe, adapter, generator, make_person):
    people = [make_person(0), make_person(1)]
    with adapter.drawing(pipe, people, scale=[1.0, 0.5], guidance=2.0):
        together = draw(pipe)
    assert (together == pixels(generator.generate(people, "photo", id_scale=[1.0, 0.5], id_guidance=2.0))).all()
    with adapter.drawing(pipe, people, guidance=2.0, guide_text=embed_text(pipe, [""], 24)):
        jointly = draw(pipe)
    settings = {"id_guidance": 2.0, "joint_guidance": True}
    assert (jointly == pixels(generator.generate(people, "photo", **settings))).all() and (jointly != together).any()
    with adapter.drawing(pipe, people, one_each=True):
        batch = draw(pipe, ["photo", "photo of a person"])
    each = pixels(generator.generate_batch(people, ["photo", "photo of a person"]))
    assert (batch == each).all()
    with pytest.raises(ValueError, match="1 scales for 2 identities"), adapter.drawing(pipe, people, scale=[1.0]):
        pass
    with pytest.raises(OmniIDError, match="encode the photos again"), adapter.drawing(pipe, make_person(0, "e" * 64)):
        pass


@pytest.fixture
def velocity_arguments(pipe):
    random = torch.Generator().manual_seed(0)
    text = embed_text(pipe, ["photo"], 24)
    return torch.randn(1, 16, 4, 4, generator=random), torch.tensor([0.5]), text, torch.tensor([3.5])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["whole", "in place", "blocks"])
def test_compiled_transformers_draw_the_same(pipe, adapter, make_person, velocity_arguments, way):
    def outputs(transformer) -> list[torch.Tensor]:
        # Several strengths and none: what a schedule does between steps.
        results = []
        with torch.no_grad(), adapter.drawing(pipe, make_person(0), guidance=2.0) as attached:
            for strength in (1.0, 0.5, 0.0):
                attached.uses[0].strength = strength
                results.append(predict_velocity(transformer, *velocity_arguments))
        with torch.no_grad():
            results.append(predict_velocity(transformer, *velocity_arguments))
        return results

    eager = outputs(pipe.transformer)
    torch.compiler.reset()
    if way == "whole":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    elif way == "in place":
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    for ours, expected in zip(outputs(pipe.transformer), eager, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(eager[0], eager[1]) and torch.equal(eager[2], eager[3])
    torch.compiler.reset()


def test_offloaded_weights_draw_the_same(pipe, adapter, generator, make_person):
    from accelerate import cpu_offload

    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.vae):
        cpu_offload(part, execution_device=torch.device("cpu"))  # what sequential offload does, to a GPU
    assert pipe.transformer.device.type == "meta"
    offloaded = Generator(pipe, adapter, generator.defaults)
    for settings in ({}, {"id_guidance": 2.0, "joint_guidance": True}, {"negative_prompt": "of"}):
        drawn = pixels(offloaded.generate(make_person(0), "photo", **settings))
        assert (drawn == pixels(generator.generate(make_person(0), "photo", **settings))).all()


def test_keys_follow_the_transformer_to_its_device(pipe, adapter, make_person):
    # What model offload looks like before the first step: the transformer is elsewhere when the identity is attached.
    with adapter.drawing(pipe, make_person(0)) as attached:
        attached.begin_pass(torch.empty(1, 4, 64, device="meta"))
        assert attached.uses[0].kv.keys.device.type == "meta" and attached.of_block[0][0][0].device.type == "meta"


def test_tiled_decoding_draws_the_same_person(pipe, adapter, make_person):
    with adapter.drawing(pipe, make_person(0)):
        latents = pipe("photo", height=32, width=32, num_inference_steps=1, max_sequence_length=24, output_type="latent",
                       generator=torch.Generator().manual_seed(0)).images  # fmt: skip
        whole = draw(pipe, num_inference_steps=1)
        pipe.vae.enable_tiling()
        tiled = draw(pipe, num_inference_steps=1)
    assert latents.shape == (1, 4, 64) and np.abs(whole - tiled).max() <= 1  # one tile holds it


def test_loras_stack_and_have_weights(drawing_weights, generator, make_person, lora_file):
    def drawn(*loras, who=0):
        return pixels(load_generator(drawing_weights, loras=loras).generate(make_person(who), "photo"))

    plain = pixels(generator.generate(make_person(0), "photo"))
    assert (drawn((lora_file, 0.0)) == plain).all()
    assert (drawn((lora_file, 1.0)) != plain).any()
    assert (drawn((lora_file, 1.0)) != drawn((lora_file, 1.0), who=1)).any()
    assert np.abs(drawn((lora_file, 0.5), (lora_file, 0.5)) - drawn((lora_file, 1.0))).max() <= 1


def test_loras_that_do_not_fit(drawing_weights, tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(OmniIDError, match=r"the LoRA .*lora.safetensors cannot be loaded \("):
        load_generator(drawing_weights, loras=[(str(tmp_path / "lora.safetensors"), 1.0)])


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ],
    ids=["euler", "unipc"],
)
def test_other_schedulers_draw_too(pipe, adapter, generator, make_person, scheduler):
    pipe.scheduler = scheduler
    drawer = Generator(pipe, adapter, generator.defaults)
    plain = draw(pipe, num_inference_steps=4)
    drawn = [
        pixels(drawer.generate(make_person(0), "photo", num_inference_steps=4, **settings))
        for settings in ({}, {"id_end": 0.5}, {"id_scale": 0.0})
    ]
    assert (drawn[0] != drawn[1]).any() and (drawn[1] != plain).any() and (drawn[2] == plain).all()


def test_four_bit_weights_draw(drawing_weights, adapter, generator, make_person):
    """NF4 layers of bitsandbytes, on the CPU where that package runs; from_pretrained asks for a GPU."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    pipe = load_base(drawing_weights / "base")
    replaced = 0
    for block in [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]:
        for name in ("to_q", "to_k", "to_v"):
            old = getattr(block.attn, name)
            new = bitsandbytes.nn.Linear4bit(32, 32, quant_type="nf4", compute_dtype=torch.float32)
            new.load_state_dict(old.state_dict())
            setattr(block.attn, name, new.to("cpu"))
            replaced += 1
    narrow = Generator(pipe, adapter, generator.defaults)
    drawn = pixels(narrow.generate(make_person(0), "photo"))
    assert replaced == 9 and (drawn != pixels(narrow.generate(make_person(1), "photo"))).any()
    assert (
        pixels(narrow.generate(make_person(0), "photo", id_scale=0.0)) == pixels(narrow.generate(None, "photo"))
    ).all()


def test_fused_projections_draw_the_same(pipe, adapter, generator, make_person):
    pipe.transformer.fuse_qkv_projections()
    with adapter.drawing(pipe, make_person(0)):
        fused = draw(pipe)
    assert np.abs(fused - pixels(generator.generate(make_person(0), "photo"))).max() <= 1


def test_the_attention_backend_that_was_chosen_stays(pipe, adapter, make_person):
    pipe.transformer.set_attention_backend("_native_math")
    with adapter.drawing(pipe, make_person(0)):
        backends = {block.attn.processor._attention_backend for block in pipe.transformer.transformer_blocks}
    assert backends == {"_native_math"}


def test_a_transformer_with_another_adapter_is_refused(pipe, adapter, make_person):
    class OtherProcessor:
        def __call__(self, *args, **kwargs):
            raise AssertionError

    pipe.transformer.transformer_blocks[0].attn.set_processor(OtherProcessor())
    with pytest.raises(AdapterError, match=r"replaced by OtherProcessor already; unload the other adapter"):
        draw_nothing = adapter.drawing(pipe, make_person(0))
        draw_nothing.__enter__()


@pytest.mark.parametrize("implementation", ["reference", "native", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_form_of_the_attention_agrees(
    pipe, adapter, make_person, velocity_arguments, monkeypatch, implementation, dtype
):
    from omniid.kernels._native_library import library

    if implementation == "native" and library() is None:
        pytest.skip("the native library is not built")
    transformer = pipe.transformer.to(dtype)
    latents, time, text, guidance = velocity_arguments
    text = type(text)(text.tokens.to(dtype), text.pooled.to(dtype))
    arguments = (latents.to(dtype), time.to(dtype), text, guidance.to(dtype))
    kv = adapter.project(make_person(0).tokens.unsqueeze(0))
    results = []
    for choice, in_place in (("reference", False), (implementation, True), (implementation, False)):
        monkeypatch.setenv("OMNIID_KERNELS", choice)
        with torch.no_grad() if in_place else torch.enable_grad(), attach_identities(transformer, [IdentityUse(kv)]):
            results.append(predict_velocity(transformer, *arguments).detach().float())
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=tolerance, rtol=tolerance)


def test_cached_keys_and_values_equal_new_ones_to_the_bit(pipe, adapter, generator, make_person):
    first = pixels(generator.generate(make_person(0), "photo"))
    cached = pixels(generator.generate(make_person(0), "photo"))
    generator._projected.clear()
    assert (cached == first).all() and (pixels(generator.generate(make_person(0), "photo")) == first).all()


def test_only_so_many_identities_stay_in_memory(generator, make_person):
    from omniid.generate.generator import KEPT_IDENTITIES

    for seed in range(KEPT_IDENTITIES + 3):
        generator._project(make_person(100 + seed))
    assert len(generator._projected) == KEPT_IDENTITIES
    with pytest.raises(GenerateError, match="finite"):
        generator.generate(make_person(0), "photo", id_scale=float("inf"))
