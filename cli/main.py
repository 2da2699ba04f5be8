"""The `omniid` command: a table of commands, each loaded when it is used."""

import difflib
import importlib

import click

import omniid
from omniid.cli.errors import expected_errors

# command -> where it lives and the line that `omniid --help` shows, so that help loads none of them
COMMANDS = {
    "demo": ("omniid.cli.commands.demo:demo", "The tour on a CPU: encode, reconstruct, generate, measure."),
    "encode": ("omniid.cli.commands.encode:encode", "Photos of one person to an identity file."),
    "id": ("omniid.cli.commands.id:id_group", "Look at, compare and combine identity files."),
    "generate": ("omniid.cli.commands.generate:generate", "Pictures of a person from an identity file and a prompt."),
    "train": ("omniid.cli.commands.train:train", "Train the base, the encoder or the adapter."),
    "data": ("omniid.cli.commands.data:data", "Make and inspect sets of identity records."),
    "evaluate": ("omniid.cli.commands.evaluate:evaluate", "Measure how well identity is kept."),
    "reproduce": ("omniid.cli.commands.reproduce:reproduce", "The paper's tables and figures at a preset's scale."),
    "export": ("omniid.cli.commands.export:export", "ONNX files and TensorRT engines, with proof of parity."),
    "bench": ("omniid.cli.commands.bench:bench", "Time the kernels and the whole path."),
    "doctor": ("omniid.cli.commands.doctor:doctor", "What is installed and what this machine can run."),
}


class LazyGroup(click.Group):
    """A group that imports a command's module only to run it or to show its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name][0].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple:
        if args and args[0] not in COMMANDS:
            begins = [name for name in COMMANDS if name.startswith(args[0])]
            near = begins or difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean {' or '.join(near)}?" if near else f"use one of: {', '.join(COMMANDS)}"
            raise click.UsageError(f"no command {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        with expected_errors():
            return super().invoke(ctx)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(omniid.__version__, prog_name="omniid")
def main() -> None:
    """\b
    omniid encode faces/*.jpg -o id.pt
    omniid generate --id id.pt --prompt "photo of a person smiling" -o out.png

    Turns a handful of photos of a person into one identity file and generates that person anywhere.
    """


if __name__ == "__main__":
    main()
