"""How long the command line takes to answer."""

import subprocess
import sys

from harness import report, time_in_turn

COMMANDS = {"omniid --help": ["--help"], "omniid id info --help": ["id", "info", "--help"]}
cases = {
    name: lambda arguments=arguments: subprocess.run(
        [sys.executable, "-P", "-m", "omniid.cli", *arguments], check=True, capture_output=True
    )
    for name, arguments in COMMANDS.items()
}
times = time_in_turn(cases, rounds=9)
report("cli", [{"case": name, **t} for name, t in times.items()], "Whole process. Target: omniid --help under 500 ms.")
