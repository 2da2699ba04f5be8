"""Pictures of the same people, prompts and seeds in each precision, against the one that serves as the reference.

The reference is bf16 where the device multiplies it in hardware, else fp32, and bf16 is left out unless --bf16 asks for it:
such a CPU takes many times as long for it. `fp8` rounds the linear layers of the
transformer's blocks (`freeze_in_fp8`), `nf4` those of transformer and T5 to four bits (bitsandbytes), `fp8 adapter` the identity
adapter alone, with a scale for each output channel. Memory is that of the weights that stay on the device; on a GPU the most that
was allocated stands beside it. A recogniser compares faces: with the reference's picture of the same seed, with photos of the
person, and of the other people. LPIPS stands there where the package lpips is installed. Time is that of all CPU threads
together, which other work on the machine hardly changes; on a GPU it is the time that passes.
"""

import importlib.util
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness import DEVICE, command_line, report, training_dtype

from omniid.config import load_preset
from omniid.evaluate.people import unseen_people
from omniid.evaluate.run import encode_people, identities_of
from omniid.faces import analyzer
from omniid.generate import Generator, load_generator
from omniid.models.encoder import load_encoder
from omniid.models.fp8 import freeze_in_fp8
from omniid.models.frozen_precision import quantize_frozen
from omniid.models.identity_adapter import IdentityAdapter
from omniid.weights import weights_folder

NUM_INPUTS, NUM_PHOTOS = 3, 2
FP8 = torch.float8_e4m3fn

parser = command_line()
parser.add_argument("--weights", default="mini", help="a preset with weights, or a folder of trained weights")
parser.add_argument("--people", type=int, default=6, help="at least 2")
parser.add_argument("--bf16", action="store_true", help="also where the reference is fp32")
parser.add_argument("--seeds", type=int, default=2, help="pictures of each person")
arguments = parser.parse_args()

folder = weights_folder(arguments.weights)
preset = load_preset(folder / "preset.toml")
wide = training_dtype()
reference_name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[wide]


def loaded(dtype: torch.dtype = wide) -> Generator:
    return load_generator(folder, dtype=dtype)


def in_fp8() -> Generator:
    generator = loaded()
    freeze_in_fp8(generator.pipeline.transformer)
    return generator


def in_nf4() -> Generator:
    generator = loaded()
    for part in (generator.pipeline.transformer, generator.pipeline.text_encoder_2):
        quantize_frozen(part, "nf4", wide, DEVICE)
    return generator


def with_fp8_adapter() -> Generator:
    generator = loaded()
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "adapter.safetensors"
        generator.adapter.save(path, FP8)
        rounded = IdentityAdapter.load(path, DEVICE)
    return Generator(generator.pipeline, rounded, generator.defaults)


cases = {reference_name: loaded}
if wide == torch.float32 and arguments.bf16:
    cases["bf16"] = lambda: loaded(torch.bfloat16)
cases |= {"fp8": in_fp8, "fp8 adapter": with_fp8_adapter}
if importlib.util.find_spec("bitsandbytes") is not None:
    cases["nf4"] = in_nf4


def weight_mb(module: torch.nn.Module) -> float:
    """Megabytes of parameters and buffers; four-bit weights have their scales beside them."""
    tensors = [*module.parameters(), *module.buffers()]
    states = [p.quant_state for p in module.parameters() if getattr(p, "quant_state", None) is not None]
    for state in states:
        tensors += [state.absmax, *([state.state2.absmax] if state.nested else [])]
    return sum(x.numel() * x.element_size() for x in tensors) / 1e6


def adapter_mb(adapter: IdentityAdapter, is_rounded: bool) -> float:
    """What the adapter's file takes, in bf16 or fp8: in memory it is widened while identities are projected."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "adapter.safetensors"
        adapter.save(path, FP8 if is_rounded else torch.bfloat16)
        return path.stat().st_size / 1e6


def peak_signal_to_noise(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over pictures (N, H, W, 3) of 10 log10(255^2 / MSE), in dB; equal pictures count as 100."""
    errors = ((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean((1, 2, 3))
    return float(np.where(errors == 0, 100.0, 10 * np.log10(255**2 / np.maximum(errors, 1e-12))).mean())


def perceptual_distance(a: np.ndarray, b: np.ndarray) -> float | str:
    if importlib.util.find_spec("lpips") is None:
        return "not installed"
    import lpips

    network = lpips.LPIPS(net="alex", verbose=False)
    x, y = (torch.from_numpy(one).permute(0, 3, 1, 2).float() / 127.5 - 1 for one in (a, b))
    with torch.inference_mode():
        return float(network(x, y).mean())


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    return (a * b).sum(-1)


people = unseen_people(arguments.people, NUM_INPUTS, NUM_PHOTOS, preset.tower.image_size)
encoder, recogniser = load_encoder(folder), analyzer("offline")
identities = identities_of(encoder, encode_people(encoder, people, NUM_INPUTS), NUM_INPUTS)
photos = ((people.targets + 1) * 127.5).round().to(torch.uint8).permute(0, 1, 3, 4, 2).flatten(0, 1).numpy()
known = recogniser.descriptors(list(photos)).reshape(1, arguments.people, NUM_PHOTOS, -1)
is_own = np.eye(arguments.people, dtype=bool)

clock = time.process_time if DEVICE == "cpu" else time.perf_counter
rows, expected, expected_faces = [], None, None
for name, load in cases.items():
    generator = load()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    generator.generate(identities[0], preset.base.prompt, num_inference_steps=1)
    drawn, times = [], []
    for identity in identities:
        start = clock()
        pictures = generator.generate(identity, preset.base.prompt, seed=0, num_images=arguments.seeds)
        times.append((clock() - start) / arguments.seeds)
        drawn += [np.asarray(picture) for picture in pictures]
    pixels = np.stack(drawn)
    faces = recogniser.descriptors(drawn).reshape(arguments.people, arguments.seeds, 1, -1)
    if expected is None:
        expected, expected_faces = pixels, faces
    is_reference = name == reference_name
    to_photos = cosine(faces[:, :, None], known[:, None]).mean((1, 3))  # (people drawn, people of the photos)
    row = {
        "precision": name,
        "identity cosine to reference": float(cosine(faces, expected_faces).mean()),
        "to own photos": float(to_photos[is_own].mean()),
        "to others' photos": float(to_photos[~is_own].mean()),
        "PSNR dB": "" if is_reference else peak_signal_to_noise(pixels, expected),
        "LPIPS": "" if is_reference else perceptual_distance(pixels, expected),
        "transformer MB": weight_mb(generator.pipeline.transformer),
        "T5 MB": weight_mb(generator.pipeline.text_encoder_2),
        "adapter MB": adapter_mb(generator.adapter, name == "fp8 adapter"),
        "ms a picture": float(np.median(times)) * 1e3,
    }
    if DEVICE == "cuda":
        row["peak MB"] = torch.cuda.max_memory_allocated() / 1e6
    rows.append(row)
report(
    "generate_precision",
    rows,
    f"{arguments.people} unseen synthetic people, {arguments.seeds} pictures of each in one batch, "
    f"{preset.base.num_inference_steps} steps at {preset.base.image_size} px, identity guidance {preset.base.id_guidance:g}. "
    "On a CPU without fp8 or four-bit products narrow weights are widened as they multiply: memory, not time, is what they "
    "save there.",
    parser,
)
