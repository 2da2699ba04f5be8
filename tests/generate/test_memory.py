"""Memory that ends is one sentence with what would help, and other errors stay what they are."""

import pytest
import torch

from omniid.generate import GenerateError, load_generator
from omniid.generate.memory import explained_lack_of_memory
from omniid.generate.precision import Placement

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
OF_CPU = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


def placed(precision: str, offload: str = "none") -> Placement:
    return Placement(precision, offload, torch.bfloat16, "")


@pytest.mark.parametrize(
    ("error", "placement", "device", "doing", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), placed("bf16"), CUDA, "drawing",
         "the GPU has too little free memory for drawing; try fewer --num-images or --tiling or --offload model or "
         "--precision nf4 or a smaller --size"),
        (torch.OutOfMemoryError("CUDA"), placed("bf16", "model"), CUDA, "loading the weights",
         "the GPU has too little free memory for loading the weights; try --offload sequential or --precision nf4"),
        (torch.OutOfMemoryError("CUDA"), placed("nf4", "model"), CUDA, "loading the weights", "close other programs"),
        (RuntimeError(OF_CPU), placed("fp32"), CPU, "loading the weights", "this machine has .* try --precision bf16"),
        (MemoryError(), None, CPU, "drawing", "try fewer --num-images or --tiling or a smaller --size"),
    ],
)  # fmt: skip
def test_what_would_help_is_said(error, placement, device, doing, words):
    lack = explained_lack_of_memory(doing, placement, device, num_images=2, is_tiled=False)
    with pytest.raises(GenerateError, match=words) as caught, lack:
        raise error
    assert len(str(caught.value).splitlines()) == 1 and caught.value.__cause__ is error


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes") as caught, explained_lack_of_memory("drawing", None, CPU):
        raise RuntimeError("shapes do not fit")
    assert not isinstance(caught.value, GenerateError)


def test_a_generator_survives_a_step_without_memory(generator, make_person, monkeypatch):
    before = generator.generate(make_person(0), "photo")[0]

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, pytest.raises(GenerateError, match="too little free memory for drawing"):
        patch.setattr(generator.pipeline.transformer, "forward", fail)
        generator.generate(make_person(0), "photo")
    assert (generator.generate(make_person(0), "photo")[0]).tobytes() == before.tobytes()


def test_weights_that_do_not_fit(drawing_weights, monkeypatch):
    from diffusers import FluxPipeline

    def fail(self, *args, **kwargs):
        raise RuntimeError(OF_CPU)

    monkeypatch.setattr(FluxPipeline, "to", fail)
    with pytest.raises(GenerateError, match="this machine has too little free memory for loading the weights"):
        load_generator(drawing_weights)
