"""The command itself: fast and lazy help, exit codes, and expected errors as one sentence."""

import errno
import importlib.util
import json
import os
import subprocess
import sys
import time

import click
import pytest
from click.testing import CliRunner

import omniid
from omniid.cli.errors import expected_errors
from omniid.cli.main import COMMANDS, main
from omniid.config import ConfigError
from omniid.errors import OmniIDError

HEAVY = ["torch", "triton", "diffusers", "transformers", "tensorrt", "tensorrt_rtx", "onnx", "datasets", "numpy", "PIL"]


def run_python(code: str, folder) -> str:
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("module", ["omniid", "omniid.cli.main"])
def test_import_is_light(tmp_path, module):
    loaded = json.loads(run_python(f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))", tmp_path))
    assert not set(HEAVY) & set(loaded)


def test_the_checkout_is_not_importable_under_its_folder_names(tmp_path):
    code = "import importlib.util as u; print([n for n in ('cli', 'tests', 'benchmarks') if u.find_spec(n)])"
    assert run_python(code, tmp_path).strip() == "[]"


def test_help_lists_every_command_quickly_and_loads_none(tmp_path):
    code = """
import sys
from click.testing import CliRunner
from omniid.cli.main import main
print(CliRunner().invoke(main, ["--help"]).output)
print([name for name in sys.modules if name.startswith("omniid.cli.commands")])
"""
    start = time.perf_counter()
    output = run_python(code, tmp_path)
    assert time.perf_counter() - start < 3  # 0.1 s on a quiet machine; the bound only catches a heavy import
    assert all(f"\n  {name} " in output for name in COMMANDS)
    assert output.strip().endswith("[]")


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_exists_under_its_name_and_has_help(name):
    module, _, attribute = COMMANDS[name][0].partition(":")
    assert importlib.util.find_spec(module) is not None
    command = main.get_command(click.Context(main), name)
    assert command.name == name
    assert attribute.startswith(name)
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0
    assert f"omniid {name}" in result.output


def test_commands_load_no_tensor_code_for_their_help(tmp_path):
    code = f"""
import sys
from click.testing import CliRunner
from omniid.cli.main import main, COMMANDS
for name in COMMANDS:
    assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0
print(sorted(set({HEAVY}) & set(sys.modules)))
"""
    assert run_python(code, tmp_path).strip() == "[]"


def test_version():
    result = CliRunner().invoke(main, ["--version"])
    assert result.exit_code == 0
    assert omniid.__version__ in result.output


def test_unknown_commands_name_the_nearest_and_exit_with_2():
    for typed, hint in (("enc", "did you mean encode?"), ("generat", "did you mean generate?"), ("zzz", "use one of:")):
        result = CliRunner().invoke(main, [typed])
        assert result.exit_code == 2
        assert hint in result.stderr


def test_public_names_are_lazy_and_wrong_names_fail():
    assert set(omniid.__all__) <= set(dir(omniid))
    assert omniid.load_preset("mini").name == "mini"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = omniid.nothing


def failing(error: BaseException):
    """The exit code and stderr of a command that fails with `error`."""

    class Group(click.Group):
        def invoke(self, ctx: click.Context) -> object:
            with expected_errors():
                return super().invoke(ctx)

    @click.group(cls=Group)
    def group() -> None:
        pass

    @group.command()
    def fail() -> None:
        raise error

    return CliRunner().invoke(group, ["fail"])


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OmniIDError("a.jpg is bad;\nmend it"), "Error: a.jpg is bad; mend it"),
        (ConfigError("unknown key 'x'"), "unknown key 'x'"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.jpg"), "a.jpg does not exist; check the path"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full; free some space"),
        (OSError(errno.ENOSPC, "No space left on device", "id.pt"), "the disk is full while writing id.pt"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (caused(RuntimeError("write failed"), OSError(errno.ENOSPC, "full")), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "id.pt"), "no permission for id.pt"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "id"), "id: is a directory"),
        (MemoryError(), "out of memory; use smaller sizes"),
    ],
    ids=[
        "own",
        "config",
        "missing",
        "disk",
        "disk-file",
        "disk-wrapped",
        "disk-cause",
        "permission",
        "folder",
        "memory",
    ],
)
def test_expected_errors_are_one_sentence_and_exit_1(error, text):
    result = failing(error)
    assert result.exit_code == 1
    assert text in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""


def test_ctrl_c_says_so_and_exits_with_130():
    result = failing(KeyboardInterrupt())
    assert result.exit_code == 130
    assert "interrupted" in result.stderr


def test_bugs_keep_their_traceback():
    result = failing(ZeroDivisionError("bug"))
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_the_installed_script_runs_and_reports_a_full_disk(tmp_path):
    script = os.path.join(os.path.dirname(sys.executable), "omniid")
    done = subprocess.run([script, "id", "info", "none.pt"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: identity file none.pt does not exist; make one with")
    with open("/dev/full", "w") as full:
        done = subprocess.run([script, "doctor", "--json"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "disk is full" in done.stderr
