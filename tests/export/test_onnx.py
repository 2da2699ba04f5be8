"""ONNX exports: what they compute, for any number of photos, identities and strengths, and what they refuse."""

import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from omniid.cli.main import main
from omniid.export import int8
from omniid.export.exported_encoder import ExportedEncoder
from omniid.export.graphs import adapter_graph, transformer_graph
from omniid.export.job import export_part
from omniid.export.manifest import MANIFEST
from omniid.export.onnx import ExportError, export_onnx, read_metadata
from omniid.export.onnx_runtime import OnnxRunner
from omniid.export.parts import merge_loras, velocity_of
from omniid.export.request import Request
from omniid.export.runner import open_runner
from omniid.export.samples import Drawing, random_inputs
from omniid.generate.loading import load_loras
from omniid.identity import Identity
from omniid.models.encoder import load_encoder
from omniid.models.flux import load_base
from omniid.models.identity_adapter import IdentityAdapter

pytestmark = pytest.mark.slow


def photos(*counts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator) for count in counts]


@torch.no_grad()
def by_torch(encoder, sets):
    bounds = torch.tensor([0, *map(len, sets)]).cumsum(0).int()
    return encoder(torch.cat(sets).float() / 127.5 - 1, bounds)


@pytest.mark.parametrize("form", ["packed", "padded"])
@pytest.mark.parametrize("counts", [(1,), (8,), (1, 3, 2), (5, 1)])
def test_an_encoder_takes_any_number_of_photos_and_identities(trained, exported, form, counts):
    encoder, sets = load_encoder(trained), photos(*counts)
    export = exported("encoder", form=form)
    assert export.report.passed, str(export.report)
    codes = ExportedEncoder(export.path).codes(sets)
    torch.testing.assert_close(codes, by_torch(encoder, sets), rtol=1e-4, atol=1e-4)


def test_the_order_of_photos_and_neighbours_change_nothing(exported):
    encoder = ExportedEncoder(exported("encoder").path)
    first, second = photos(3, 2)
    alone = encoder.codes([first])
    torch.testing.assert_close(encoder.codes([first.flip(0)]), alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder.codes([second, first])[1:], alone, rtol=1e-5, atol=1e-5)


def test_an_identity_from_an_export_is_of_the_same_encoder(trained, exported):
    crops = [one.permute(1, 2, 0).numpy() for one in photos(3)[0]]
    ours, theirs = (
        load_encoder(trained).encode_crops(crops),
        ExportedEncoder(exported("encoder").path).encode_crops(crops),
    )
    assert (theirs.encoder, theirs.preset, theirs.num_images) == (ours.encoder, ours.preset, 3)
    torch.testing.assert_close(theirs.tokens, ours.tokens, rtol=1e-4, atol=1e-4)


def test_the_command_encodes_with_an_export(trained, exported, tmp_path, test_data):
    photo = test_data / "casual" / "lisa1.jpg"
    files = [tmp_path / "ours.pt", tmp_path / "theirs.pt"]
    for file, options in zip(files, (["--preset", trained], ["--engine", exported("encoder").path]), strict=True):
        result = CliRunner().invoke(main, list(map(str, ["encode", photo, "-o", file, *options])))
        assert result.exit_code == 0, result.output
    ours, theirs = map(Identity.load, files)
    assert ours.encoder == theirs.encoder
    torch.testing.assert_close(ours.tokens, theirs.tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("what", ["encoder", "adapter"])
def test_narrow_exports_pass_the_gate_and_hold_narrow_weights(exported, what, precision):
    import onnx

    export = exported(what, precision)
    # Rounding 32 random channels to fp8 turns the codes of people beside each other by more than the gate allows a trained
    # encoder; each code by itself holds.
    measures = [one for one in export.report.measures if "cosine of two people" not in one.name or precision != "fp8"]
    assert measures and all(one.holds for one in measures), str(export.report)
    model = onnx.load(export.path)
    types = {onnx.TensorProto.DataType.Name(one.data_type) for one in model.graph.initializer if len(one.dims) == 2}
    narrow = {"bf16": "BFLOAT16", "fp8": "FLOAT8E4M3FN"}[precision]
    assert narrow in types and "FLOAT" not in types
    if what == "adapter":
        assert types == {narrow}
    assert read_metadata(export.path)["precision"] == precision


def test_fp8_is_not_bf16_under_another_name(exported):
    """Rounding shows: fp8 is further from PyTorch than bf16 is."""
    errors = [
        next(m.value for m in exported("adapter", precision).report.measures if m.name == "largest error of values")
        for precision in ("bf16", "fp8")
    ]
    assert errors[1] > 2 * errors[0] >= 0


@pytest.fixture(scope="module")
def drawing(trained, tiny):
    pipeline, adapter = load_base(trained / "base"), IdentityAdapter.load(trained / "adapter.safetensors")
    tokens = torch.randn(2, tiny.encoder.num_queries, tiny.encoder.width, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        kv = adapter.project(tokens)
    base = tiny.base
    return pipeline, Drawing(pipeline, kv.keys, kv.values, "photo of a person", base.image_size, 24, 3.5)


@pytest.fixture(scope="module")
def runner(exported):
    assert exported("transformer").report.passed, str(exported("transformer").report)
    return open_runner(exported("transformer").path)


@pytest.mark.parametrize("scale", ["none", "strong", "two people in halves"])
def test_one_transformer_serves_every_strength_region_and_number_of_people(runner, drawing, scale):
    pipeline, steps = drawing
    inputs = steps.inputs(steps.noise, 0.7)
    if scale == "two people in halves":
        inputs |= {name: torch.cat([inputs[name], inputs[name].flip(2)], dim=1) for name in ("id_k", "id_v")}
        left = (torch.arange(inputs["latents"].shape[1]) < 2).float().expand(inputs["latents"].shape[:2])
        inputs["id_scale"] = torch.stack([left, 0.5 * (1 - left)])
    else:
        inputs["id_scale"] = torch.full_like(inputs["id_scale"], {"none": 0.0, "strong": 2.0}[scale])
    got = runner.run(inputs)["velocity"]
    wanted = velocity_of(pipeline.transformer)(inputs)
    plain = velocity_of(pipeline.transformer)(inputs | {"id_scale": torch.zeros_like(inputs["id_scale"])})
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    if scale != "none":
        assert (plain - wanted).abs().max() > 0.01  # or the identity's inputs would prove nothing


def test_a_transformer_takes_pictures_of_other_sizes(runner, drawing):
    _, steps = drawing
    inputs = steps.inputs(steps.noise, 0.5)
    channels = steps.noise.shape[2]
    one = {name: value[:, :, :1] if name in ("id_k", "id_v") else value[:1] for name, value in inputs.items()}
    one |= {"latents": torch.randn(1, 12, channels), "id_scale": torch.ones(1, 1, 12), "img_ids": torch.zeros(12, 3)}
    assert runner.run(one)["velocity"].shape == (1, 12, channels)
    with pytest.raises(ExportError, match="could not run"):
        runner.run(one | {"id_scale": torch.ones(1, 1, 11)})


def test_a_streamed_transformer_is_the_same(trained, exported, runner, drawing, tmp_path):
    export = export_part(Request("transformer", str(trained), "bf16", streamed=True), tmp_path)
    assert export.report.passed, str(export.report)
    inputs = drawing[1].inputs(drawing[1].noise, 0.7)
    got, wanted = (one.run(inputs)["velocity"] for one in (open_runner(export.path), runner))
    assert torch.cosine_similarity(got.flatten(), wanted.flatten(), dim=0) > 0.999
    assert read_metadata(export.path)["weights"] == read_metadata(exported("transformer").path)["weights"]
    assert {path.name for path in tmp_path.iterdir()} == {export.path.name, MANIFEST}


def test_streamed_weights_that_do_not_belong_are_refused(trained, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = tmp_path / "weights"
    shutil.copytree(trained, weights)
    (file,) = (weights / "base" / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["proj_out.weight"] = tensors["proj_out.weight"][:, :-1].contiguous()
    save_file(tensors, file)
    with pytest.raises(ExportError, match=r"do not fit.*proj_out\.weight"):
        export_part(Request("transformer", str(weights), streamed=True), tmp_path / "out")
    for bad in (Request("encoder", streamed=True), Request("transformer", precision="fp8", streamed=True)):
        with pytest.raises(ExportError, match="streamed"):
            export_part(bad, tmp_path / "out")


def test_a_lora_is_merged_into_the_weights_before_the_export(drawing_weights, lora_file):
    plain, merged, attached = (load_base(drawing_weights / "base") for _ in range(3))
    merge_loras(merged, ((lora_file, 0.5),))
    load_loras(attached, ((lora_file, 0.5),))
    assert merged.transformer.state_dict().keys() == plain.transformer.state_dict().keys()
    inputs = random_inputs(transformer_graph(plain.transformer, 6, 32, 24))
    none, got, wanted = (velocity_of(one.transformer)(inputs) for one in (plain, merged, attached))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert (none - got).abs().max() > 1e-3


def test_a_transformer_in_fp8_keeps_its_sensitive_layers(exported):
    export = exported("transformer", "fp8")
    left = export.report.notes["products left in bf16"]
    assert "x_embedder" in left and "norm1.linear" in left and "proj_out" in left
    assert "attn" not in left and "proj_mlp" not in left
    assert export.report.notes["products in fp8"] == 12 + 2 * 5


def test_without_photos_or_with_too_old_an_opset_nothing_is_written(trained, tmp_path):
    with pytest.raises(ExportError, match="opset 12"):
        export_onnx(
            adapter_graph(IdentityAdapter.load(trained / "adapter.safetensors"), 6), tmp_path / "a.onnx", {}, opset=12
        )
    with pytest.raises(ExportError, match="opset 19"):
        export_part(Request("adapter", str(trained), "fp8", opset=18), tmp_path)
    for bad in (Request("decoder"), Request("encoder", precision="int4"), Request("encoder", form="ragged")):
        with pytest.raises(ExportError, match="choose"):
            export_part(bad, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_torch_cannot_export_is_one_sentence(trained, tmp_path, monkeypatch):
    from torch.onnx import errors

    def fail(*args, **kwargs):
        raise errors.OnnxExporterError("no translation for aten.strange") from ValueError("aten.strange is unsupported")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ExportError, match=r"aten\.strange is unsupported.*use opset 20"):
        export_onnx(adapter_graph(IdentityAdapter.load(trained / "adapter.safetensors"), 6), tmp_path / "a.onnx", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["exporting", "rounding", "comparing"])
def test_too_little_memory_is_one_sentence_wherever_it_runs_out(trained, tmp_path, monkeypatch, where):
    import onnxruntime
    from torch.onnx import errors

    def fail(*args, **kwargs):
        if where == "rounding":
            raise MemoryError
        lacking = RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        )
        if where == "exporting":
            raise errors.OnnxExporterError("decomposition failed") from lacking
        raise RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 9")

    place = {
        "exporting": (torch.onnx, "export"),
        "rounding": (int8, "round_weight"),
        "comparing": (onnxruntime, "InferenceSession"),
    }
    monkeypatch.setattr(*place[where], fail)
    with pytest.raises(ExportError, match=r"^there is too little memory to (export the adapter|run this graph)"):
        export_part(Request("adapter", str(trained), "int8"), tmp_path)
    assert where == "comparing" or not list(tmp_path.iterdir())


def test_tensors_in_bf16_reach_onnxruntime_as_they_are(tmp_path):
    """As they must on a GPU, where graphs are not widened."""
    import onnx_ir as ir
    import onnxruntime

    narrow = ir.Value(name="x", type=ir.TensorType(ir.DataType.BFLOAT16), shape=ir.Shape([3]))
    node = ir.node("Cast", [narrow], {"to": int(ir.DataType.FLOAT)})
    node.outputs[0].name = "y"
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([3])
    model = ir.Model(ir.Graph([narrow], node.outputs, nodes=[node], opset_imports={"": 20}), ir_version=10)
    ir.save(model, tmp_path / "cast.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "cast.onnx")
    runner = OnnxRunner(session, torch.device("cpu"), {})
    values = torch.tensor([1.0, -2.5, 3.1])
    assert runner.run({"x": values})["y"].tolist() == values.bfloat16().float().tolist()


def test_files_from_elsewhere_are_refused(exported, tmp_path):
    with pytest.raises(ExportError, match="no exported encoder"):
        ExportedEncoder(exported("adapter").path)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(np.random.default_rng(0).bytes(1000))
    with pytest.raises(ExportError, match="damaged"):
        ExportedEncoder(broken)
    with pytest.raises(ExportError, match="does not exist"):
        ExportedEncoder(tmp_path / "missing.onnx")
    with pytest.raises(ExportError, match="onnxruntime-gpu"):
        ExportedEncoder(exported("encoder").path, "onnx-cuda")
