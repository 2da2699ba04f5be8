"""Judging exported files: on the CPU in full, on a GPU as far as one is there; and what it refuses."""

import json

import pytest
import torch
from click.testing import CliRunner

from omniid.cli.main import main
from omniid.export import judge as judge_module
from omniid.export.graphs import adapter_graph
from omniid.export.judge import EAGER, judge, time_in_turn, torch_cases
from omniid.export.manifest import Entry, digest, note
from omniid.export.onnx import ExportError
from omniid.export.runner import open_runner
from omniid.models.identity_adapter import IdentityAdapter

pytestmark = pytest.mark.slow


def test_a_file_is_compared_and_timed_beside_pytorch(trained, exported):
    export = exported("adapter")
    arguments = ["export", "judge", str(export.path), "--preset", str(trained), "--rounds", "2", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    values = {one["name"]: one["value"] for one in facts["measures"]}
    assert facts["passed"] and values["smallest cosine of a block's keys"] >= 0.9999
    times = [values[f"{name}, ms"] for name in ("this file", EAGER, "PyTorch compiled")]
    assert all(value > 0 for value in times) and "PyTorch CUDA graph, ms" not in values
    assert values[f"{EAGER} / this file"] == pytest.approx(times[1] / times[0])
    assert facts["notes"]["device"].startswith("cpu") and facts["notes"]["timed with"].startswith("tokens 1x")


@pytest.mark.parametrize(
    ("what", "precision", "timed"),
    [
        ("encoder", "int8", "images 3x3x32x32, lengths 1"),
        ("transformer", "bf16", "latents 1x4x"),
    ],
    ids=["encoder", "transformer"],
)
def test_every_part_is_timed_with_one_person(trained, exported, monkeypatch, what, precision, timed):
    monkeypatch.setattr(torch, "compile", lambda module: module)  # minutes for what the adapter shows
    report = judge(exported(what, precision).path, str(trained), rounds=1)
    assert report.passed and report.notes["timed with"].startswith(timed), str(report)


def test_an_engine_is_judged_by_what_it_was_exported_from(trained, exported, tmp_path, monkeypatch):
    """All but the call that only its GPU can answer: what has the engine open."""
    export = exported("adapter", "bf16")
    path = an_engine(tmp_path, "adapter", "bf16", export.metadata)
    monkeypatch.setattr(judge_module, "open_runner", lambda engine, runtime: open_runner(export.path))
    monkeypatch.setattr(torch, "compile", lambda module: module)
    report = judge(path, str(trained), rounds=1)
    assert report.passed and report.notes["runtime"] == "tensorrt-rtx 1.0" and report.file == path.name


def test_other_weights_than_the_files_are_refused(trained, tiny_weights, exported):
    with pytest.raises(ExportError, match=r"exported from other weights than .* \(weights differs\)"):
        judge(exported("adapter").path, str(tiny_weights))


def an_engine(folder, what, precision, metadata):
    path = folder / "one.engine"
    path.write_bytes(b"an engine")
    note(folder, Entry(path.name, digest(path), 9, what, precision, "tensorrt-rtx 1.0", 1.0, metadata, ("sm89",)))
    return path


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
def test_without_a_gpu_what_needs_one_is_refused_in_one_sentence(exported, tmp_path, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    for arguments in (
        [an_engine(tmp_path, "adapter", "bf16", {})],
        [exported("adapter").path, "--runtime", "onnx-cuda"],
    ):
        result = CliRunner().invoke(main, ["export", "judge", *map(str, arguments)])
        assert result.exit_code == 1 and "NVIDIA GPU and this machine has none" in result.output
        assert len(result.output.strip().splitlines()) == 1


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_onnxruntime_that_goes_on_with_the_cpu_is_refused(exported, monkeypatch):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ExportError, match="could not start on cuda; install the CUDA and cuDNN"):
        open_runner(exported("adapter").path, "onnx-cuda")


def test_cases_run_in_turn_after_the_untimed_ones():
    order = []
    cases = {name: lambda name=name: order.append(name) for name in "ab"}
    times = time_in_turn(cases, 2, torch.device("cpu"))
    assert times.keys() == {"a", "b"} and "".join(order) == "ab" * (judge_module.WARMUP + 2)


@pytest.mark.gpu
def test_a_recorded_module_computes_what_it_was_recorded_from(trained):
    adapter = IdentityAdapter.load(trained / "adapter.safetensors").eval().cuda()
    graph = adapter_graph(adapter, 6)
    tokens = torch.randn_like(graph.inputs["tokens"], device="cuda")
    with torch.no_grad():
        cases = torch_cases(graph.module, {"tokens": tokens})
        times = time_in_turn(cases, 3, tokens.device)
    assert times.keys() == {EAGER, "PyTorch compiled", "PyTorch CUDA graph"}
