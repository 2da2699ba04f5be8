"""Engines: real ones, built without a GPU, and the manifest that they are loaded with."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from omniid.export import engine as engine_module
from omniid.export import fp8, products, tensorrt
from omniid.export.engine import EngineRunner
from omniid.export.exported_encoder import ExportedEncoder
from omniid.export.graphs import adapter_graph
from omniid.export.job import export_part
from omniid.export.layers import FP8, write_layers
from omniid.export.manifest import MANIFEST, check
from omniid.export.onnx import ExportError, export_onnx
from omniid.export.request import Request
from omniid.export.tensorrt import BuildOptions, build_engine, inspect_engine, open_engine
from omniid.models.identity_adapter import IdentityAdapter

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


def test_an_adapter_in_fp8_is_half_an_engine_and_holds_every_matrix_in_fp8(tmp_path):
    torch.manual_seed(0)
    # An engine has 1.2 MB beside its weights: at this size they weigh little.
    adapter = IdentityAdapter(1024, 10, 8, 64)
    for to_v in adapter.to_v_id:
        torch.nn.init.normal_(to_v.weight, std=0.05)
    graph, about = adapter_graph(adapter.bfloat16(), 6), {"what": "adapter"}
    export_onnx(graph, tmp_path / "bf16.onnx", {})
    names = {one.activation.name for one in products.products(products.load(tmp_path / "bf16.onnx"))}
    highest = fp8.calibrate(tmp_path / "bf16.onnx", names, [{"tokens": torch.randn(1, 6, 1024).numpy()}])
    assert fp8.quantize(tmp_path / "bf16.onnx", tmp_path / "fp8.onnx", highest) == []
    sizes = {}
    for precision, name in (("bf16", "bfloat16"), ("fp8", FP8)):
        onnx_file, metadata = tmp_path / f"{precision}.onnx", about | {"precision": precision}
        entry = build_engine(onnx_file, tmp_path, graph.profiles, metadata, RTX, progress=False)
        sizes[precision] = entry.bytes
        table = write_layers(tmp_path / entry.file, onnx_file)
        assert table["counts"] == {name: 20} and len(table["not_fp8"]) == (0 if precision == "fp8" else 20)
        assert json.loads((tmp_path / f"{entry.file}.layers.json").read_text()) == json.loads(json.dumps(table))
    assert sizes["fp8"] <= 0.55 * sizes["bf16"]


def test_every_side_has_a_profile_of_its_own(trained, tmp_path):
    export = export_part(Request("transformer", str(trained), "bf16", steps=1, sides=(32, 48, 64)), tmp_path)
    names = ("pictures_to_32_px", "pictures_to_48_px", "pictures_to_64_px")
    tokens = [tuple(shape[1] for shape in profile.shapes["latents"]) for profile in export.graph.profiles]
    assert tokens == [(4, 4, 4), (4, 9, 9), (9, 16, 16)]
    metadata = export.metadata | {"what": "transformer"}
    assert build_engine(export.path, tmp_path, export.graph.profiles, metadata, RTX, progress=False).profiles == names
    decoder = export_part(Request("autoencoder", str(trained), sides=(32, 64)), tmp_path)
    rows = [tuple(shape[2] for shape in profile.shapes["latents"]) for profile in decoder.graph.profiles]
    assert rows == [(4, 4, 6), (4, 8, 12)]
    for bad, message in (((64, 32), "smallest first"), ((40,), "multiples of 16"), ((4096,), "to 2048")):
        with pytest.raises(ExportError, match=message):
            export_part(Request("transformer", str(trained), sides=bad), tmp_path)
    with pytest.raises(ExportError, match="leave them out for encoder"):
        export_part(Request("encoder", str(trained), sides=(64,)), tmp_path)


def test_layers_that_are_not_in_fp8_are_listed(engine):
    folder, entry, onnx_file = engine("transformer", "fp8")
    table = write_layers(folder / entry.file, onnx_file)
    assert {"transformer.x_embedder", "transformer.proj_out"} <= set(table["not_fp8"])
    assert not any("proj_mlp" in name or "to_q" in name for name in table["not_fp8"])
    assert all(one["engine"] in (one["graph"], "not as such") for one in table["layers"])
    assert table["counts"][FP8] >= 0.5 * sum(one["graph"] == FP8 for one in table["layers"])


def test_matrices_of_another_graph_are_not_found_in_an_engine(engine):
    folder, entry, _ = engine("transformer", "fp8")
    _, _, other = engine("encoder", "bf16")
    assert write_layers(folder / entry.file, other)["counts"].keys() == {"not as such"}


def test_the_inspector_tells_the_layers_on_the_engines_gpu(engine, tmp_path, monkeypatch):
    import tensorrt_rtx

    class Inspected:
        def create_engine_inspector(self):
            return self

        def get_engine_information(self, form):
            assert form == tensorrt_rtx.LayerInformationFormat.JSON
            return '{"Layers": ["gemm_e4m3"]}'

    path = copied(engine, tmp_path)
    if not torch.cuda.is_available():
        assert inspect_engine(path) is None
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(tensorrt_rtx.Runtime, "deserialize_cuda_engine", lambda runtime, blob: Inspected())
    assert inspect_engine(path) == {"Layers": ["gemm_e4m3"]}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert inspect_engine(path) is None


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
