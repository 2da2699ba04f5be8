"""ONNX exports: what they compute, for any number of photos, identities and strengths, and what they refuse."""

import numpy as np
import pytest
import torch

from omniid.export.exported_encoder import OnnxEncoder
from omniid.export.graphs import adapter_graph
from omniid.export.job import Request, export_part
from omniid.export.onnx import ExportError, export_onnx, read_metadata
from omniid.export.onnx_runtime import feed, open_session
from omniid.export.samples import Drawing
from omniid.models.encoder import load_encoder
from omniid.models.flux import load_base
from omniid.models.identity_adapter import IdentityAdapter, IdentityKV, IdentityUse, attach_identities

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
    codes = OnnxEncoder(export.path).codes(sets)
    torch.testing.assert_close(codes, by_torch(encoder, sets), rtol=1e-4, atol=1e-4)


def test_the_order_of_photos_and_neighbours_change_nothing(exported):
    encoder = OnnxEncoder(exported("encoder").path)
    first, second = photos(3, 2)
    alone = encoder.codes([first])
    torch.testing.assert_close(encoder.codes([first.flip(0)]), alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder.codes([second, first])[1:], alone, rtol=1e-5, atol=1e-5)


def test_an_identity_from_an_export_is_of_the_same_encoder(trained, exported):
    crops = [one.permute(1, 2, 0).numpy() for one in photos(3)[0]]
    ours, theirs = load_encoder(trained).encode_crops(crops), OnnxEncoder(exported("encoder").path).encode_crops(crops)
    assert (theirs.encoder, theirs.preset, theirs.num_images) == (ours.encoder, ours.preset, 3)
    torch.testing.assert_close(theirs.tokens, ours.tokens, rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("scale", ["none", "strong", "left half"])
def test_one_transformer_serves_every_strength_and_region(exported, drawing, scale):
    pipeline, steps = drawing
    export = exported("transformer")
    assert export.report.passed, str(export.report)
    session = open_session(export.path)
    inputs = steps.inputs(steps.noise, 0.7)
    shape = inputs["id_scale"].shape
    strength = {"none": torch.zeros(shape), "strong": torch.full(shape, 2.0), "left half": torch.zeros(shape)}[scale]
    if scale == "left half":
        strength[:, : shape[1] // 2] = 1.0
    inputs["id_scale"] = strength
    got = torch.from_numpy(session.run(None, feed(session, inputs))[0])
    use = IdentityUse(IdentityKV(inputs["id_k"], inputs["id_v"]), strength)
    arguments = {
        "hidden_states": inputs["latents"], "encoder_hidden_states": inputs["text"], "pooled_projections": inputs["pooled"],
        "timestep": inputs["timestep"], "guidance": inputs.get("guidance"), "img_ids": inputs["img_ids"],
        "txt_ids": torch.zeros(inputs["text"].shape[1], 3), "return_dict": False,
    }  # fmt: skip
    with torch.no_grad():
        plain = pipeline.transformer(**arguments)[0]
        with attach_identities(pipeline.transformer, [use]):
            wanted = pipeline.transformer(**arguments)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    if scale != "none":
        assert (plain - wanted).abs().max() > 0.01  # or the identity's inputs would prove nothing
    else:
        torch.testing.assert_close(got, plain, rtol=1e-3, atol=1e-4)


def test_a_transformer_takes_pictures_of_other_sizes(exported, drawing):
    _, steps = drawing
    session = open_session(exported("transformer").path)
    inputs = steps.inputs(steps.noise, 0.5)
    channels = steps.noise.shape[2]
    inputs = {
        name: value[:, :1] if name in ("id_k", "id_v") else value if name == "img_ids" else value[:1]
        for name, value in inputs.items()
    }
    inputs |= {"latents": torch.randn(1, 12, channels), "id_scale": torch.ones(1, 12), "img_ids": torch.zeros(12, 3)}
    assert session.run(None, feed(session, inputs))[0].shape == (1, 12, channels)


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


def test_an_operation_without_translation_is_one_sentence(trained, tmp_path, monkeypatch):
    from torch.onnx import errors

    def fail(*args, **kwargs):
        raise errors.OnnxExporterError("no translation for aten.strange") from ValueError("aten.strange is unsupported")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ExportError, match=r"aten\.strange is unsupported.*use opset 20"):
        export_onnx(adapter_graph(IdentityAdapter.load(trained / "adapter.safetensors"), 6), tmp_path / "a.onnx", {})
    assert not list(tmp_path.iterdir())


def test_files_from_elsewhere_are_refused(exported, tmp_path):
    with pytest.raises(ExportError, match="no exported encoder"):
        OnnxEncoder(exported("adapter").path)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(np.random.default_rng(0).bytes(1000))
    with pytest.raises(ExportError, match="damaged"):
        OnnxEncoder(broken)
    with pytest.raises(ExportError, match="does not exist"):
        OnnxEncoder(tmp_path / "missing.onnx")
    with pytest.raises(ExportError, match="onnxruntime-gpu"):
        OnnxEncoder(exported("encoder").path, provider="cuda")
