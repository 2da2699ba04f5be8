"""omniid doctor: what is installed and what this machine can run."""

import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def doctor(as_json: bool) -> None:
    """\b
    omniid doctor

    Shows what is installed, what each missing piece would add, and whether this machine can run the paper preset.
    Exit code 1 if something required is missing.
    """
    from omniid.doctor import examine

    report = examine()
    if as_json:
        click.echo(json.dumps(report))
    else:
        _print(report)
    if report["missing"]:
        names = " ".join(report["missing"])
        raise click.ClickException(f"required packages are missing; install them with: pip install {names}")


def _print(report: dict) -> None:
    click.echo(f"omniid {report['omniid']}, Python {report['python']}")
    _heading("required")
    for package in report["required"]:
        click.echo(f"  {package['name']:<26} {package['installed'] or 'MISSING, wanted ' + package['wanted']}")
    _heading("optional: pip install -e '.[NAME]'")
    for name, extra in report["extras"].items():
        have = [f"{p['name']} {p['installed']}" for p in extra["packages"] if p["installed"]]
        lack = [p["name"] for p in extra["packages"] if not p["installed"]]
        state = "; ".join(filter(None, [", ".join(have), f"without {', '.join(lack)}" if lack else ""]))
        click.echo(f"  {name:<7} {extra['adds']}\n          {state or 'nothing to install on this system'}")
    _heading("this installation")
    slow = "not built (needs CMake and a C++ compiler; then pip install again): references are used"
    click.echo(f"  native kernels   {report['native_kernels'] or slow}")
    click.echo(f"  shipped weights  {', '.join(report['weights']) or 'none: train them, see README'}")
    click.echo(f"  test photos      {report['test_data'] or 'absent: tests on real photos skip (OMNIID_TEST_DATA)'}")
    for backend, lacks in report["faces"].items():
        click.echo(f"  --faces {backend:<8} {'without ' + ', '.join(lacks) if lacks else 'ready'}")
    machine = report["machine"]
    _heading("this machine")
    click.echo(
        f"  {machine['system']}, {machine['cpus']} CPUs ({' '.join(machine['cpu_features']) or 'features unknown'})"
    )
    click.echo(f"  memory {machine['memory_gb'] or 'unknown'} GB")
    for gpu in machine["gpus"]:
        click.echo(f"  GPU {gpu['name']}, {gpu['memory_gb']} GB, compute capability {gpu['compute_capability']}")
    if not machine["gpus"]:
        click.echo("  no CUDA GPU")
    paper = report["paper_preset"]
    _heading("paper preset (CLIP ViT-H/14, FLUX.1-dev), one image of 1024 px")
    click.echo("  " + ", ".join(f"{part} {n:g} B" for part, n in paper["billions_of_parameters"].items()))
    for way, size in paper["needs_gb"].items():
        click.echo(f"  {way:<22} {size:5.1f} GB")
    where = (
        "present" if paper["base_weights_present"] else "not in the hub cache: accept their licence and download them"
    )
    click.echo(f"  FLUX.1-dev weights {where}")
    click.echo(f"  this machine: {paper['verdict']}")


def _heading(text: str) -> None:
    click.echo("\n" + click.style(text, bold=True))
