"""What a run tells: a line of metrics a step in files, and progress on the terminal."""

import contextlib
import html
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax.errors import UserError


class MetricsLog:
    """Writes metrics to `metrics.jsonl`, TensorBoard event files and, if asked, Weights & Biases.

    Args:
        out: the run folder.
        resume_step: lines after this step are dropped: the run goes through these steps again.
        settings: what W&B shows as the run's config.
        wandb_project: the W&B project to log to; None does not.
    """

    def __init__(
        self,
        out: Path,
        resume_step: int,
        settings: dict[str, Any],
        wandb_project: str | None = None,
    ):
        self._wandb = None
        if wandb_project is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            # The folder's name as the id, so that a resumed run goes on in the same chart.
            self._wandb = wandb.init(
                project=wandb_project, name=out.name, id=out.name, resume="allow", config=settings
            )
        from tensorboardX import SummaryWriter

        self._row: dict[str, float] = {}
        self._path = out / "metrics.jsonl"
        keep_steps(self._path, resume_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes metrics of a step; one step's make one line, which `flush` brings to the file."""
        if step != self._row.get("step"):
            self._write_row()
        self._row |= {"step": step, **metrics}
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def flush(self) -> None:
        """Brings what was written to the disk: the steps so far are complete."""
        self._write_row()
        self._file.flush()
        self._board.flush()

    def close(self) -> None:
        """Flushes and closes everything."""
        self._write_row()
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write_row(self) -> None:
        if self._row:
            self._file.write(json.dumps(self._row) + "\n")
        self._row = {}


class NoLog:
    """What the processes beside process 0 log to: nothing."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def require_wandb() -> None:
    """Raises the UserError that says that Weights & Biases is not installed, where it is not.

    Raises:
        UserError: if it is not installed.
    """
    if importlib.util.find_spec("wandb") is None:
        raise UserError("Weights & Biases is asked for but not installed; pip install wandb")


def keep_steps(path: Path, last: int) -> None:
    """Drops the lines of a JSONL file that belong to later steps, or were cut short by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            step = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
        if step <= last:
            kept.append(line + "\n")
    replacement = path.with_name(path.name + ".new")
    replacement.write_text("".join(kept), encoding="utf-8")
    os.replace(replacement, path)


class Progress:
    """A bar with a text beside it on a terminal and in a notebook; elsewhere a line now and then.

    A context manager. `show=False` prints nothing at all.

    Args:
        steps: of the whole.
        show: whether anything is printed.
        task: what is being done.
        unit: what a step is called.
    """

    def __init__(self, steps: int, show: bool = True, task: str = "training", unit: str = "step"):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self._show = show
        self._console = Console(highlight=False, quiet=not show)
        self._live = show and self._console.is_terminal
        self._inline = _InlineBar(steps, task) if show and self._console.is_jupyter else None
        self._last_line = time.monotonic()
        self._steps, self._unit = steps, unit
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._bar.add_task(task, total=steps, text="", start=True)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def message(self, text: str) -> None:
        """Prints a line above the bar; in a notebook below it."""
        if self._inline is not None:
            # As plain text: rich would give each line a block of its own.
            print(text)
            return
        self._console.print(text, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Shows what is waited for and, afterwards, how long it took."""
        start = time.monotonic()
        if self._live:
            from rich.progress import Progress as Bar
            from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

            self._bar.stop()
            spinner = Bar(
                SpinnerColumn(),
                TextColumn(f"{what} …"),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            with spinner:
                spinner.add_task(what, total=None)
                yield
            self._bar.start()
        elif self._inline is not None:
            self._inline.update(self._inline.step, f"{what} …")
            yield
        else:
            self.message(f"{what} …")
            yield
        self.message(f"{what} … {time.monotonic() - start:.1f} s")

    def update(self, step: int, text: str, every_seconds: float = 10.0) -> None:
        """Sets the bar to `step` of all, with a text beside it."""
        if self._live:
            self._bar.update(self._task, completed=step, text=text)
            return
        if self._inline is not None:
            self._inline.update(step, text)
            return
        now = time.monotonic()
        if now - self._last_line >= every_seconds or step == self._steps:
            self._last_line = now
            self.message(f"{self._unit} {step}/{self._steps}  {text}")


class _InlineBar:
    """A bar in a notebook's output, drawn anew in its place."""

    def __init__(self, steps: int, task: str):
        self._steps, self._task = steps, task
        self.step = 0
        self._handle: Any = None
        self._drawn = -math.inf

    def update(self, step: int, text: str, every_seconds: float = 0.5) -> None:
        """Draws the bar at `step`, but not oftener than a browser can follow."""
        self.step = step
        now = time.monotonic()
        if now - self._drawn < every_seconds and step != self._steps:
            return
        self._drawn = now
        line = f"{step}/{self._steps}  {text}".rstrip()
        shown = {
            "text/plain": f"{self._task} {line}",
            "text/html": f'{self._task} <progress value="{step}" max="{self._steps}"></progress> '
            f"<code>{html.escape(line)}</code>",
        }
        if self._handle is None:
            from IPython.display import display

            self._handle = display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)


def duration(seconds: float) -> str:
    """Seconds as people read them: "45 s", "3 min 20 s", "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def quantity(number: float) -> str:
    """A number with a metric prefix: "38.2 k", "1.20 M"."""
    for factor, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= factor:
            return f"{number / factor:.3g}{prefix}"
    return f"{number:.3g}"


def print_error(error: BaseException) -> None:
    """One line on standard error, without a traceback."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
