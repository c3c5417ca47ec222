"""What the three command lines share: how an expected error reaches the person who typed the command."""

from __future__ import annotations

import os
import sys

import click

from common.errors import DistillError


class CommandGroup(click.Group):
    """Prints an expected error as one message without a traceback, and exits with 1 (click's usage errors with 2)."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command."""
        # A forked loader would otherwise be warned about at every fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            return super().invoke(ctx)
        except DistillError as error:
            click.echo(f"error: {error}", err=True)
        except BrokenPipeError:
            sys.stderr.close()  # the reader of our output left; the interpreter must not complain about it
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            click.echo(f"error: {place}{error.strerror or error}", err=True)
        except KeyboardInterrupt:
            click.echo("stopped; run the same command again to go on where it stopped", err=True)
            return ctx.exit(130)
        return ctx.exit(1)


SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
