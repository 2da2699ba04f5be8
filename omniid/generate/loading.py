"""A `Generator` from weights on disk or on the hub, in a precision and at a place that this machine can hold."""

from collections.abc import Sequence
from pathlib import Path

import torch

from omniid.config import BaseConfig, load_preset
from omniid.errors import OmniIDError
from omniid.generate.compilation import check_compile, compile_transformer
from omniid.generate.errors import GenerateError
from omniid.generate.generator import GenerateDefaults, Generator
from omniid.generate.memory import explained_lack_of_memory
from omniid.generate.precision import Placement, bitsandbytes_settings, choose_placement
from omniid.weights import weights_folder


def load_generator(
    name: str | Path = "mini",
    base: str | Path | None = None,
    adapter: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    precision: str = "auto",
    offload: str = "auto",
    controlnet: str | Path | None = None,
    loras: Sequence[tuple[str, float]] = (),
    compile_mode: str | None = None,
    tiling: bool = False,
) -> Generator:
    """A `Generator` from a preset with shipped weights or a folder that training exported.

    base: a diffusers FluxPipeline folder or hub name instead of the preset's. adapter: another adapter file.
    device: by default CUDA where there is a GPU, else the CPU. precision: auto, fp32, bf16, fp8 or nf4; offload: auto, none,
    model or sequential; `auto` takes what fits the free memory (`precision.choose_placement`, kept as
    `generator.placement`). dtype: of the base's weights, instead of a precision. controlnet: folder or hub name of a
    landmark ControlNet instead of the one beside the weights. loras: files, folders or hub names of diffusers LoRAs, each
    with its weight. compile_mode: of `compilation.MODES`; None draws without torch.compile. tiling: large pictures are
    decoded in tiles, which takes less memory and may show at their seams.
    Raises OmniIDError when weights are missing or do not belong together, GenerateError for what this device cannot run.
    """
    from omniid.models.flux import load_base
    from omniid.models.fp8 import freeze_in_fp8
    from omniid.models.identity_adapter import IdentityAdapter
    from omniid.models.landmark_controlnet import load_landmark_controlnet

    folder = weights_folder(name)
    preset = load_preset(folder / "preset.toml").base
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    path = base or (folder / "base" if preset.path == "embedded" else preset.path)
    placement = choose_placement(path, precision, offload, torch.device(device), dtype)
    if compile_mode is not None:
        check_compile(compile_mode, torch.device(device), placement.offload)
    # Read first: a missing or wrong file is said before gigabytes are loaded. With an offloaded base it stays on the CPU.
    at = device if placement.offload == "none" else "cpu"
    with explained_lack_of_memory("loading the weights", placement, torch.device(device)):
        loaded = IdentityAdapter.load(adapter or folder / "adapter.safetensors", at)
        options = {"quantization_config": bitsandbytes_settings()} if placement.precision == "nf4" else {}
        pipeline = load_base(path, placement.dtype, **options)
        load_loras(pipeline, loras)
        control = None
        beside = folder / "controlnet"
        if controlnet is not None or (beside.is_dir() and base is None):
            control = load_landmark_controlnet(controlnet or beside, pipeline.transformer, placement.dtype).to(device)
        if placement.precision == "fp8":
            freeze_in_fp8(pipeline.transformer)
        _place(pipeline, placement, device)
    if tiling:
        pipeline.vae.enable_tiling()
    if compile_mode is not None:
        compile_transformer(pipeline.transformer, compile_mode)
    generator = Generator(pipeline, loaded, defaults_of(preset), control)
    generator.placement = placement
    return generator


def defaults_of(preset: BaseConfig) -> GenerateDefaults:
    return GenerateDefaults(
        image_size=preset.image_size,
        num_inference_steps=preset.num_inference_steps,
        guidance_scale=preset.guidance_scale,
        id_guidance=preset.id_guidance,
        joint_guidance=preset.joint_guidance,
        noise_scale=preset.noise_scale,
        landmark_scale=preset.landmark_scale,
        max_sequence_length=preset.max_sequence_length,
    )


def _place(pipeline, placement: Placement, device: str | torch.device) -> None:
    if placement.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif placement.offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        pipeline.to(device)


def load_loras(pipeline, loras: Sequence[tuple[str, float]]) -> None:
    """Adds LoRAs, files or hub names each with its weight, to a pipeline. Raises OmniIDError for one that does not fit it."""
    for index, (source, _) in enumerate(loras):
        _load_lora(pipeline, source, f"lora{index}")
    if loras:
        pipeline.set_adapters([f"lora{index}" for index in range(len(loras))], [weight for _, weight in loras])


def _load_lora(pipeline, source: str, name: str) -> None:
    """Raises GenerateError for a file that is missing or no LoRA of this base."""
    if source.endswith(".safetensors") and not Path(source).is_file():
        raise GenerateError(f"the LoRA {source} does not exist; check the path")
    try:
        pipeline.load_lora_weights(source, adapter_name=name)
        if name not in {one for names in pipeline.get_list_adapters().values() for one in names}:
            raise ValueError("none of its weights is for a part of this base")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        lines = str(error).strip().splitlines()
        reason = lines[0][:200].rstrip(" .:") if lines else type(error).__name__
        raise OmniIDError(
            f"the LoRA {source} cannot be loaded ({reason}); give a LoRA for this base in a form that diffusers reads"
        ) from error
