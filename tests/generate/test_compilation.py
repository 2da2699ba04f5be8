"""A compiled transformer draws the same people, is compiled once for all of them, and refuses what cannot be."""

import dataclasses

import numpy as np
import pytest
import torch

from omniid.cli.commands.generate import generate
from omniid.generate import GenerateError, load_generator
from omniid.generate.compilation import MODES, check_compile, compile_transformer
from omniid.models.flux import embed_text, predict_velocity
from omniid.models.mini_base import build_base


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


# reduce-overhead for its hooks: the backend here records no CUDA graph.
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["blocks", "reduce-overhead"])
def test_one_compilation_serves_all_people_and_strengths(drawing_weights, generator, make_person, mode):
    from torch._dynamo.testing import CompileCounter

    compiled, counter = load_generator(drawing_weights), CompileCounter()
    torch.compiler.reset()
    compile_transformer(compiled.pipeline.transformer, mode, backend=counter)
    settings = [
        {"identity": make_person(0), "id_guidance": 2.0},
        {"identity": make_person(1), "seed": 3, "id_scale": 0.7},
        {"identity": make_person(2), "seed": 4, "id_scale": 0.3, "negative_prompt": "of"},
        {"identity": make_person(0), "id_guidance": 2.0, "joint_guidance": True},
    ]
    counts = []
    for one in settings:
        drawn, expected = (pixels(each.generate(prompt="photo", **one)) for each in (compiled, generator))
        assert np.abs(drawn - expected).max() <= 1
        counts.append(counter.frame_count)
    assert counts[0] > 0 and counts[-1] == counts[1]  # the second strength makes strength a variable
    torch.compiler.reset()


@pytest.mark.slow
def test_more_blocks_are_not_compiled_anew(tiny):
    from torch._dynamo.testing import CompileCounter

    def count(num_blocks: int) -> int:
        torch.compiler.reset()
        sizes = dataclasses.replace(tiny.base.sizes, num_double_blocks=num_blocks, num_single_blocks=num_blocks)
        pipeline, counter = build_base(sizes, 24, ["photo"], seed=0), CompileCounter()
        compile_transformer(pipeline.transformer, "blocks", backend=counter)
        with torch.no_grad():
            text = embed_text(pipeline, ["photo"], 24)
            latents, time, guidance = torch.zeros(1, 16, 4, 4), torch.tensor([0.5]), torch.tensor([3.5])
            predict_velocity(pipeline.transformer, latents, time, text, guidance)
        torch.compiler.reset()
        return counter.frame_count

    assert count(2) == count(5) > 0


@pytest.mark.parametrize(
    ("mode", "device", "offload", "words"),
    [
        (
            "fast",
            "cpu",
            "none",
            "'fast' is no way to compile; use one of: default, blocks, reduce-overhead, max-autotune",
        ),
        ("reduce-overhead", "cpu", "none", "records CUDA graphs, and this runs on cpu; use default"),
        ("max-autotune", "cuda", "model", "does not go with --offload model; use --compile default, or"),
        ("default", "cuda", "sequential", "does not go with --offload sequential; leave one of them out"),
    ],
)
def test_what_cannot_be_compiled(mode, device, offload, words):
    with pytest.raises(GenerateError, match=words):
        check_compile(mode, torch.device(device), offload)


def test_what_can_be_compiled():
    check_compile("default", torch.device("cpu"), "none")
    check_compile("default", torch.device("cuda"), "model")
    check_compile("blocks", torch.device("cuda"), "model")
    check_compile("max-autotune", torch.device("cuda"), "none")


def test_the_command_offers_every_mode():
    option = next(one for one in generate.params if one.name == "compile_mode")
    assert tuple(option.type.choices) == MODES
