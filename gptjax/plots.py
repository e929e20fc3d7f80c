"""Pictures in one style: losses, memory, calibration, sharding, attention and what is inside.

Every function returns a matplotlib `Figure`, which a notebook shows where it ends a cell, and
writes it to a file where `png` is given. Lines are told apart by colours that colour-blind people
tell apart too (Okabe and Ito 2008), and never by colour alone where there is room for words.
"""

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptjax.errors import UserError
from gptjax.placements import Part, Placements, placements, share
from gptjax.run_losses import XAxis, read_losses, read_metrics, run_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gptjax.evaluation.calibration import Bins
    from gptjax.inspection import LogitLens
    from gptjax.planning.planner import Plan
    from gptjax.tokenizer import Tokenizer

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B", "#B8A600")
"""Of lines, bars and devices, in this order."""

# The first is matplotlib's own; the others, where they are installed, have the characters that it
# lacks.
_FAMILIES = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "SimHei",
    "Malgun Gothic",
    "Arial Unicode MS",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
)
_LARGEST_TABLE = 64
"""Rows of tensors, and positions of tokens, beyond which a picture is no longer readable."""
_CELL, _ROW = 0.52, 0.44
"""Width and height of a device's picture of a tensor, in inches."""
_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def _style() -> dict[str, Any]:
    """What all pictures look like, as matplotlib's settings."""
    from cycler import cycler

    return {
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.prop_cycle": cycler(color=COLORS),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.constrained_layout.use": True,
        "figure.dpi": 100,
        "font.family": list(_families()),
        "font.size": 9.5,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "savefig.dpi": 150,
    }


@contextlib.contextmanager
def _drawing(width: float, height: float, png: str | Path | None) -> "Iterator[Figure]":
    """An empty figure in the style, in inches, which is written when it is drawn."""
    import matplotlib

    with matplotlib.rc_context():
        # What a user or a notebook has set would mix with it.
        matplotlib.rcdefaults()
        for name, value in _style().items():
            matplotlib.rcParams[name] = value  # pyright: ignore[reportArgumentType]
        figure = _picture()(figsize=(width, height))
        yield figure
        if png is not None:
            figure.savefig(png)


@cache
def _picture() -> "type[Figure]":
    import io

    from matplotlib.figure import Figure

    class Picture(Figure):
        """A figure that a notebook shows, also where pyplot was never imported."""

        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=self.dpi)
            return file.getvalue()

    return Picture


@cache
def _families() -> tuple[str, ...]:
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return tuple(name for name in _FAMILIES if name in installed)


@cache
def _characters() -> frozenset[int]:
    """The code points that the fonts have."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = (get_font(findfont(FontProperties(family=[name]))) for name in _families())
    return frozenset(code for font in fonts for code in font.get_charmap())


def _drawable(text: str, longest: int = 60) -> str:
    """A text as a label: cut, without mathematics, and with code points for what no font has.

    Matplotlib would draw an empty box for each such character, and warn of it at every drawing.
    """
    known = _characters()
    # A legend leaves out what begins with an underscore.
    text = f" {text}" if text.startswith("_") else text
    text = "".join(c if ord(c) in known else c.encode("unicode_escape").decode() for c in text)
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return text.replace("$", r"\$")


def plot_losses(
    runs: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    png: str | Path | None = None,
    *,
    x: XAxis = "steps",
) -> "Figure":
    """Draws training and validation losses of one run, or of several to compare.

    Training losses are of single batches: faint as they are, and strong as a moving average.

    Args:
        runs: a run folder, several, or label -> run folder.
        png: the file to write.
        x: as for `read_losses`.

    Returns:
        The figure.

    Raises:
        UserError: as by `read_losses`, or if no run is given.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter

    if isinstance(runs, str | Path):
        runs = [runs]
    named = runs if isinstance(runs, Mapping) else run_labels(runs)
    if not named:
        raise UserError("no run is given; give at least one run folder")
    read = [(_drawable(str(label), 48), read_losses(run, x)) for label, run in named.items()]
    longest = max(len(label) for label, _ in read)
    columns = 3 if longest < 12 else 2 if longest < 28 else 1
    lines = math.ceil((len(read) + 2) / columns)
    with _drawing(7, 3.8 + 0.2 * lines, png) as figure:
        axes = figure.subplots()
        handles = []
        for number, (label, losses) in enumerate(read):
            color = COLORS[number % len(COLORS)]
            # Beyond the colours, other strokes.
            stroke = ("-", "-.", ":")[number // len(COLORS) % 3]
            point = "." if len(losses.train) == 1 else ""
            axes.plot(losses.train_x, losses.train, point, color=color, alpha=0.2, linewidth=0.7)
            smooth = _smoothed(losses.train)
            axes.plot(losses.train_x, smooth, stroke, marker=point, color=color, linewidth=1.4)
            axes.plot(
                losses.validation_x,
                losses.validation,
                color=color,
                linestyle="--",
                marker="o",
                markersize=3.5,
                linewidth=1.2,
            )
            told = ""
            if len(losses.validation):
                told = f"  (validation {losses.validation[-1]:.4f})"
            line: Any = {"color": color, "linestyle": stroke, "linewidth": 2}
            handles.append(Line2D([], [], label=label + told, **line))
        gray: Any = {"color": "#444444", "linewidth": 1.2}
        handles += [
            Line2D([], [], label="training, moving average", **gray),
            Line2D([], [], label="validation", linestyle="--", marker="o", markersize=3.5, **gray),
        ]
        names = {"steps": "step", "tokens": "tokens", "seconds": "seconds of training"}
        axes.set_xlabel(names[x])
        axes.set_ylabel("loss (nats per token)")
        if x == "tokens":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8.5)
    return figure


def _smoothed(values: np.ndarray, weight: float = 0.95) -> list[float]:
    """An exponential moving average, its start corrected as Adam's moments are."""
    smooth, average, mass = [], 0.0, 0.0
    for value in values:
        average = weight * average + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        smooth.append(average / mass)
    return smooth


def plot_memory(
    bars: Mapping[str, Mapping[str, float]],
    limit: float | None = None,
    png: str | Path | None = None,
) -> "Figure":
    """Draws where a chip's memory goes.

    Args:
        bars: label -> what for -> bytes; each label is a bar of its parts.
        limit: the chip's memory in bytes, drawn as a line; None draws none.
        png: the file to write.

    Returns:
        The figure.
    """
    most = max([sum(bar.values()) for bar in bars.values()] + [limit or 0])
    size, unit = _unit(most)
    with _drawing(7, 1.6 + 0.5 * len(bars), png) as figure:
        axes = figure.subplots()
        labels = [_drawable(label) for label in bars]
        parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
        for number, part in enumerate(parts):
            starts = [sum(bar.get(p, 0) for p in parts[:number]) / size for bar in bars.values()]
            widths = [bar.get(part, 0) / size for bar in bars.values()]
            if any(widths):
                sizes = ", ".join(f"{width:.2f}" for width in widths if width)
                # The numbers of many bars would not fit beside each other.
                label = f"{_drawable(part)} ({sizes})" if len(bars) <= 2 else _drawable(part)
                color = COLORS[number % len(COLORS)]
                axes.barh(labels, widths, left=starts, color=color, label=label, height=0.62)
        for place, bar in enumerate(bars.values()):
            total = sum(bar.values()) / size
            beside: Any = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            text = axes.annotate(f"{total:.2f}", (total, place), fontsize=8.5, **beside)
            # Where the line of the limit is near, it goes through no number.
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8})
        if limit is not None:
            axes.axvline(limit / size, color="black", linestyle="--", linewidth=1.2)
            axes.annotate(
                f"the chip's {limit / size:.2f}",
                (limit / size, 1.02),
                xycoords=("data", "axes fraction"),
                ha="right" if limit / size > 0.5 * axes.get_xlim()[1] else "left",
                va="bottom",
            )
        axes.set_xlim(right=1.12 * most / size)
        axes.invert_yaxis()
        axes.set_xlabel(f"{unit} a chip at the peak of a step")
        axes.grid(visible=False, axis="y")
        figure.legend(loc="outside lower center", ncols=3, fontsize=8.5)
    return figure


def plot_plan(plans: "Plan | Mapping[str, Plan]", png: str | Path | None = None) -> "Figure":
    """Draws where a chip's memory goes, by a plan or by several for the same chip.

    Args:
        plans: a plan, of which the closed form and, where there is one, the compiled program are
            drawn; or label -> plan.
        png: the file to write.

    Returns:
        The figure.
    """
    if isinstance(plans, Mapping):
        bars = {label: plan.memory for label, plan in plans.items()}
        limits = {plan.chip_bytes for plan in plans.values()}
        return plot_memory(bars, limits.pop() if len(limits) == 1 else None, png)
    bars = {"closed form": plans.estimate}
    if plans.compiled:
        bars["compiled"] = plans.memory
    return plot_memory(bars, plans.chip_bytes, png)


def _unit(size: float) -> tuple[int, str]:
    return next(((one, name) for one, name in _UNITS if size >= one), (1, "bytes"))


def _bytes(size: float) -> str:
    one, name = _unit(size)
    return f"{size / one:.3g} {name}" if size < 1000 * one else f"{size / one:.0f} {name}"


def plot_reliability(results: Mapping[str, "Bins"], png: str | Path | None = None) -> "Figure":
    """Draws how often a model is right by how sure it is, and how many items there are of each.

    The diagonal is a calibrated model; below it, a model is surer than it is right.

    Args:
        results: label -> bins, such as `Calibration.bins`.
        png: the file to write.

    Returns:
        The figure.
    """
    with _drawing(5, 5.6, png) as figure:
        axes, below = figure.subplots(2, sharex=True, height_ratios=(4, 1))
        axes.plot((0, 1), (0, 1), color="black", linestyle="--", linewidth=1, label="calibrated")
        for label, bins in results.items():
            text = f"{_drawable(label, 32)} (calibration error {bins.error:.4f})"
            marked: Any = {"marker": "o", "markersize": 3.5, "linewidth": 1.2}
            axes.plot(bins.confidence, bins.accuracy, label=text, **marked)
            below.plot(bins.confidence, bins.count / bins.count.sum(), **marked)
        axes.set_ylabel("share that is right")
        axes.set(xlim=(0, 1), ylim=(0, 1))
        below.set_ylabel("share of items")
        below.set_ylim(bottom=0)
        below.set_xlabel("probability of the likeliest answer")
        figure.legend(loc="outside lower center", ncols=1, fontsize=8.5)
    return figure


def plot_sharding(
    tree: Any,
    png: str | Path | None = None,
    *,
    devices: Sequence[int] | None = None,
    title: str = "",
) -> "Figure":
    """Draws which part of each tensor each device holds.

    A row for each tensor, a column for each device. In every cell the outline is the whole tensor,
    drawn as a matrix, and what is filled is the device's part; where all of it is filled in every
    column, the tensor is replicated. Dimensions in the first half of the shape run down, the others
    to the right; where several of one half are split, parts are drawn inside parts.

    Args:
        tree: arrays, or their shapes with shardings (`jax.ShapeDtypeStruct`, as
            `gptjax.training.abstract_state` gives them), in any tree. The mesh may be abstract: no
            device need be there.
        png: the file to write.
        devices: the places in the mesh of the devices to draw; None draws the first eight.
        title: above the picture.

    Returns:
        The figure.

    Raises:
        UserError: if the tree has no tensors or more than 64, one has no sharding, or a device is
            not in the mesh.
    """
    found = placements(tree)
    tensors, count = found.tensors, len(found.devices)
    if not 1 <= len(tensors) <= _LARGEST_TABLE:
        raise UserError(
            f"{len(tensors)} tensors are to be drawn; give a tree of 1 to {_LARGEST_TABLE}, such "
            "as the parameters of the blocks"
        )
    shown = list(range(min(8, count))) if devices is None else list(devices)
    if not shown or not all(0 <= device < count for device in shown):
        raise UserError(f"devices {shown}: give some of 0 to {count - 1}, their places in the mesh")
    labels = [_drawable(tensor.name, 44) for tensor in tensors]
    widest = max(len(text) for text in [*labels, *map(str, tensors)])
    left, right, top = max(1.3, 0.075 * widest), 1.35, 0.3 if title else 0.0
    head = top + 0.2 * (1 + len(found.coordinates)) + 0.06
    width, height = left + _CELL * len(shown) + right, head + _ROW * len(tensors) + 0.36
    with _drawing(width, height, png) as figure:
        # Everything in inches, from the upper left corner; nothing is left to be laid out.
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        if title:
            axes.text(0.08, 0.18, _drawable(title, 90), va="center", weight="bold")
        _draw_devices(axes, found, shown, left, top + 0.06)
        end = left + _CELL * len(shown) + 0.12
        axes.text(end, head - 0.1, "a device holds", va="center", fontsize=8)
        _draw_parts(axes, found, shown, left, head)
        for number, (tensor, label) in enumerate(zip(tensors, labels, strict=True)):
            y = head + _ROW * number
            axes.text(0.08, y + 0.14, label, va="center", fontsize=8.5)
            axes.text(0.08, y + 0.31, str(tensor), va="center", fontsize=7, color="#555555")
            most = max(map(share, tensor.held.values()))
            text = f"{_bytes(most * tensor.size)}{'' if most == 1 else f', {_fraction(most)}'}"
            axes.text(end, y + _ROW / 2, text, va="center", fontsize=8)
        held = [sum(tensor.bytes_on(device) for tensor in tensors) for device in found.devices]
        total = f"{_bytes(sum(tensor.size for tensor in tensors))} in all, " + (
            f"{_bytes(max(held))} on each of {count} devices"
            if min(held) == max(held)
            else f"at most {_bytes(max(held))} on one of {count} devices"
        )
        axes.text(0.08, height - 0.18, total, va="center", fontsize=8.5)
    return figure


def _draw_devices(
    axes: "Axes", found: Placements, shown: Sequence[int], left: float, y: float
) -> None:
    """The numbers of the devices, and under them their coordinates in the mesh."""
    numbers = [getattr(device, "id", device) for device in found.devices]
    for name, places in {"device": numbers, **found.coordinates}.items():
        axes.text(left - 0.1, y + 0.1, name, ha="right", va="center", fontsize=8)
        weight = "bold" if name == "device" else "normal"
        for column, device in enumerate(shown):
            text = "–" if places[device] is None else str(places[device])
            x = left + _CELL * (column + 0.5)
            axes.text(x, y + 0.1, text, ha="center", va="center", fontsize=8, weight=weight)
        y += 0.2


def _draw_parts(
    axes: "Axes", found: Placements, shown: Sequence[int], left: float, top: float
) -> None:
    """Outlines of the tensors, and in them what each device holds."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    outlines, parts = [], []
    for number, tensor in enumerate(found.tensors):
        for column, device in enumerate(shown):
            x, y = left + _CELL * column + 0.04, top + _ROW * number + 0.04
            w, h = _CELL - 0.08, _ROW - 0.08
            outlines.append(Rectangle((x, y), w, h))
            part = tensor.held.get(found.devices[device])
            if part is None:
                continue
            (upper, lower), (start, end) = _as_matrix(part, tensor.held.values())
            # One of very many parts would be too thin to be seen.
            tall, wide = max(lower - upper, 0.06), max(end - start, 0.05)
            corner = (x + min(start, 1 - wide) * w, y + min(upper, 1 - tall) * h)
            color = COLORS[column % len(COLORS)]
            parts.append(Rectangle(corner, wide * w, tall * h, color=color))
    axes.add_collection(PatchCollection(parts, match_original=True, linewidth=0))
    outline: Any = {"facecolor": "none", "edgecolor": "#999999", "linewidth": 0.7}
    axes.add_collection(PatchCollection(outlines, **outline))


def _as_matrix(
    part: Part, every: Collection[Part]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """From a part of each dimension to rows and columns of a matrix, as fractions."""
    split = [any(other[d] != (0.0, 1.0) for other in every) for d in range(len(part))]
    sides = [(0.0, 1.0), (0.0, 1.0)]
    for dimension, (start, end) in enumerate(part):
        if split[dimension]:
            across = len(part) == 1 or 2 * dimension >= len(part)
            low, high = sides[across]
            sides[across] = (low + start * (high - low), low + end * (high - low))
    return sides[0], sides[1]


def _fraction(part: float) -> str:
    parts = round(1 / part) if part else 0
    return f"1/{parts}" if parts and abs(part * parts - 1) < 1e-6 else f"{part:.0%}"


def plot_attention(
    attention: Any,
    labels: Sequence[str] | None = None,
    png: str | Path | None = None,
    *,
    title: str = "",
) -> "Figure":
    """Draws attention maps: the heads of one layer, or those of all layers as small pictures.

    A row of a map is a token that looks, a column one that is looked at. Of all layers the colours
    go by the root, so that faint attention is seen too.

    Args:
        attention: `[H, T, T]`, such as `inspection.attention[layer, row]`, or `[L, H, T, T]`, such
            as `inspection.attention[:, row]`; a single map may be `[T, T]`.
        labels: T texts, of the tokens, such as `token_labels` gives; not drawn for all layers.
        png: the file to write.
        title: above the picture.

    Returns:
        The figure.

    Raises:
        UserError: if these are no attention maps, or the labels are not as many as the tokens.
    """
    maps = np.asarray(attention, np.float32)
    maps = maps[None] if maps.ndim == 2 else maps
    T = maps.shape[-1]
    if maps.ndim not in (3, 4) or maps.shape[-2] != T or not maps.size:
        raise UserError(f"attention of shape {maps.shape}; give [T, T], [H, T, T] or [L, H, T, T]")
    if labels is not None and len(labels) != T:
        raise UserError(f"{len(labels)} labels for {T} tokens; give one for each")
    if maps.ndim == 4:
        return _plot_all_attention(maps, png, title)
    columns = min(len(maps), 4 if labels is None else 3)
    rows = math.ceil(len(maps) / columns)
    named = labels is not None and T <= _LARGEST_TABLE
    side = min(max(2.2, 0.17 * T if named else 0), 7.0)
    texts = [_drawable(label, 12) for label in labels or ()]
    room = 0.065 * max((len(text) for text in texts), default=0) if named else 0.3
    width = side * columns + room + 0.9
    with _drawing(width, side * rows + room + 0.25 * rows + 0.3, png) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        size = min(8.5, 72 * 0.85 * side / max(T, 1))
        image: Any = None
        for number, axes in enumerate(grid.flat):
            if number >= len(maps):
                axes.set_visible(False)
                continue
            image = axes.imshow(maps[number], cmap="Blues", vmin=0, vmax=1, aspect="equal")
            axes.grid(visible=False)
            if len(maps) > 1:
                axes.set_title(f"head {number}", fontsize=9)
            if named:
                axes.set_xticks(range(T), texts, rotation=90, fontsize=size)
                axes.set_yticks(range(T), texts, fontsize=size)
                # A column may be short of a map in the last row.
                axes.tick_params(labelbottom=number + columns >= len(maps), length=2)
        if title:
            figure.suptitle(_drawable(title, 80), fontsize=10)
        bar = figure.colorbar(image, ax=grid, shrink=min(0.8, 4 / (side * rows)), pad=0.02)
        bar.set_label("attention")
    return figure


def _plot_all_attention(maps: np.ndarray, png: str | Path | None, title: str) -> "Figure":
    L, H, T, _ = maps.shape
    # One image of all maps: hundreds of axes would take long to lay out.
    image = np.full((H * (T + 1), L * (T + 1)), np.nan, np.float32)
    image.reshape(H, T + 1, L, T + 1).transpose(2, 0, 1, 3)[:, :, :T, :T] = maps
    cell = min(0.8, 9 / max(L, H))
    with _drawing(cell * L + 1.6, cell * H + (1.0 if title else 0.7), png) as figure:
        axes = figure.subplots()
        # The root, since a shape is to be seen here and no number read.
        shown = axes.imshow(
            np.sqrt(image[:-1, :-1]),
            cmap="Blues",
            vmin=0,
            vmax=1,
            aspect="equal",
            interpolation="antialiased" if cell * 100 < T else "nearest",
        )
        step = max(1, math.ceil(0.18 / cell))
        for axis, count, name in ((axes.xaxis, L, "layer"), (axes.yaxis, H, "head")):
            numbers = range(0, count, step)
            axis.set_ticks([n * (T + 1) + (T - 1) / 2 for n in numbers], [str(n) for n in numbers])
            axis.set_label_text(name)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=8)
        if title:
            axes.set_title(_drawable(title, 80), fontsize=10)
        bar = figure.colorbar(shown, ax=axes, shrink=min(0.9, 3.5 / (cell * H)), pad=0.01)
        bar.set_ticks([math.sqrt(value) for value in (0, 0.1, 0.25, 0.5, 1)])
        bar.set_ticklabels(["0", "0.1", "0.25", "0.5", "1"])
        bar.set_label("attention")
    return figure


def plot_logit_lens(
    lens: "LogitLens",
    tokens: Sequence[int],
    tokenizer: "Tokenizer",
    png: str | Path | None = None,
    *,
    row: int = 0,
    depths: Sequence[int] | None = None,
    title: str = "",
) -> "Figure":
    """Draws what a model would say next if it ended after each block.

    A column is a token of the text, a row a depth, the last one on top. A cell has the likeliest
    next token, its colour the probability.

    Args:
        lens: as `gptjax.logit_lens` gives it.
        tokens: T ids, which were read.
        tokenizer: the model's.
        png: the file to write.
        row: of the batch.
        depths: how many blocks each of the lens's depths has passed; None counts from 0.
        title: above the picture.

    Returns:
        The figure.

    Raises:
        UserError: if the tokens or depths are not as many as the lens has, or there are more than
            64 tokens.
    """
    from gptjax.inspection import token_labels

    probabilities = lens.probabilities[:, row, :, 0]
    N, T = probabilities.shape
    depths = list(range(N)) if depths is None else list(depths)
    if len(tokens) != T or len(depths) != N:
        raise UserError(
            f"{len(tokens)} tokens and {len(depths)} depths, but the lens has {T} and {N}; give "
            "those that it was made of"
        )
    if T > _LARGEST_TABLE:
        raise UserError(f"{T} tokens do not fit a picture; give at most {_LARGEST_TABLE}")
    predicted = [token_labels(tokenizer, line) for line in lens.tokens[:, row, :, 0]]
    with _drawing(1.5 + 0.68 * T, 1.3 + 0.24 * N + (0.2 if title else 0), png) as figure:
        axes = figure.subplots()
        image = axes.imshow(
            probabilities, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower"
        )
        for depth in range(N):
            for place in range(T):
                dark = probabilities[depth, place] > 0.55
                axes.text(
                    place,
                    depth,
                    _drawable(predicted[depth][place], 9),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if dark else "black",
                    clip_on=True,
                )
        texts = [_drawable(text, 12) for text in token_labels(tokenizer, tokens)]
        axes.set_xticks(range(T), texts, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(N), [str(depth) for depth in depths])
        axes.tick_params(labelsize=8, length=2)
        axes.set_xlabel("token that was read")
        axes.set_ylabel("blocks passed")
        axes.grid(visible=False)
        if title:
            axes.set_title(_drawable(title, 90), fontsize=10)
        figure.colorbar(image, ax=axes, pad=0.01).set_label("probability")
    return figure


def plot_norms(norms: Mapping[str, Any], png: str | Path | None = None) -> "Figure":
    """Draws how long the residual stream is at each depth, and what each layer adds.

    Solid is the median over the tokens after the first; dotted the first token, which many models
    make very long, as a place for attention that is not needed (Xiao et al. 2023).

    Args:
        norms: label -> lengths `[N, T]`, as `Inspection.norms` gives them. Those of fewer rows, as
            what L layers add beside L + 1 depths, end at the same depth.
        png: the file to write.

    Returns:
        The figure.
    """
    from matplotlib.lines import Line2D

    arrays = {label: np.asarray(values, float) for label, values in norms.items()}
    depth = max(len(values) for values in arrays.values())
    with _drawing(7, 4.2, png) as figure:
        axes = figure.subplots()
        handles = []
        for number, (label, values) in enumerate(arrays.items()):
            x = np.arange(depth - len(values), depth)
            color = COLORS[number % len(COLORS)]
            marker = ("o", "s", "^", "D")[number % 4]
            rest = values[:, 1:] if values.shape[1] > 1 else values
            drawn: Any = {"color": color, "marker": marker, "markersize": 3.5, "linewidth": 1.3}
            axes.plot(x, np.median(rest, axis=1), **drawn)
            axes.plot(x, values[:, 0], ":", color=color, linewidth=1.3)
            handles.append(Line2D([], [], label=_drawable(label), **drawn))
        handles.append(Line2D([], [], label="the first token", color="#444444", linestyle=":"))
        axes.set_yscale("log")
        _plain_log_ticks(axes)
        axes.set_xlabel("blocks passed")
        axes.set_ylabel("length of the vector")
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8.5)
    return figure


def _plain_log_ticks(axes: "Axes") -> None:
    """Numbers as they are, not powers of ten, and some between the powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    between = (1.0, 2.0, 5.0) if math.log10(high / low) < 3 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=between))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


__all__ = [
    "COLORS",
    "plot_attention",
    "plot_logit_lens",
    "plot_losses",
    "plot_memory",
    "plot_norms",
    "plot_plan",
    "plot_reliability",
    "plot_sharding",
    "read_metrics",
]
