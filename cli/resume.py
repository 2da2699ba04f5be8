"""The command line that goes on with an interrupted run, as its user typed it."""

import os
import shlex
import shutil
import sys


def resume_command() -> str:
    """This process's command line with `--resume`, quoted for a shell; under torchrun the launcher's, which holds ours."""
    import psutil

    arguments = sys.argv[1:]
    words = _as_typed(sys.orig_argv)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = psutil.Process().parent().cmdline()
        if launcher[-len(arguments) :] == arguments:
            words = _as_typed(launcher)
    return shlex.join([*words, *([] if "--resume" in arguments else ["--resume"])])


def _as_typed(words: list[str]) -> list[str]:
    """A script on PATH is started by its name: the system puts the interpreter and the script's whole path in its place."""
    if len(words) > 1 and os.path.isfile(words[1]) and os.access(words[1], os.X_OK):
        script = words[1]
        found = shutil.which(os.path.basename(script))
        is_on_path = found is not None and os.path.samefile(found, script)
        return [os.path.basename(script) if is_on_path else script, *words[2:]]
    return words
