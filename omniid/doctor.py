"""What is installed, what each missing piece would add, and whether this machine can run the paper preset.

Nothing heavy is imported: versions come from package metadata, CPU features from the system.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

GIB = 2**30

# extra -> what it adds; the packages themselves are read from the distribution's metadata
EXTRAS = {
    "cuda": "fast attention, 8-bit optimizer and NF4 base models on NVIDIA GPUs",
    "triton": "Triton kernels, also in the interpreter on a CPU",
    "export": "ONNX models and TensorRT engines",
    "faces": "a production face backend: better detection, measured pose and quality",
    "video": "curation of videos",
    "track": "training scalars in Weights & Biases or Trackio",
    "watermark": "an invisible mark in generated pictures",
    "metrics": "LPIPS and FID in omniid evaluate; they need a torchvision that fits torch",
    "app": "a page in the browser",
    "dev": "tests and lint",
}

# Parameters in 10^9. Tower and blocks of the encoder from paper.toml; FLUX.1-dev and its text encoders as published;
# the adapter has K and V for 19 + 38 blocks, 1280 to 3072.
PAPER_BILLIONS = {
    "encoder": 0.71,
    "identity adapter": 0.45,
    "FLUX.1-dev transformer": 11.90,
    "T5-XXL text encoder": 4.76,
    "CLIP-L text encoder": 0.12,
    "autoencoder": 0.08,
}
# 4 bits a weight and an 8-bit scale for every 64 of them with a second level of scales.
_BYTES_BF16, _BYTES_NF4 = 2.0, 0.516
_NF4_PARTS = ("FLUX.1-dev transformer", "T5-XXL text encoder")
_ACTIVATION_GB = 3.0  # one 1024 px image, autoencoder included


@dataclass(slots=True)
class Package:
    name: str
    wanted: str
    installed: str | None
    """Version, or None."""


def examine() -> dict:
    """The whole report as plain values."""
    required, optional = packages()
    machine = describe_machine()
    return {
        "omniid": importlib.metadata.version("omniid"),
        "python": platform.python_version(),
        "required": [asdict(package) for package in required],
        "extras": {
            extra: {"adds": EXTRAS.get(extra, ""), "packages": [asdict(package) for package in members]}
            for extra, members in optional.items()
        },
        "native_kernels": native_library(),
        "weights": shipped_weights(),
        "test_data": test_data(),
        "faces": face_backends(),
        "machine": machine,
        "paper_preset": paper_memory(machine),
        "missing": [package.name for package in required if package.installed is None],
    }


def packages() -> tuple[list[Package], dict[str, list[Package]]]:
    """Required packages, and those of each extra, as the installed distribution declares them."""
    from packaging.requirements import Requirement

    required: list[Package] = []
    optional: dict[str, list[Package]] = {extra: [] for extra in EXTRAS}
    for text in importlib.metadata.requires("omniid") or []:
        requirement = Requirement(text)
        package = Package(requirement.name, str(requirement.specifier), _installed(requirement.name))
        extra = next((e for e in EXTRAS if requirement.marker and _only_with(requirement.marker, e)), None)
        if extra is not None:
            optional[extra].append(package)
        elif requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            required.append(package)
    return required, optional


def _only_with(marker, extra: str) -> bool:
    return marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def native_library() -> str | None:
    """Path of the built native kernels, or None."""
    spec = importlib.util.find_spec("omniid.kernels")
    for folder in spec.submodule_search_locations if spec else ():
        for path in sorted(Path(folder).glob("_native*")):
            if path.suffix in (".so", ".pyd", ".dylib"):
                return str(path)
    return None


def shipped_weights() -> list[str]:
    """Names of presets whose weights are in the package."""
    folder = Path(__file__).parent / "weights"
    return sorted(path.parent.name for path in folder.glob("*/preset.toml"))


def test_data() -> str | None:
    """The folder with real photos that the tests use, if it is there; relative to the working directory by default."""
    folder = Path(os.environ.get("OMNIID_TEST_DATA", "../shared/data"))
    return str(folder) if (folder / "london").is_dir() else None


def face_backends() -> dict[str, list[str]]:
    """What each face backend lacks here: packages and files; nothing where it is ready."""
    from omniid.faces.files import missing_files, models_folder

    def without(**modules: str) -> list[str]:
        return [package for module, package in modules.items() if importlib.util.find_spec(module) is None]

    folder = models_folder()
    files = [f"{folder / name}" for name in missing_files(folder)]
    return {
        "offline": without(dlib="dlib-bin", face_recognition_models="face_recognition_models"),
        "files": [*without(onnxruntime="onnxruntime", ai_edge_litert="ai-edge-litert"), *files],
        "uniface": without(uniface="uniface", onnxruntime="onnxruntime"),
    }


def describe_machine() -> dict:
    """CPU, its vector features, memory and GPUs."""
    flags = _cpu_flags()
    wanted = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_features": [flag for flag in wanted if flag in flags],
        "memory_gb": _memory_gb(),
        "gpus": _gpus(),
    }


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux: unknown, which the report shows as none
        return set()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.partition(":")[2].split()}


def _memory_gb() -> float | None:
    """Memory this process may use: the machine's, or a container's limit."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    with contextlib.suppress(OSError, ValueError):  # no container, or no limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return round(total / GIB, 1)


def _gpus() -> list[dict]:
    # torch takes seconds to import, and a machine without the driver's device (dxg: under Windows) has no GPU to use.
    if sys.platform != "win32" and not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg")):
        return []
    try:
        import torch
    except ImportError:
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append(
            {
                "name": properties.name,
                "memory_gb": round(properties.total_memory / GIB, 1),
                "compute_capability": capability,
            }
        )
    return found


def paper_memory(machine: dict) -> dict:
    """Memory that generating with the paper preset takes in four ways, and which of them this machine has room for."""
    bf16 = {part: billions * 1e9 * _BYTES_BF16 / GIB for part, billions in PAPER_BILLIONS.items()}
    nf4 = {part: size * _BYTES_NF4 / _BYTES_BF16 if part in _NF4_PARTS else size for part, size in bf16.items()}
    # With offloading one part is on the GPU at a time; the adapter stays with the transformer.
    needs = {
        "bf16": sum(bf16.values()) + _ACTIVATION_GB,
        "bf16, parts offloaded": bf16["FLUX.1-dev transformer"] + bf16["identity adapter"] + _ACTIVATION_GB,
        "nf4": sum(nf4.values()) + _ACTIVATION_GB,
        "nf4, parts offloaded": nf4["FLUX.1-dev transformer"] + nf4["identity adapter"] + _ACTIVATION_GB,
    }
    gpu = max((one["memory_gb"] for one in machine["gpus"]), default=0.0)
    memory = machine["memory_gb"] or 0.0
    ways = [way for way, size in needs.items() if size <= gpu]
    if ways:
        verdict = f"yes, on the GPU: {', '.join(ways)}"
    elif gpu:
        verdict = f"no: the GPU has {gpu:.0f} GB, the least way needs {min(needs.values()):.0f}"
    elif memory >= needs["bf16"]:
        verdict = "only on the CPU, in many minutes an image; use a GPU"
    else:
        least = min(needs.values())
        verdict = f"no: no GPU (at least {least:.0f} GB), and {needs['bf16']:.0f} GB of memory for the CPU"
    return {
        "billions_of_parameters": PAPER_BILLIONS,
        "needs_gb": {way: round(size, 1) for way, size in needs.items()},
        "verdict": verdict,
        "base_weights_present": _has_flux(),
    }


def _has_flux() -> bool:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    return any(cache.glob("models--black-forest-labs--FLUX.1-dev/snapshots/*/model_index.json"))
