"""Engines: real ones, built without a GPU, and the manifest that they are loaded with."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from omniid.export import engine as engine_module
from omniid.export import tensorrt
from omniid.export.engine import EngineRunner
from omniid.export.exported_encoder import ExportedEncoder
from omniid.export.manifest import MANIFEST, check
from omniid.export.onnx import ExportError
from omniid.export.tensorrt import BuildOptions, build_engine, open_engine, weights_in_engine

pytest.importorskip("tensorrt_rtx", reason="engines need pip install 'omniid[export]'")
pytestmark = pytest.mark.slow
RTX = BuildOptions(runtime="rtx", targets=("sm89",))


@pytest.fixture(scope="session")
def engine(exported, tmp_path_factory):
    """`engine(what, precision)`: (folder, entry, the ONNX file)."""
    folder, made = tmp_path_factory.mktemp("engines"), {}

    def build(what, precision):
        if (what, precision) not in made:
            export = exported(what, precision)
            metadata = export.metadata | {"what": what}
            made[what, precision] = build_engine(
                export.path, folder, export.graph.profiles, metadata, RTX, progress=False
            )
        return folder, made[what, precision], exported(what, precision).path

    return build


@pytest.mark.parametrize(
    ("what", "precision"), [("encoder", "bf16"), ("adapter", "bf16"), ("adapter", "fp8"), ("transformer", "fp8")]
)
def test_engines_are_built_without_a_gpu(engine, what, precision):
    folder, entry, _ = engine(what, precision)
    assert check(folder / entry.file) == entry
    assert entry.bytes == (folder / entry.file).stat().st_size > 10_000
    assert entry.what == what and entry.precision == precision and entry.targets == ("sm89",)
    assert entry.file in json.loads((folder / MANIFEST).read_text())["files"]
    if what == "encoder":
        assert entry.profiles == ("1_photo", "2_to_4_photos", "5_to_8_photos", "several_identities")


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
def test_without_a_gpu_an_engine_is_refused_in_one_sentence(engine):
    folder, entry, _ = engine("encoder", "bf16")
    with pytest.raises(ExportError, match=r"this machine has none; use an ONNX file with --runtime onnx"):
        ExportedEncoder(folder / entry.file)


def copied(engine, tmp_path) -> Path:
    """An engine with its manifest in a folder of its own."""
    folder, entry, _ = engine("adapter", "fp8")
    for name in (entry.file, MANIFEST):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    return tmp_path / entry.file


def test_an_engine_that_its_manifest_does_not_describe_is_refused(engine, tmp_path):
    path = copied(engine, tmp_path)
    check(path)
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.write_bytes(blob)
    with pytest.raises(ExportError, match="not the file"):
        open_engine(path)
    path.rename(path.with_name("other.engine"))
    with pytest.raises(ExportError, match="does not list"):
        check(path.with_name("other.engine"))
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ExportError, match="damaged"):
        check(path.with_name("other.engine"))
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(ExportError, match=f"no {MANIFEST}"):
        check(path.with_name("other.engine"))
    with pytest.raises(ExportError, match="does not exist"):
        check(tmp_path / "missing.engine")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("stripped", True, "without its weights"),
        ("runtime", "tensorrt-rtx 0.1", r"built by tensorrt-rtx 0\.1"),
        ("targets", ["sm75"], "built for sm75, this GPU is sm89"),
    ],
)
def test_an_engine_of_another_version_or_gpu_is_refused(engine, tmp_path, monkeypatch, key, value, message):
    path = copied(engine, tmp_path)
    table = json.loads((tmp_path / MANIFEST).read_text())
    table["files"][path.name][key] = value
    (tmp_path / MANIFEST).write_text(json.dumps(table))
    on_a_gpu(monkeypatch)
    with pytest.raises(ExportError, match=message):
        open_engine(path)


def on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))


def test_an_engine_that_the_runtime_does_not_load_is_one_sentence(engine, tmp_path, monkeypatch):
    import tensorrt_rtx

    class Runtime:
        def __init__(self, logger):
            self.logger = logger

        def deserialize_cuda_engine(self, blob):
            self.logger.log(tensorrt_rtx.ILogger.ERROR, "out of memory\nmore")

    path = copied(engine, tmp_path)
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(tensorrt_rtx, "Runtime", Runtime)
    with pytest.raises(ExportError, match=r"^tensorrt-rtx cannot load .*: out of memory$"):
        open_engine(path)


class Engine:
    """What `EngineRunner` asks of an engine with two profiles for `x` (N, 4), as one on a GPU."""

    num_io_tensors, streamable_weights_size = 1, 0

    def __init__(self, trt, context=True):
        self.trt, self.context = trt, context

    def create_execution_context(self):
        return self if self.context else None

    def get_tensor_name(self, index):
        return "x"

    def get_tensor_dtype(self, name):
        return self.trt.DataType.BF16

    def get_tensor_mode(self, name):
        return self.trt.TensorIOMode.INPUT

    def get_tensor_shape(self, name):
        return (-1, 4)

    def get_tensor_profile_shape(self, name, profile):
        return [((1, 4), (1, 4), (1, 4)), ((1, 4), (4, 4), (8, 4))][profile]


def test_the_narrowest_profile_runs_and_what_none_takes_is_one_sentence(engine, monkeypatch):
    import tensorrt_rtx as trt

    _, entry, _ = engine("adapter", "fp8")
    entry = replace(entry, profiles=("narrow", "wide"))
    monkeypatch.setattr(engine_module, "open_engine", lambda path: (trt, Engine(trt), entry))
    runner = EngineRunner("a.engine")
    assert runner.inputs == {"x": torch.bfloat16} and runner.shape("x") == (None, 4)
    assert [runner._profile({"x": torch.zeros(count, 4)}) for count in (1, 2, 8)] == [0, 1, 1]
    with pytest.raises(ExportError, match=r"no profile of this engine takes x \(9, 4\)"):
        runner._profile({"x": torch.zeros(9, 4)})
    monkeypatch.setattr(engine_module, "open_engine", lambda path: (trt, Engine(trt, context=False), entry))
    with pytest.raises(ExportError, match="more GPU memory"):
        EngineRunner("a.engine")


def test_fp8_weights_are_in_the_engine_as_fp8(engine):
    """The builder keeps every matrix in the type that the graph has it in."""
    for precision, name in (("fp8", "float8e4m3fn"), ("bf16", "bfloat16")):
        folder, entry, onnx_file = engine("transformer", "fp8") if precision == "fp8" else engine("encoder", "bf16")
        forms = [form for form in weights_in_engine(folder / entry.file, onnx_file).values() if form != "not as such"]
        assert forms and forms.count(name) >= 0.5 * len(forms)


def test_what_cannot_be_built_is_one_sentence(engine, tmp_path, monkeypatch):
    _, entry, onnx_file = engine("adapter", "fp8")
    metadata = entry.metadata

    def build(**options):
        return build_engine(onnx_file, tmp_path, [], metadata, BuildOptions(**options), progress=False)

    def out_of_memory(builder, network, config):
        return None

    with monkeypatch.context() as broken:
        broken.setattr(tensorrt.runtime_module("rtx")[0].Builder, "build_serialized_network", out_of_memory)
        with pytest.raises(ExportError, match="could not build"):
            build(runtime="rtx", targets=("sm89",))
    with pytest.raises(ExportError, match="builds no engine for sm90"):
        build(runtime="rtx", targets=("sm90",))
    with pytest.raises(ExportError, match="sm86 has no fp8"):
        build(runtime="rtx", targets=("sm86",))
    with pytest.raises(ExportError, match="unknown runtime"):
        build(runtime="openvino")
    text = tmp_path / "text.onnx"
    text.write_text("no graph")
    with pytest.raises(ExportError, match="cannot read"):
        build_engine(text, tmp_path, [], metadata, RTX, progress=False)
    monkeypatch.setattr(tensorrt.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"omniid\[export\]"):
        build()
    assert not list(tmp_path.glob("*.engine"))
