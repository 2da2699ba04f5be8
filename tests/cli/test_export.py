"""omniid export, and files that encode --engine refuses."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

from omniid.cli.main import main
from omniid.export import parity
from omniid.models.identity_adapter import IdentityAdapter

pytest.importorskip("onnxscript", reason="export needs pip install 'omniid[export]'")
pytestmark = pytest.mark.slow


def run(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_files_that_cannot_run_are_one_sentence(tmp_path):
    (tmp_path / "photo.jpg").touch()
    photo_is_there = str(tmp_path / "photo.jpg")
    for arguments, message in (
        (["--engine", tmp_path / "none.onnx"], "does not exist"),
        (["--engine", tmp_path / "none.engine"], "does not exist"),
        (["--engine", photo_is_there, "--runtime", "onnx"], "no export of omniid"),
        (["--runtime", "onnx"], "name one"),
    ):
        result = run("encode", photo_is_there, "-o", tmp_path / "id.pt", *arguments)
        assert result.exit_code in (1, 2) and message in result.output, result.output
    assert not (tmp_path / "id.pt").exists()


def test_an_export_is_reported_and_one_that_differs_exits_with_1(tiny_weights, tmp_path, monkeypatch):
    options = ["export", "onnx", "--what", "adapter", "--preset", tiny_weights, "-o", tmp_path]
    result = run(*options, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["passed"] and facts["notes"]["bytes"] == (tmp_path / facts["file"]).stat().st_size
    monkeypatch.setitem(parity.LEAST_COSINE, "fp32", 1.1)
    result = run(*options)
    assert result.exit_code == 1
    assert "FAILED" in result.output and "differs from PyTorch" in result.output


def test_an_fp8_adapter_is_half_as_large_and_loads_like_any(tiny, tiny_weights, tmp_path):
    weights = tmp_path / "weights"
    shutil.copytree(tiny_weights, weights)
    # Wide enough that names and sizes in the file's head weigh little.
    adapter = IdentityAdapter(tiny.encoder.width, 3, 8, 64)
    torch.manual_seed(0)
    for to_v in adapter.to_v_id:
        torch.nn.init.normal_(to_v.weight)
    adapter.save(weights / "adapter.safetensors")
    path = tmp_path / "adapter_fp8.safetensors"
    result = run("export", "fp8", "--preset", weights, "-o", path, "--json")
    facts = json.loads(result.stdout.splitlines()[0])
    cosines = [one for one in facts["measures"] if "cosine" in one["name"]]
    assert len(cosines) == 2 and all(one["holds"] for one in cosines)
    with safe_open(path, "pt") as file:
        assert file.get_tensor("to_v_id.1.weight").dtype == torch.float8_e4m3fn
        assert file.get_tensor("to_v_id.1.weight_scale").shape == (512,)
    again, original = IdentityAdapter.load(path), IdentityAdapter.load(weights / "adapter.safetensors")
    difference = (again.to_v_id[1].weight - original.to_v_id[1].weight).abs()
    assert 0 < difference.max() <= original.to_v_id[1].weight.abs().amax() / 16
    assert run("export", "fp8", "--preset", weights, "-o", tmp_path / "a.pt").exit_code == 1


def test_what_cannot_be_built_is_said_before_anything_is_exported(tiny_weights, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    for target, message in (("sm70", "builds no engine for sm70"), ("sm86", "sm86 has no fp8")):
        options = ["--what", "adapter", "--precision", "fp8", "--runtime", "rtx", "--target", target]
        result = run("export", "trt", *options, "--preset", tiny_weights, "-o", tmp_path)
        assert result.exit_code == 1 and message in result.output
    assert not list(tmp_path.iterdir())


def test_an_engine_comes_with_a_list_of_its_layers(tiny_weights, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    options = ["--what", "adapter", "--precision", "fp8", "--runtime", "rtx", "--target", "sm89", "--json"]
    result = run("export", "trt", *options, "--preset", tiny_weights, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    table = json.loads((tmp_path / f"{facts['engine']}.layers.json").read_text())
    assert table["engine"] == facts["engine"] and (tmp_path / facts["engine"]).is_file()
    assert table["counts"] == facts["matrices_in_engine"] and table["not_fp8"] == facts["layers_not_in_fp8"] == []
    # Values are zero before training, and equal products are one.
    names = {"adapter.to_k_id.0", "adapter.to_k_id.1", "adapter.to_k_id.2", "adapter.to_v_id.0"}
    assert {one["layer"] for one in table["layers"]} == names
    assert {one["graph"] for one in table["layers"]} == {"float8e4m3fn"}


def test_sides_that_cannot_be_are_refused(tiny_weights, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    for what, sides, code, message in (
        ("transformer", "512,large", 2, "like 512,1024,1536"),
        ("transformer", "1024,512", 1, "smallest first"),
        ("encoder", "512", 1, "leave them out for encoder"),
    ):
        options = ["--what", what, "--sides", sides, "--runtime", "rtx", "--preset", tiny_weights, "-o", tmp_path]
        result = run("export", "trt", *options)
        assert result.exit_code == code and message in result.output, result.output
    assert not list(tmp_path.iterdir())


def test_help_names_the_commands():
    result = run("export", "--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in ("onnx", "trt", "fp8", "judge"))
