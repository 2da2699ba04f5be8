"""The base's transformer through torch.compile, in CUDA graphs where the mode has them: `omniid generate --compile`.

    default           kernels fused by Inductor
    blocks            the same block by block: all of a kind are compiled once, so the first picture of a large base waits less;
                      Python between the blocks costs a small base more than that is worth
    reduce-overhead   default recorded in CUDA graphs, which takes Python and launches out of a step
    max-autotune      in CUDA graphs too, with the tiles of matrix products chosen by trying them (minutes)

The first picture pays for compiling; other people, seeds, prompts and strengths reuse it. Pictures equal those without to
rounding.
"""

import torch
from torch import nn

from omniid.generate.errors import GenerateError

MODES = ("default", "blocks", "reduce-overhead", "max-autotune")
WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


def check_compile(mode: str, device: torch.device, offload: str) -> None:
    """Raises GenerateError for a mode that is unknown or cannot run on `device` with that offload."""
    if mode not in MODES:
        raise GenerateError(f"{mode!r} is no way to compile; use one of: {', '.join(MODES)}")
    if mode in WITH_CUDA_GRAPHS and device.type != "cuda":
        raise GenerateError(f"--compile {mode} records CUDA graphs, and this runs on {device.type}; use default")
    if offload == "sequential" or (offload == "model" and mode in WITH_CUDA_GRAPHS):
        # Graphs hold addresses of weights, which offload changes; layers that come one by one are no whole to compile.
        remedy = "use --compile default, or --offload none" if offload == "model" else "leave one of them out"
        raise GenerateError(f"--compile {mode} does not go with --offload {offload}; {remedy}")


def compile_transformer(transformer: nn.Module, mode: str, backend: str = "inductor") -> None:
    """Compiles in place: the blocks, or the forward pass; hooks, such as those of attached identities, stay outside."""
    if mode == "blocks":
        transformer.compile_repeated_blocks(backend=backend)
        return
    options = {"mode": mode} if backend == "inductor" else {}
    transformer.forward = torch.compile(transformer.forward, backend=backend, **options)
    if mode in WITH_CUDA_GRAPHS:
        transformer.register_forward_pre_hook(lambda module, args: torch.compiler.cudagraph_mark_step_begin())
        # The next pass overwrites a graph's output, and guidance looks at the outputs of two passes.
        transformer.register_forward_hook(lambda module, args, output: tuple(one.clone() for one in output))
