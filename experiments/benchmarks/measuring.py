"""What the benchmarks share: processes, turns, the machine, and how results are shown and kept."""

import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from gptjax.command_line import run_command
from gptjax.config import ModelConfig

MEASUREMENT_SECONDS = 900
"""How long a process may take over one answer."""

_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "OutOfMemory")


class MeasurementError(RuntimeError):
    """A measurement's process failed.

    Args:
        reason: in short.
        details: what is known beside it, such as the traceback.
    """

    def __init__(self, reason: str, details: str = ""):
        super().__init__(f"in a measurement's process: {reason}{details and chr(10) + details}")
        self.reason = reason


class DoesNotFitError(MeasurementError):
    """A measurement for which the device has not enough memory."""


class Worker:
    """A process in which one contestant is built once and then measured in turns with others.

    Args:
        build: makes, in the process, a function that measures and can be called again and again.
        args: what `build` is given.
        environment: variables that the process has beside this one's.
    """

    def __init__(
        self,
        build: Callable[..., Callable[..., Any]],
        *args: Any,
        environment: Mapping[str, str] | None = None,
    ):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, args))
        before = dict(os.environ)
        os.environ.update(environment or {})
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self) -> None:
        """Waits until the function is there.

        Raises:
            DoesNotFitError: if there is too little memory for it.
            MeasurementError: if it failed otherwise, or took too long.
        """
        self._answer()

    def __call__(self, *args: Any) -> Any:
        """Calls the function. Raises as `wait` does."""
        try:
            self._pipe.send(args)
        except OSError:
            raise self._death() from None
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        # SIGTERM would have libraries print where the process was.
        self._process.kill()
        self._process.join()

    def _answer(self) -> Any:
        if not self._pipe.poll(MEASUREMENT_SECONDS):
            raise MeasurementError(f"it took more than {MEASUREMENT_SECONDS} s")
        try:
            good, answer = self._pipe.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if good:
            return answer
        reason, details = answer
        if any(sign in details for sign in _OUT_OF_MEMORY):
            raise DoesNotFitError(reason)
        raise MeasurementError(reason, details)

    def _death(self) -> MeasurementError:
        """Why the process is no longer there."""
        self._process.join(10)
        status = self._process.exitcode
        text = f"it ended with status {status}"
        # So Linux ends a process that takes too much of the host's memory; whatever else ends one
        # says nothing about memory.
        return DoesNotFitError(text) if status == -signal.SIGKILL else MeasurementError(text)


def _serve(pipe: Any, build: Callable[..., Callable[..., Any]], args: tuple[Any, ...]) -> None:
    try:
        function = build(*args)
        pipe.send((True, None))
        while True:
            pipe.send((True, function(*pipe.recv())))
    except EOFError:
        return
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip()[:300]
        pipe.send((False, (reason, traceback.format_exc())))


def in_turns(
    workers: Mapping[str, Worker],
    turns: int,
    *args: Any,
    may_fail: Collection[str] = (),
    failures: dict[str, str] | None = None,
) -> dict[str, list[Any]]:
    """Measures one after the other, so many times: what each gave, by turn.

    Other load on a machine comes and goes, so that only figures of one turn compare.

    Args:
        workers: by name.
        turns: how often each is measured.
        args: what each is called with.
        may_fail: the names of those that the others go on without. Nothing of them is returned.
        failures: takes the reasons, by name.

    Raises:
        MeasurementError: if another one fails.
    """
    found: dict[str, list[Any]] = {name: [] for name in workers}
    for turn in range(turns):
        say(f"turn {turn + 1} of {turns}")
        for name in list(found):
            try:
                found[name].append(workers[name](*args))
            except MeasurementError as error:
                if name not in may_fail:
                    raise
                say(f"{name}: {error}")
                workers[name].close()
                del found[name]
                if failures is not None:
                    failures[name] = error.reason
    return found


def transformers_gpt2(config: ModelConfig, **changes: Any) -> Any:
    """transformers' GPT-2 of the same shape, with weights that it draws.

    Args:
        config: a model in GPT-2's architecture.
        changes: other fields of transformers' configuration.
    """
    import transformers  # pyright: ignore[reportMissingImports]

    shape = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.context_length,
        n_embd=config.embed_dim,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        **changes,
    )
    return transformers.GPT2LMHeadModel(shape)


def run_benchmark(main: Callable[[], object]) -> NoReturn:
    """Runs a script as `run_command` does; where a measurement failed, it ends with status 1.

    What a measurement's process says is not for `run_command` to explain: it may be of PyTorch.
    """

    def guarded() -> None:
        try:
            main()
        except MeasurementError as error:
            say(str(error))
            sys.exit(1)

    run_command(guarded)


def in_own_process(function: Callable[..., Any], *args: object) -> Any:
    """Calls a function where no other library's threads are."""
    with Worker(_once, function, args) as worker:
        worker.wait()
        return worker()


def _once(function: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: function(*args)


def say(text: str) -> None:
    """Tells on the standard error what is being done."""
    print(text, file=sys.stderr, flush=True)


def peak_memory() -> int:
    """The most main memory that this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> dict[str, Any]:
    """The processor, its cores, NVIDIA GPUs, and the versions that a measurement depends on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        cpu = models[0] if models else cpu
    packages = [name for name in ("jax", "torch", "transformers") if importlib.util.find_spec(name)]
    versions = {name: importlib.metadata.version(name) for name in packages}
    facts = {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version()}
    if shutil.which("nvidia-smi"):
        # Asked of the driver: JAX would take the memory that the measured processes need.
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")
        names = "; ".join(gpu.strip() for gpu in gpus if gpu.strip())
        # The tool is there on machines without a GPU, too.
        facts |= {"gpu": names} if names else {}
    return facts | versions


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        title: its head, with the unit.
        digits: after the point.
        scale: what the quantity is multiplied with, to be in that unit.
        ranged: whether of several turns the lowest and the highest are shown, too.
    """

    title: str
    digits: int = 1
    scale: float = 1.0
    ranged: bool = True

    def cell(self, value: Any) -> str:
        """A value as text; "" for None."""
        if value is None or isinstance(value, str):
            return value or ""
        if isinstance(value, (list, tuple)):
            # By turn: the middle one, and how far they lie apart.
            low, middle, high = (self.cell(f(value)) for f in (min, statistics.median, max))
            one = len(value) == 1 or not self.ranged
            return middle if one else f"{middle} ({low} to {high})"
        return f"{value * self.scale:,.{self.digits}f}"


COLUMNS = {
    "tokens_per_second": Column("tokens/s", 0, ranged=False),
    "milliseconds": Column("ms a step", 1),
    "mfu": Column("MFU %", 1, 100, ranged=False),
    "compile_seconds": Column("compile s", 1),
    "peak_bytes": Column("peak MiB", 0, 1 / 2**20),
    "seconds": Column("s", 2),
    "ratio": Column("times the peer", 2),
}
"""The quantities that several benchmarks have."""


@dataclass
class Report:
    """A benchmark's results: a table on the screen, JSON and a picture.

    Attributes:
        title: what was measured.
        settings: with which flags.
        rows: label -> quantity -> a number, a list of them by turn, or a text.
        notes: lines below the table, such as formulas.
        extra: what else goes into the JSON.
        measured: whether the figures are this machine's.
    """

    title: str
    settings: Any = None
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    measured: bool = True

    def add(self, label: str, **quantities: Any) -> None:
        """Adds to a row."""
        self.rows.setdefault(label, {}).update(quantities)

    def show(self, columns: Mapping[str, Column] | None = None) -> None:
        """Prints the table, with those columns that a row has something for."""
        from rich.console import Console
        from rich.table import Table

        columns = dict(COLUMNS) | dict(columns or {})
        used = {
            name: column
            for name, column in columns.items()
            if any(row.get(name) is not None for row in self.rows.values())
        }
        table = Table(title=self.title, title_justify="left", title_style="bold")
        table.add_column("")
        for column in used.values():
            table.add_column(column.title, justify="right")
        for label, row in self.rows.items():
            table.add_row(label, *(column.cell(row.get(name)) for name, column in used.items()))
        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(table)
        for note in self.notes:
            console.print(note, highlight=False, markup=False)
        if self.measured:
            line = ", ".join(f"{name} {value}" for name, value in machine().items())
            console.print(line, highlight=False, markup=False)

    def save(self, json_file: Path | None, png: Path | None, quantity: str) -> None:
        """Writes the files that were asked for.

        Args:
            json_file: everything.
            png: one quantity of each row, as bars.
            quantity: which.
        """
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        if png is not None:
            png.parent.mkdir(parents=True, exist_ok=True)
            title = COLUMNS[quantity].title if quantity in COLUMNS else quantity
            bars = {
                label: row[quantity]
                for label, row in self.rows.items()
                if isinstance(row.get(quantity), (int, float, list))
            }
            scale = COLUMNS[quantity].scale if quantity in COLUMNS else 1.0
            plot_bars(bars, self.title, title, png, scale)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        settings = {} if self.settings is None else vars(self.settings)
        shown = {
            name: value if isinstance(value, (int, float, bool)) or value is None else str(value)
            for name, value in settings.items()
        }
        facts = {"title": self.title, "machine": machine(), "settings": shown}
        return facts | {"rows": self.rows, "notes": self.notes} | self.extra


def plot_bars(
    bars: Mapping[str, float | Sequence[float]], title: str, axis: str, png: Path, scale: float = 1
) -> None:
    """Draws a bar for each value; of several by turn their median, and a line over their range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.45 * len(bars)), dpi=150, layout="constrained")
    axes = figure.subplots()
    for place, (label, value) in enumerate(bars.items()):
        several = [value] if isinstance(value, (int, float)) else value
        values = [one * scale for one in several]
        middle = statistics.median(values)
        axes.barh(place, middle, color=f"C{place}", height=0.65)
        if len(values) > 1:
            axes.plot([min(values), max(values)], [place, place], color="black", linewidth=1)
        axes.annotate(
            f"{middle:,.4g}",
            (max(values), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
        axes.text(0, place - 0.4, f" {label}", fontsize=8, va="bottom", ha="left")
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.set_ylim(len(bars) - 0.5, -0.6)
    axes.set_xlabel(axis)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_axisbelow(True)
    axes.grid(axis="x", alpha=0.25)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(png)
