"""Where a run trains."""

import pytest
import torch

from omniid.config import ConfigError
from omniid.train.precision import runs_on_cpu
from omniid.train.run import run_stage


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runs_on_cpu("cpu") and runs_on_cpu("auto")
    with pytest.raises(ConfigError, match="no CUDA device here"):
        run_stage("mtd", "mini", tmp_path / "none", tmp_path / "run", device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert runs_on_cpu("cpu") and not runs_on_cpu("auto") and not runs_on_cpu("cuda")
