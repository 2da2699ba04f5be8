"""The one place where expected errors become a sentence on stderr and an exit code.

0 done, 1 failed, 2 wrong usage, 130 interrupted. What is not listed here is a bug and keeps its traceback.
"""

import contextlib
import errno
from collections.abc import Iterator

import click

INTERRUPTED = 130


@contextlib.contextmanager
def expected_errors() -> Iterator[None]:
    """Turns failures that a user can cause and mend into click's exceptions."""
    from omniid.config import ConfigError
    from omniid.errors import OmniIDError

    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except KeyboardInterrupt:
        click.echo("\ninterrupted", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    except (OmniIDError, ConfigError) as error:
        raise click.ClickException(_one_line(error)) from error
    except MemoryError as error:
        raise click.ClickException(f"out of memory{_detail(error)}; use smaller sizes or another machine") from error
    except BrokenPipeError:
        raise  # click ends quietly when the reader of a pipe has gone
    except OSError as error:
        raise click.ClickException(_explain(error)) from error
    except Exception as error:
        if _is_disk_full(error):  # torch and safetensors wrap it in their own types
            raise click.ClickException("the disk is full; free some space and run the command again") from error
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which this module does not import
            raise click.ClickException("the GPU is out of memory; use smaller sizes or --offload") from error
        raise


def _explain(error: OSError) -> str:
    name = error.filename or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{where}; free some space and run the command again"
    if isinstance(error, FileNotFoundError):
        return f"{name} does not exist; check the path" if error.filename else _one_line(error)
    if isinstance(error, PermissionError):
        return f"no permission for {name}; check who owns it"
    if isinstance(error, (IsADirectoryError, NotADirectoryError)):
        return f"{name}: {(error.strerror or 'wrong kind of file').lower()}; check the path"
    return _one_line(error)


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if "No space left on device" in str(error) or getattr(error, "errno", None) == errno.ENOSPC:
            return True
        error = error.__cause__ or error.__context__
    return False


def _detail(error: BaseException) -> str:
    return f" ({_one_line(error)})" if str(error) else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
