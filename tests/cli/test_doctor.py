"""omniid doctor: the report, its JSON form, and the arithmetic of the paper preset."""

import json
from importlib.metadata import requires

import pytest
import torch
from click.testing import CliRunner

from omniid import doctor
from omniid.cli.main import main


def test_report_names_required_packages_extras_and_the_paper_preset():
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0, result.output
    for text in ("torch", "dlib-bin", "native kernels", "pip install -e", "FLUX.1-dev", "this machine:"):
        assert text in result.stdout


def test_json_report_covers_every_declared_requirement():
    report = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
    listed = {package["name"] for package in report["required"]}
    listed |= {package["name"] for extra in report["extras"].values() for package in extra["packages"]}
    declared = {text.split(";")[0].split(">")[0].split("=")[0].strip() for text in requires("omniid")}
    assert listed == declared
    assert report["missing"] == []
    assert all(extra["adds"] for extra in report["extras"].values())


def test_a_missing_requirement_fails_with_the_remedy(monkeypatch):
    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: None if name == "dlib-bin" else installed(name))
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "pip install dlib-bin" in result.stderr
    assert "MISSING" in result.stdout


@pytest.mark.parametrize(
    ("gpu_gb", "memory_gb", "verdict"),
    [
        (80.0, 128.0, "yes, on the GPU: bf16, bf16, parts offloaded, nf4"),
        (24.0, 64.0, "yes, on the GPU: nf4, nf4, parts offloaded"),
        (8.0, 64.0, "no: the GPU has 8 GB"),
        (None, 64.0, "only on the CPU"),
        (None, 16.0, "no: no GPU"),
    ],
)
def test_verdict_on_the_paper_preset(gpu_gb, memory_gb, verdict):
    gpus = [] if gpu_gb is None else [{"name": "a GPU", "memory_gb": gpu_gb}]
    assert doctor.paper_memory({"gpus": gpus, "memory_gb": memory_gb})["verdict"].startswith(verdict)


def test_encoder_size_in_the_report_is_that_of_the_paper_preset():
    from omniid.config import load_preset
    from omniid.models.encoder import OmniIDEncoder

    preset = load_preset("paper")
    with torch.device("meta"):
        encoder = OmniIDEncoder(preset.tower, preset.encoder)
    billions = sum(parameter.numel() for parameter in encoder.parameters()) / 1e9
    assert billions == pytest.approx(doctor.PAPER_BILLIONS["encoder"], abs=0.01)
