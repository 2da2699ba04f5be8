"""Several processes: the loss curve of one, checkpoints that pass between them, and the death of a process.

Twenty kills instead of three: OMNIID_TEST_KILLS=20 pytest tests/train/test_parallel.py -k kill
"""

import dataclasses
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omniid.config import preset_to_toml
from omniid.train.checkpoint import complete_checkpoints
from omniid.train.run import run_stage

NUM_KILLS = int(os.environ.get("OMNIID_TEST_KILLS", "3"))
STEPS = max(20, 4 * NUM_KILLS)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600 + 60 * NUM_KILLS)]


@pytest.fixture(scope="module")
def preset_file(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("preset") / "tiny.toml"
    # AdamW's first steps follow the sign of gradients that are hardly more than rounding, which differs between products of a
    # whole batch and of its parts, most with AVX-512: the rate keeps that below what is compared.
    changes = {"steps": STEPS, "save_every": 2, "sample_every": 10, "keep_checkpoints": STEPS, "lr": 3e-4}
    mtd = dataclasses.replace(tiny.train.mtd, **changes)
    preset = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, mtd=mtd))
    path.write_text(preset_to_toml(preset), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def alone(preset_file, records, tmp_path_factory):
    """The run of one process and its losses."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    return folder, run_stage("mtd", preset_file, records, folder, device="cpu", progress=False)


def start(preset, records, run, *more, stage="mtd"):
    """Two processes of the training command under torchrun; without `--` it takes our `--run` for its `--run-path`."""
    return subprocess.Popen(
        [
            sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--no-python", "--nproc-per-node", "2", "--",
            sys.executable, "-P", "-m", "omniid.cli", "train", stage, "--preset", str(preset), "--data", str(records),
            "--run", str(run), "--quiet", "--json", "--device", "cpu", *more,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def finish(process):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return json.loads(output)


def logged(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses_of(run):
    return [row["loss"] for row in logged(run)]


@pytest.fixture(scope="module")
def pair(preset_file, records, tmp_path_factory):
    """The run of two processes and its summary."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    return folder, finish(start(preset_file, records, folder))


def back_to(run, step, copy):
    """A copy of a run that ended after `step`."""
    shutil.copytree(run, copy)
    for folder in complete_checkpoints(copy):
        if folder.name > f"checkpoint-{step:08d}":
            shutil.rmtree(folder)
    return copy


def test_two_processes_give_the_losses_of_one_and_checkpoints_pass_between_them(
    preset_file, records, alone, pair, tmp_path
):
    (folder, result), (both, summary) = alone, pair
    assert losses_of(both) == pytest.approx(result.losses, rel=1e-5)
    assert summary["validation_loss"] == pytest.approx(result.validation_loss, rel=1e-5)
    one = back_to(both, 10, tmp_path / "two-one")
    resumed = run_stage("mtd", preset_file, records, one, resume=True, device="cpu", progress=False)
    assert len(resumed.losses) == STEPS - 10
    assert losses_of(one) == pytest.approx(result.losses, rel=1e-5)
    two = back_to(folder, 10, tmp_path / "one-two")
    finish(start(preset_file, records, two, "--resume"))
    assert losses_of(two) == pytest.approx(result.losses, rel=1e-5)


def test_sharded_training_gives_the_same_losses_and_a_checkpoint_for_one_process(preset_file, records, tmp_path):
    steps, run = ("--set", "train.mtd.steps=10", "--set", "train.mtd.warmup_steps=2"), tmp_path / "run"
    finish(start(preset_file, records, run, "--shard", "--memory", "full", "--set", "train.mtd.accumulation=2", *steps))
    plain = run_stage(
        "mtd", preset_file, records, tmp_path / "plain", overrides=steps[1::2], device="cpu", progress=False
    )
    assert losses_of(run) == pytest.approx(plain.losses, rel=1e-5)
    assert logged(run)[-1]["validation_loss"] == pytest.approx(plain.validation_loss, rel=1e-5)
    assert (run / "weights" / "encoder.safetensors").is_file()
    resumed = run_stage("mtd", preset_file, records, run, resume=True, device="cpu", progress=False)
    assert resumed.step == STEPS and len(resumed.losses) == STEPS - 10


def test_two_processes_share_a_step_that_is_filled_by_tokens(preset_file, records, tmp_path):
    filled = ("--tokens-per-batch", str(12 * 17)), ("--set", "train.mtd.steps=6")
    finish(start(preset_file, records, tmp_path / "pair", *filled[0], *filled[1]))
    overrides = ["train.mtd.tokens_per_batch=204", "train.mtd.steps=6"]
    plain = run_stage("mtd", preset_file, records, tmp_path / "one", overrides=overrides, device="cpu", progress=False)
    assert losses_of(tmp_path / "pair") == pytest.approx(plain.losses, rel=1e-5)


def test_two_processes_train_stage_control_and_build_one_cache(preset_file, weights, records, tmp_path):
    for name in ("pair", "one"):
        shutil.copytree(weights, tmp_path / name / "weights")
    cached = ["train.control.cache_latents=true", "train.control.mirror=0.5"]
    wishes = [word for wish in cached for word in ("--set", wish)]
    finish(start(preset_file, records, tmp_path / "pair", *wishes, stage="control"))
    plain = run_stage(
        "control", preset_file, records, tmp_path / "one", overrides=cached[1:], device="cpu", progress=False
    )
    assert losses_of(tmp_path / "pair") == pytest.approx(plain.losses, rel=1e-5)
    assert logged(tmp_path / "pair")[-1]["validation_loss"] == pytest.approx(plain.validation_loss, rel=1e-5)
    files = [path.relative_to(tmp_path / "pair" / "weights") for path in (tmp_path / "pair" / "weights").rglob("*")]
    assert {"adapter.safetensors", "controlnet/config.json"} <= {path.as_posix() for path in files}
    shards = list((tmp_path / "pair" / "cache").glob("*/*"))
    assert len(shards) == 4 and all(path.suffix == ".safetensors" and path.name[0] != "." for path in shards)


@pytest.mark.parametrize("whom", ["launcher", "worker"])
def test_a_signal_saves_on_all_processes_and_the_launchers_command_is_printed(preset_file, records, tmp_path, whom):
    run = tmp_path / "run"
    process = start(preset_file, records, run, "--set", "train.mtd.num_workers=1", "--set", "train.mtd.steps=3000")
    wait_for_steps(run, 3, process)
    os.kill(process.pid if whom == "launcher" else workers(process.pid)[1], signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert whom == "launcher" or process.returncode == 0  # torchrun itself fails when it is interrupted
    printed = shlex.split(errors.split("go on with: ")[1].splitlines()[0])
    assert printed == [*process.args, "--resume"]
    step = logged(run)[-1]["step"]
    assert step < 3000 and complete_checkpoints(run)[-1].name == f"checkpoint-{step:08d}"


def test_kills_of_a_process_end_the_job_and_change_nothing(preset_file, records, pair, tmp_path):
    """SIGKILL of either process at random moments, resumed each time; every loss equals the undisturbed run's."""
    run, moments = tmp_path / "killed", random.Random(0)
    for _ in range(NUM_KILLS):
        process = start(preset_file, records, run, "--resume")
        done = len(logged(run)) if (run / "metrics.jsonl").exists() else 0
        wait_for_steps(run, min(done + 1, STEPS - 2), process)
        time.sleep(moments.uniform(0, 0.1))
        os.kill(moments.choice(workers(process.pid)), signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "Signal 9 (SIGKILL)" in errors
    finish(start(preset_file, records, run, "--resume"))
    assert losses_of(run) == losses_of(pair[0])
    assert logged(run)[-1]["validation_loss"] == logged(pair[0])[-1]["validation_loss"]


def workers(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_steps(run, count, process):
    """Waits until the log holds `count` whole lines."""
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_bytes().count(b"\n") < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-3000:]
        time.sleep(0.005)
