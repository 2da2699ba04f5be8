"""python -P -m omniid.cli: the command without its script."""

from omniid.cli.main import main

main(prog_name="omniid")
