"""What every command and script shares: its flags, its errors in one line, how JAX is set up."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn, TypeVar

from gptjax import hosts
from gptjax.caching import cache_directory
from gptjax.devices import cores_as_devices
from gptjax.doctor import explain
from gptjax.errors import NonFiniteLossError, UserError, nearest
from gptjax.reporting import print_error
from gptjax.xla_flags import set_flags

Settings = TypeVar("Settings")


def parse(
    presets: Mapping[str, Settings], default: str, description: str, args: list[str] | None = None
) -> Settings:
    """Reads settings from the command line: those of `--preset`, changed by the other flags.

    Args:
        presets: name -> settings, frozen dataclasses of one type with a field `preset`.
        default: the preset without `--preset`.
        description: what `--help` says first.
        args: the arguments; None is `sys.argv`.

    Raises:
        UserError: for an unknown preset or flag, naming the nearest.
    """
    args = sys.argv[1:] if args is None else args
    name = default
    for place, arg in enumerate(args):
        if arg.startswith("--preset="):
            name = arg.partition("=")[2]
        elif arg == "--preset" and place + 1 < len(args):
            name = args[place + 1]
    if name not in presets:
        raise UserError(f"unknown preset {name!r}{nearest(name, presets)}")
    description += f"\n\nPresets: {', '.join(presets)}."
    return parse_flags(type(presets[name]), presets[name], description, args)


def parse_flags(
    kind: type[Settings], default: Settings | None, description: str, args: list[str] | None = None
) -> Settings:
    """Reads a dataclass from the command line.

    Args:
        kind: the dataclass.
        default: where every field has its value from unless a flag changes it; None leaves the
            defaults of the fields.
        description: what `--help` says first.
        args: the arguments; None is `sys.argv`.

    Raises:
        UserError: for an unknown flag, naming the nearest, or an illegal value.
    """
    import tyro

    args = sys.argv[1:] if args is None else args
    flags = list(_flags(kind if default is None else default, ""))
    for arg in itertools.takewhile(lambda arg: arg != "--", args):
        flag = arg.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and len(flag) > 2 and flag not in flags:
            close = difflib.get_close_matches(flag, flags, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else "--help lists them"
            if " " in flag:
                hint = "a text that begins with a dash comes last, after --"
            raise UserError(f"unknown flag {flag}; {hint}")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                kind,
                default=tyro.MISSING_NONPROP if default is None else default,
                description=description,
                args=args,
                config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(_without_box(complaint.getvalue())) from None


def _without_box(text: str) -> str:
    """What a box, of lines or of ASCII, says between its title and its first rule, in one line."""
    inside = [line.strip("│ ") for line in text.splitlines()[1:]]
    lines = itertools.dropwhile(_is_rule, inside)
    message = " ".join(itertools.takewhile(lambda line: not _is_rule(line), lines))
    return message.rstrip(".") + "; --help lists the flags"


def _is_rule(line: str) -> bool:
    return not line.strip("─-")


def _flags(settings: object, prefix: str) -> Iterator[str]:
    yield from ("--help", "--tyro-print-completion", "--tyro-write-completion")
    for entry in dataclasses.fields(settings):  # pyright: ignore[reportArgumentType]
        name = prefix + entry.name.replace("_", "-")
        value = getattr(settings, entry.name, None)
        if dataclasses.is_dataclass(value):
            yield from _flags(value, name + ".")
        else:
            yield f"--{name}"


def run_command(command: Callable[[], object]) -> NoReturn:
    """Runs a command or script: configures JAX, and ends with a status and errors in one line.

    Status 0 where it went well (also where a signal stopped a run that can be resumed), 2 where
    the user's input was refused, 1 where a run failed. A process of several that fails ends the
    others; see `gptjax.hosts`.
    """
    configure_jax()
    status, end = 0, None
    try:
        command()
    except NonFiniteLossError as error:
        status, end = 1, error
    except BrokenPipeError as error:
        # Who read the output has enough; what is left has no reader.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # But a process of several that goes has gone for all.
        status, end = (1, error) if hosts.are_several() else (0, None)
    except (UserError, OSError) as error:
        status, end = 2, error
    except RuntimeError as error:
        hosts.leave_with_others()
        if "backend" not in str(error):
            raise
        status, end = 1, RuntimeError(f"{explain(error)}; gptjax doctor tells more")
    except KeyboardInterrupt:
        status, end = 130, KeyboardInterrupt("interrupted")
    except Exception:
        hosts.leave_with_others()
        raise
    if end is not None:
        print_error(end)
        hosts.fail(end, status)
    sys.stdout.flush()
    sys.exit(status)


def configure_jax() -> None:
    """Uses every core of a CPU, sets XLA's flags, and keeps compiled programs for the next run.

    The flags are those of `xla_flags` for the accelerators here; the user's own win. Programs are
    kept in the folder of `JAX_COMPILATION_CACHE_DIR`, by default `cache_directory()`. Commands and
    scripts call this; importing gptjax configures nothing.
    """
    import jax

    set_flags()
    cores_as_devices()
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(cache_directory()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
