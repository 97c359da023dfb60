"""The command line: one thin file a command. Commands are imported when they are used."""

from __future__ import annotations

import sys
from importlib import import_module

import click

from porttool.cli import ancestor, console
from porttool.errors import PorttoolError, said_by_system

COMMANDS = (
    "convert", "build", "run", "summarize", "infill", "verify", "bench", "profile", "inspect",
    "export", "plugins", "demo",
)  # fmt: skip


class LazyGroup(click.Group):
    """Finds porttool's commands by module name, and plugins' commands through their hook."""

    _plugins_asked = False

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return porttool's commands in the order of their use, then the plugins'."""
        self._ask_plugins()
        return [*COMMANDS, *sorted(self.commands)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name in COMMANDS:
            command: click.Command = import_module(f"porttool.cli.{cmd_name}").command
            return command
        self._ask_plugins()
        return super().get_command(ctx, cmd_name)

    def _ask_plugins(self) -> None:
        from porttool.plugins import load_registry

        if not self._plugins_asked:
            self._plugins_asked = True
            load_registry().add_commands(self, COMMANDS)


SETTINGS = {"help_option_names": ["-h", "--help"], "token_normalize_func": ancestor.with_dashes}


@click.group(cls=LazyGroup, context_settings=SETTINGS)
@click.version_option(package_name="porttool")
def cli() -> None:
    """Port a GPT-family model to a fast engine, and prove that it is still the same model.

    convert → build → run, summarize, verify. With --model the steps chain without paths.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a failed check or operation, 2 a usage error."""
    console.open_closed_streams()
    console.tolerate_encodings()
    sys.exit(invoke(arguments))


def invoke(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    try:
        with console.without_bars():
            return int(cli.main(arguments, prog_name="porttool", standalone_mode=False) or 0)
    except PorttoolError as error:
        console.error(str(error))
        return error.exit_status
    except click.exceptions.Abort as error:
        console.error("; ".join(["interrupted", *getattr(error.__cause__, "__notes__", ())]))
        return 130
    except click.ClickException as error:
        ancestor.explain(error, sys.argv[1:] if arguments is None else arguments).show()
        return error.exit_code
    except BrokenPipeError:
        return 1
    except OSError as error:
        console.error(said_by_system(error))
        return 1
    except MemoryError as error:
        console.error(f"{type(error).__name__}: {error}")
        return 1
    except Exception as error:
        from porttool.plugins import blame

        if ran_out_of_memory(error):
            console.error(
                f"the GPU ran out of memory ({str(error).partition('. GPU')[0]}): stop what else "
                "uses it, or build with a smaller --max-batch-size or --max-input-len"
            )
            return 1
        if (culprit := blame(error)) is None:
            raise
        console.failure(error, culprit)
        return 1


def ran_out_of_memory(error: Exception) -> bool:
    """Whether torch found no room on a GPU; without importing it where nothing has."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)
