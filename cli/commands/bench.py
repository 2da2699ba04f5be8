"""omniid bench: run the benchmarks of a checkout."""

import subprocess
import sys
from pathlib import Path

import click

WITHOUT_INPUTS = 77
"""Exit code of a script that has nothing to measure here (benchmarks/harness.py)."""


@click.command()
@click.argument("names", nargs=-1)
@click.option("--save", is_flag=True, help="Also write dated reports under benchmarks/results.")
@click.option("--list", "list_only", is_flag=True, help="Print the names of the benchmarks.")
def bench(names: tuple[str, ...], save: bool, list_only: bool) -> None:
    """Time kernels and the whole path, e.g. omniid bench encode generate; without names, all that have their inputs here.

    Options after -- go to the one benchmark named: omniid bench train_step -- --preset paper --device cuda.
    The scripts belong to the repository and are not installed: this needs a checkout.
    """
    import omniid

    folder = Path(omniid.__file__).resolve().parent.parent / "benchmarks"
    scripts = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    if not scripts:
        raise click.ClickException("the benchmarks come with the repository; install from a checkout: pip install -e .")
    num_names = next((i for i, name in enumerate(names) if name.startswith("-")), len(names))
    names, options = names[:num_names], names[num_names:]
    if options and len(names) != 1:
        raise click.UsageError("options after -- go to one benchmark; name just that one")
    unknown = [name for name in names if name not in scripts]
    if unknown:
        raise click.UsageError(f"no benchmark {unknown[0]!r}; use one of: {', '.join(scripts)}")
    if list_only:
        click.echo("\n".join(scripts))
        return
    failed, skipped = [], []
    for name in names or scripts:
        command = [sys.executable, str(scripts[name]), *(["--save"] if save else []), *options]
        code = subprocess.run(command, cwd=folder, check=False).returncode
        if code == WITHOUT_INPUTS and not names:
            skipped.append(name)
        elif code:
            failed.append(name)
    if skipped:
        click.echo(f"skipped, for their inputs are not here (see above): {', '.join(skipped)}", err=True)
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}")
