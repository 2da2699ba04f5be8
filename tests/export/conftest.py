"""Weights to export: small, but as after training, so that no part is zero."""

import shutil

import pytest
import torch

from omniid.models.flux import load_base
from omniid.models.identity_adapter import IdentityAdapter
from omniid.train.base import save_base

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="export needs pip install 'omniid[export]'")


@pytest.fixture(scope="session")
def trained(tiny_weights, tmp_path_factory):
    """A weights folder whose transformer and adapter pass signals on."""
    folder = tmp_path_factory.mktemp("trained") / "weights"
    shutil.copytree(tiny_weights, folder)
    generator = torch.Generator().manual_seed(0)
    pipeline = load_base(folder / "base")
    with torch.no_grad():
        for name, parameter in pipeline.transformer.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + ("norm_" in name))
    save_base(pipeline, folder / "base")
    adapter = IdentityAdapter.load(folder / "adapter.safetensors")
    with torch.no_grad():
        for to_v in adapter.to_v_id:
            to_v.weight.copy_(torch.randn(to_v.weight.shape, generator=generator) * 0.2)
    adapter.save(folder / "adapter.safetensors")
    return folder


@pytest.fixture(scope="session")
def exported(trained, tmp_path_factory):
    """`exported(what, precision, ...)`: the part's export, made once for all tests."""
    from omniid.export.job import export_part
    from omniid.export.request import Request

    folder, made = tmp_path_factory.mktemp("exported"), {}

    def export(what, precision="fp32", form="packed"):
        key = (what, precision, form)
        if key not in made:
            made[key] = export_part(Request(what, str(trained), precision, form, steps=2), folder)
        return made[key]

    return export
