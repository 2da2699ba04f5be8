"""omniid id: look at, compare and combine identity files."""

import json
from collections.abc import Sequence

import click

_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_OUTPUT = click.option("-o", "--output", required=True, type=click.Path(dir_okay=False), help="Identity file to write.")


@click.group("id")
def id_group() -> None:
    """\b
    omniid id info id.pt
    omniid id compare a.pt b.pt

    Looks at, compares and combines identity files.
    """


@id_group.command()
@click.argument("identity", type=click.Path())
@_JSON
def info(identity: str, as_json: bool) -> None:
    """\b
    omniid id info id.pt

    Shows what an identity file holds and where it came from.
    """
    from omniid.identity import Identity

    one = Identity.load(identity)
    facts = {
        "identity": identity,
        "shape": list(one.shape),
        "dtype": str(one.tokens.dtype).removeprefix("torch."),
        "mean_row_norm": round(one.tokens.float().norm(dim=1).mean().item(), 4),
        "encoder": one.encoder,
        "preset": one.preset,
        "num_images": one.num_images,
        "created": one.created,
        "format_version": one.format_version,
        "photos": [{"sha256": p.sha256, "pose": p.pose, "quality": p.quality} for p in one.photos],
    }
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        if name != "photos":
            click.echo(f"{name:<15} {' x '.join(map(str, value)) if name == 'shape' else value}")
    for photo in one.photos:
        pose = "pose unknown" if photo.pose is None else "yaw {:+.0f} pitch {:+.0f} roll {:+.0f}".format(*photo.pose)
        quality = "quality unknown" if photo.quality is None else f"quality {photo.quality:.2f}"
        click.echo(f"{'photo':<15} {photo.sha256[:12]} {pose}, {quality}")


@id_group.command()
@click.argument("first", type=click.Path())
@click.argument("second", type=click.Path())
@_JSON
def compare(first: str, second: str, as_json: bool) -> None:
    """\b
    omniid id compare a.pt b.pt

    Tells how alike two codes of the same encoder are. Codes of different people share a large common part: judge a
    value against those of other pairs.
    """
    from omniid.identity import Identity

    figures = Identity.compare(Identity.load(first), Identity.load(second))
    if as_json:
        click.echo(json.dumps(figures))
        return
    for name, value in figures.items():
        click.echo(f"{name:<18} {value:.4f}")


@id_group.command()
@click.argument("identities", nargs=-1, required=True, type=click.Path())
@_OUTPUT
@_JSON
def merge(identities: Sequence[str], output: str, as_json: bool) -> None:
    """\b
    omniid id merge a.pt b.pt -o both.pt

    Averages identity files of ONE person, weighted by their numbers of photos. Where the photos are at hand, encode
    them together instead: that is better.
    """
    from omniid.identity import Identity

    _write(Identity.merge([Identity.load(path) for path in identities]), output, as_json)


@id_group.command()
@click.argument("first", type=click.Path())
@click.argument("second", type=click.Path())
@click.option("-t", "--t", "t", type=float, required=True, help="0 gives the first, 1 the second; outside exaggerates.")
@_OUTPUT
@_JSON
def lerp(first: str, second: str, t: float, output: str, as_json: bool) -> None:
    """\b
    omniid id lerp a.pt b.pt -t 0.5 -o between.pt

    Blends two identities: (1 - t) first + t second.
    """
    from omniid.identity import Identity

    _write(Identity.lerp(Identity.load(first), Identity.load(second), t), output, as_json)


def _write(identity, output: str, as_json: bool) -> None:
    identity.save(output)
    if as_json:
        facts = {"identity": output, "num_images": identity.num_images, "shape": list(identity.shape)}
        click.echo(json.dumps({**facts, "encoder": identity.encoder, "preset": identity.preset}))
    else:
        rows, columns = identity.shape
        click.echo(f"{output}: {rows} x {columns} tokens from {identity.num_images} photos")
