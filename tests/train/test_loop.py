"""The loop: learning, exact resume, faults. Runs the real `mtd` stage at tiny sizes."""

import dataclasses
import errno
import io
import json
import multiprocessing
import os
import random
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from omniid.config import preset_to_toml
from omniid.data.records import open_records
from omniid.train import checkpoint as checkpoints
from omniid.train.checkpoint import CheckpointError, complete_checkpoints
from omniid.train.draws import identity_generators
from omniid.train.loop import Trainer, TrainingError
from omniid.train.mtd import MTDStage
from omniid.train.optimizer import build_optimizer
from omniid.train.run import run_stage
from omniid.train.stopping import Stop


def encoded(array, kind):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def trainer(tiny, records, run, resume=False, rows=None, **changes):
    torch.manual_seed(0)
    config = dataclasses.replace(tiny.train.mtd, **changes)
    rows = rows or open_records(records, "train")
    return Trainer(
        MTDStage(tiny),
        tiny,
        config,
        rows,
        open_records(records, "validation"),
        run,
        resume=resume,
        device="cpu",
        progress=False,
    )


def logged(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_run_leaves_log_samples_checkpoints_and_weights(tiny, records, tmp_path):
    one = trainer(tiny, records, tmp_path / "run")
    result = one.run()
    assert result.step == 8 and len(result.losses) == 8 and not result.interrupted
    assert [row["step"] for row in logged(tmp_path / "run")] == list(range(1, 9))
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == [
        "checkpoint-00000006",
        "checkpoint-00000008",
    ]
    assert (tmp_path / "run" / "samples" / "step-00000008.png").is_file()
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    one.export(tmp_path / "weights")
    assert {path.name for path in (tmp_path / "weights").iterdir()} == {
        "preset.toml",
        "encoder.safetensors",
        "decoder.safetensors",
    }


@pytest.mark.slow
def test_loss_falls_on_a_small_set(tiny, records, tmp_path):
    rows = open_records(records, "train").select(range(4))
    result = trainer(
        tiny, records, tmp_path, rows=rows, steps=300, lr=3e-3, warmup_steps=10, save_every=1000, sample_every=1000
    ).run()
    assert sum(result.losses[-20:]) < 0.5 * sum(result.losses[:20])


def test_resume_repeats_the_uninterrupted_run(tiny, records, tmp_path):
    whole = trainer(tiny, records, tmp_path / "whole").run()
    trainer(tiny, records, tmp_path / "parts", steps=8).run()
    # Throw away the last checkpoint: as if the run had died after step 6.
    for path in complete_checkpoints(tmp_path / "parts")[-1:]:
        for child in sorted(path.rglob("*"), reverse=True):
            child.unlink() if child.is_file() else child.rmdir()
        path.rmdir()
    resumed = trainer(tiny, records, tmp_path / "parts", resume=True)
    assert resumed.step == 6
    assert resumed.run().losses == whole.losses[6:]
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")


def test_a_run_is_not_overwritten(tiny, records, tmp_path):
    trainer(tiny, records, tmp_path, steps=3).run()
    with pytest.raises(TrainingError, match="add --resume"):
        trainer(tiny, records, tmp_path)


def test_checkpoint_of_another_stage_is_refused(tiny, records, tmp_path):
    one = trainer(tiny, records, tmp_path, steps=3)
    one.stage.model["decoder"] = torch.nn.Linear(2, 2)
    one.trained = dict(one.stage.model.named_parameters())
    one.ema = {name: p.detach().clone() for name, p in one.trained.items()}
    one.optimizer = build_optimizer(one.stage, one.config)
    one.save()
    with pytest.raises(CheckpointError, match="another stage or preset"):
        trainer(tiny, records, tmp_path, resume=True)


def test_non_finite_loss_stops_before_the_step(tiny, records, tmp_path):
    one = trainer(tiny, records, tmp_path, steps=3)
    with torch.no_grad():
        one.stage.decoder.head.bias[0] = float("nan")
    before = {name: p.detach().clone() for name, p in one.trained.items()}
    with pytest.raises(TrainingError, match="not finite at step 0 with identities train-"):
        one.run()
    assert all(torch.equal(p, before[name]) or p.isnan().any() for name, p in one.trained.items())


def test_too_many_damaged_records_stop_the_run(tiny, records, tmp_path):
    rows = [dict(row) for row in open_records(records, "train")]
    rows[2]["images"] = [b"" for _ in rows[2]["images"]]
    result = trainer(tiny, records, tmp_path / "few", rows=rows).run()
    assert result.bad_records > 0
    with pytest.raises(TrainingError, match="max_bad_records=0"):
        trainer(tiny, records, tmp_path / "none", rows=rows, max_bad_records=0).run()


def test_averaged_weights_lag_and_come_back(tiny, records, tmp_path):
    one = trainer(tiny, records, tmp_path)
    one.run()
    trained = [p.detach().clone() for p in one.trained.values()]
    with one.averaged_weights():
        averaged = [p.detach().clone() for p in one.trained.values()]
    assert any(not torch.equal(a, t) for a, t in zip(averaged, trained, strict=True))
    assert all(torch.equal(p, t) for p, t in zip(one.trained.values(), trained, strict=True))


def test_more_loader_processes_change_nothing(tiny, records, tmp_path):
    alone = trainer(tiny, records, tmp_path / "a", steps=4).run()
    assert trainer(tiny, records, tmp_path / "b", steps=4, num_workers=2).run().losses == alone.losses


@pytest.mark.parametrize("stage", ["mtd", "flow"])
def test_micro_batches_equal_one_batch(tiny, tiny_weights, records, tmp_path, stage):
    """A step in four parts, whose faces are not of one size, gives the loss and the gradients of a step in one."""
    from omniid.train.flow import FlowStage

    rows = [dict(row) for row in open_records(records, "train")]
    half = Image.new("1", (32, 32))
    half.paste(1, (8, 8, 16, 16))
    for row in rows[::2]:
        row["masks"] = [encoded(np.asarray(half), "PNG") for _ in row["masks"]]
    runs = []
    for accumulation in (1, 4):
        torch.manual_seed(0)
        made = MTDStage(tiny) if stage == "mtd" else FlowStage(tiny, tiny_weights)
        config = dataclasses.replace(getattr(tiny.train, stage), steps=5, accumulation=accumulation)
        run = tmp_path / str(accumulation)
        validation = open_records(records, "validation")
        runs.append((made, Trainer(made, tiny, config, rows, validation, run, device="cpu", progress=False)))
    gradients = []
    for made, one in runs:
        micro_batches = [one.train_batches[index] for index in range(one.config.accumulation)]
        one.optimizer.step = lambda: None
        one.optimizer.zero_grad = lambda set_to_none: None
        one._train_step(micro_batches, Stop())
        gradients.append({name: p.grad for name, p in made.model.named_parameters()})
        del one.optimizer.step, one.optimizer.zero_grad
        one.optimizer.zero_grad()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)
    whole, parts = (one.run() for _, one in runs)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    assert len(set(parts.losses)) == 5


def test_another_seed_draws_other_numbers():
    places = [0, 1 << 33]
    draws = {torch.rand((), generator=g).item() for seed in range(50) for g in identity_generators(seed, places)}
    assert len(draws) == 100


def test_a_stage_that_needs_its_batch_whole_says_so(tiny, records, tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(preset_to_toml(tiny))
    with pytest.raises(TrainingError, match="stage base needs its batch in one piece"):
        run_stage(
            "base", path, records, tmp_path, overrides=["train.base.accumulation=2"], device="cpu", progress=False
        )


def test_after_a_non_finite_gradient_the_last_checkpoint_goes_on(tiny, records, tmp_path, monkeypatch):
    whole = trainer(tiny, records, tmp_path / "whole").run()
    one, clip = trainer(tiny, records, tmp_path / "run"), torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda p, n: clip(p, n) * (float("inf") if one.step == 4 else 1)
    )
    with pytest.raises(TrainingError, match="gradient norm inf is not finite at step 4 with identities train-"):
        one.run()
    monkeypatch.undo()
    resumed = trainer(tiny, records, tmp_path / "run", resume=True)
    assert resumed.step == 3
    assert resumed.run().losses == whole.losses[3:]


def test_a_full_disk_while_saving_leaves_a_run_that_goes_on(tiny, records, tmp_path, monkeypatch):
    whole = trainer(tiny, records, tmp_path / "whole").run()
    one, save = trainer(tiny, records, tmp_path / "run"), checkpoints.save_file

    def full(tensors, path):
        if one.step == 6 and path.name == "ema.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        one.run()
    monkeypatch.undo()
    resumed = trainer(tiny, records, tmp_path / "run", resume=True)
    assert resumed.step == 3
    assert resumed.run().losses == whole.losses[3:]
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


def test_flow_runs_with_a_frozen_base_in_bf16(tiny, tiny_weights, records, tmp_path):
    from omniid.train.flow import FlowStage

    config = dataclasses.replace(tiny.train.flow, steps=2, precision="bf16", memory="full")
    rows = open_records(records, "train"), open_records(records, "validation")
    stage = FlowStage(tiny, tiny_weights)
    result = Trainer(stage, tiny, config, *rows, tmp_path, device="cpu", progress=False).run()
    assert {p.dtype for p in stage.transformer.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in stage.model.parameters()} == {torch.float32}
    assert result.validation_loss > 0


def command(preset, records, run, *more):
    return [
        sys.executable, "-P", "-m", "omniid.cli", "train", "mtd", "--preset", str(preset), "--data", str(records),
        "--run", str(run), "--quiet", "--device", "cpu", *more,
    ]  # fmt: skip


@pytest.fixture
def preset_file(tiny, tmp_path):
    path = tmp_path / "tiny.toml"
    mtd = dataclasses.replace(tiny.train.mtd, steps=60, save_every=4, sample_every=30, keep_checkpoints=2)
    preset = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, mtd=mtd))
    path.write_text(preset_to_toml(preset), encoding="utf-8")
    return path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_to_the_whole_group_saves_and_what_is_printed_goes_on(preset_file, records, tmp_path, number):
    """As Ctrl-C in a terminal, with a loader of its own processes and options that a shell would split."""
    run = tmp_path / "a run"
    options = ("--set", "train.mtd.num_workers=2", "--set", "base.prompt=a 'good' photo")
    process = subprocess.Popen(
        command(preset_file, records, run, *options, "--set", "train.mtd.steps=3000"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert wait_for_steps(run, 3, lambda: process.poll() is not None)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "saving, then stopping" in errors and "Traceback" not in errors
    step = logged(run)[-1]["step"]
    assert complete_checkpoints(run)[-1].name == f"checkpoint-{step:08d}"
    printed = errors.split("go on with: ")[1].splitlines()[0]
    assert shlex.split(printed)[-1] == "--resume" and "base.prompt=a 'good' photo" in shlex.split(printed)
    process = subprocess.Popen(["sh", "-c", f"exec {printed}"], stderr=subprocess.PIPE, text=True)
    assert wait_for_steps(run, step + 2, lambda: process.poll() is not None)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and errors.split("go on with: ")[1].splitlines()[0] == printed
    assert [row["step"] for row in logged(run)] == list(range(1, logged(run)[-1]["step"] + 1))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_kills_change_nothing(preset_file, records, tmp_path, monkeypatch):
    """SIGKILL at ten random moments, resumed each time: the log of losses equals the undisturbed run's."""
    whole = run_stage("mtd", preset_file, records, tmp_path / "whole", device="cpu", progress=False)
    run, moments = tmp_path / "killed", random.Random(0)
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    starter = multiprocessing.get_context("forkserver")  # its processes need not import everything again
    starter.set_forkserver_preload(["omniid.train.run", "omniid.train.mtd", "torch.utils.tensorboard"])
    goes_on = {"resume": True, "device": "cpu", "progress": False}
    for _ in range(10):
        process = starter.Process(target=run_stage, args=("mtd", preset_file, records, run), kwargs=goes_on)
        process.start()
        done = len(logged(run)) if (run / "metrics.jsonl").exists() else 0
        assert wait_for_steps(run, min(done + 1, 58), lambda process=process: not process.is_alive())
        time.sleep(moments.uniform(0, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    run_stage("mtd", preset_file, records, run, **goes_on)
    assert [row["loss"] for row in logged(run)] == whole.losses
    assert logged(run)[-1]["validation_loss"] == whole.validation_loss


def wait_for_steps(run, count, has_ended) -> bool:
    """Waits until the log holds `count` whole lines; False when the process ended before."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_bytes().count(b"\n") >= count:
            return True
        if has_ended():
            return False
        time.sleep(0.005)
    raise AssertionError("the training process made no progress in 120 s")
