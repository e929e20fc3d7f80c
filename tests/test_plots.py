"""Pictures show the numbers that they are given, whatever the labels, and change nothing else."""

import io
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.image
import matplotlib.text
import numpy as np
import pytest
from commands import Command
from on_devices import run_alone

from gptjax.config import preset
from gptjax.errors import UserError
from gptjax.evaluation.calibration import calibration
from gptjax.inspection import LogitLens
from gptjax.params import abstract_params, count_params
from gptjax.placements import placements, share
from gptjax.planning import plan
from gptjax.planning.topology import abstract_mesh
from gptjax.plots import (
    plot_attention,
    plot_logit_lens,
    plot_losses,
    plot_memory,
    plot_norms,
    plot_plan,
    plot_reliability,
    plot_sharding,
)
from gptjax.run_losses import losses_table, read_losses, read_metrics, run_labels
from gptjax.sharding import mesh_axes
from gptjax.tokenizer import CharTokenizer

ODD = ("_hidden", "$a$ and $b$", "中文 and 😀", "a\nb\t", "%s {} \\", "x" * 200)
"""Labels that matplotlib would leave out, take for formulas, or have no font for."""


@pytest.fixture(autouse=True)
def nothing_is_warned_of_or_changed() -> Iterator[None]:
    before = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert dict(matplotlib.rcParams) == before


def written(figure: Any, png: Path | None = None) -> bytes:
    """The picture as a notebook shows it, and that it is in the file where one was given."""
    if png is not None:
        assert png.read_bytes().startswith(b"\x89PNG")
    shown = figure._repr_png_()
    assert shown.startswith(b"\x89PNG")
    return shown


def texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


def write_run(folder: Path, rows: list[Any], summary: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def row(step: int, loss: float, **more: float) -> dict[str, float]:
    return {"step": step, "loss": loss, "tokens": 64.0, "tokens_per_second": 32.0, **more}


def test_metrics_of_a_run_that_was_killed_and_resumed(tmp_path: Path) -> None:
    """Steps 3 and 4 were gone through twice, and lines were cut short twice."""
    first = [row(1, 5.0), row(2, 4.0), row(3, 3.0), row(4, 2.0), '{"step": 5, "lo']
    second = [row(3, 3.5), row(4, 2.5), row(5, 1.5), "", "7", '{"loss": 1}', '{"st']
    rows = read_metrics(write_run(tmp_path / "run", first + second))
    assert [(r["step"], r["loss"]) for r in rows] == [(1, 5), (2, 4), (3, 3.5), (4, 2.5), (5, 1.5)]
    assert losses_table({"run": tmp_path / "run"}).splitlines()[1].split() == [
        *("run", "5", "1.5000", "none")
    ]


def test_losses_over_steps_tokens_and_seconds(tmp_path: Path) -> None:
    """Every second step is logged, the third of them skipped its update, one only evaluates."""
    rows = [row(2, 5.0), row(4, 4.0, val_loss=4.5), row(6, float("nan")), row(8, 3.0)]
    rows += [{"step": 9, "val_loss": 2.5}, row(10, 2.0, val_loss=2.75)]
    run = write_run(tmp_path / "run", rows)
    losses = read_losses(run)
    assert losses.steps == 10
    assert losses.best_step == 9
    np.testing.assert_array_equal(losses.train_x, [2, 4, 8, 10])
    np.testing.assert_array_equal(losses.train, [5, 4, 3, 2])
    np.testing.assert_array_equal(losses.validation_x, [4, 9, 10])
    np.testing.assert_array_equal(losses.validation, [4.5, 2.5, 2.75])
    over_tokens, over_seconds = read_losses(run, "tokens"), read_losses(run, "seconds")
    np.testing.assert_allclose(over_tokens.train_x, 64 * losses.train_x)
    np.testing.assert_allclose(over_tokens.validation_x, 64 * losses.validation_x)
    # 64 tokens a step at 32 a second.
    np.testing.assert_allclose(over_seconds.train_x, 2 * losses.train_x)
    # The run ended at step 5 in 20 seconds, and goes on.
    (run / "summary.json").write_text('{"steps": 5, "train_seconds": 20.0}')
    np.testing.assert_allclose(read_losses(run, "seconds").train_x, 4 * losses.train_x)
    (run / "summary.json").write_text('{"ste')
    np.testing.assert_allclose(read_losses(run, "seconds").train_x, 2 * losses.train_x)


def test_batches_and_rates_that_vary(tmp_path: Path, rng: np.random.Generator) -> None:
    tokens = rng.integers(10, 100, 20).astype(float)
    rates = rng.uniform(5, 50, 20)
    rows = [
        {"step": n + 1, "loss": 1.0, "tokens": tokens[n], "tokens_per_second": rates[n]}
        for n in range(20)
    ]
    run = write_run(tmp_path / "run", rows)
    np.testing.assert_allclose(read_losses(run, "tokens").train_x, np.cumsum(tokens))
    np.testing.assert_allclose(read_losses(run, "seconds").train_x, np.cumsum(tokens / rates))


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_losses(tmp_path / "none")
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        plot_losses(tmp_path)
    with pytest.raises(UserError, match="no steps yet"):
        plot_losses([write_run(tmp_path / "empty", ['{"step": 1, "lo'])])
    bare = write_run(tmp_path / "bare", [{"step": 1, "loss": 2.0}])
    assert read_losses(bare).train_x.tolist() == [1.0]
    with pytest.raises(UserError, match="does not tell tokens;"):
        read_losses(bare, "tokens")
    with pytest.raises(UserError, match="tokens and tokens_per_second"):
        read_losses(bare, "seconds")
    with pytest.raises(UserError, match="unknown x axis 'hours'"):
        read_losses(bare, "hours")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="no run is given"):
        plot_losses([])


def test_runs_have_names_that_tell_them_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "other"]
    names = ["a/run", "b/run", f"{tmp_path.name}/other"]
    assert run_labels(paths) == dict(zip(names, paths, strict=True))
    assert list(run_labels(paths[1:])) == ["run", "other"]
    with pytest.raises(UserError, match="twice"):
        run_labels([tmp_path / "other", tmp_path / "a" / ".." / "other"])


def test_the_picture_of_losses_shows_every_run(tmp_path: Path, rng: np.random.Generator) -> None:
    runs = {}
    for number, label in enumerate([*ODD, *"abcdef"]):
        rows = [row(n, float(rng.normal()), val_loss=1.0 + n) for n in range(1, 4)]
        runs[label] = write_run(tmp_path / str(number), rows)
    png = tmp_path / "losses.png"
    figure: Any = plot_losses(runs, png)
    [axes] = figure.axes
    # Of each run the losses, their moving average, and the validation losses.
    assert len(axes.lines) == 3 * len(runs)
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.lines[1::3]}
    assert len(looks) == len(runs)
    for number, run in enumerate(runs.values()):
        losses = read_losses(run)
        single, average, validation = axes.lines[3 * number : 3 * number + 3]
        np.testing.assert_array_equal(single.get_ydata(), losses.train)
        x, y = losses.train, average.get_ydata()
        assert y[0] == pytest.approx(x[0])
        assert y[1] == pytest.approx((0.95 * 0.05 * x[0] + 0.05 * x[1]) / (1 - 0.95**2))
        np.testing.assert_array_equal(validation.get_ydata(), [2, 3, 4])
    [legend] = figure.legends
    assert len(legend.get_texts()) == len(runs) + 2
    named = [text.get_text() for text in legend.get_texts()[: len(runs)]]
    assert all("4.0000" in text for text in named)
    assert named[1].startswith(r"\$a\$ and \$b\$")
    written(figure, png)
    # One step, none that counts, and a run as a plain path.
    written(plot_losses(write_run(tmp_path / "one", [row(1, 3.0)]), x="tokens"))
    written(plot_losses(write_run(tmp_path / "nan", [row(1, float("nan"))]), x="seconds"))


def test_plot_command(command: Command, tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", [row(1, 3.0), row(2, 2.0, val_loss=2.5), row(3, 1.0)])
    two = write_run(tmp_path / "two", [row(10, 2.0)])
    png = tmp_path / "picture.png"
    status, out, error = command("gptjax", "plot", one, two, "--png", png, "--x", "tokens")
    assert (status, error) == (0, "")
    lines = out.splitlines()
    assert lines[1].split() == ["one", "3", "1.0000", "2.5000", "at", "step", "2"]
    assert lines[2].split() == ["two", "10", "2.0000", "none"]
    assert lines[3] == f"the picture is written to {png}"
    assert png.read_bytes().startswith(b"\x89PNG")
    for arguments, says in [
        ((), "no run is given"),
        ((tmp_path,), "no metrics.jsonl"),
        ((one, one), "given twice"),
        ((one, "--x", "hours"), "invalid choice 'hours'"),
        ((one, "--png", tmp_path), "cannot write"),
        ((one, "--png", tmp_path / "none" / "x.png"), "cannot write"),
        ((one, "--png", tmp_path / "x.txt"), "does not end in .png"),
    ]:
        status, out, error = command("gptjax", "plot", *arguments)
        assert (status, out) == (2, "")
        assert says in error
        assert error.count("\n") == 1


def test_memory_by_kind(tmp_path: Path) -> None:
    gib = 2**30
    bars = {"closed form": {"parameters": 2.0 * gib, ODD[1]: 3.0 * gib}, "compiled": {ODD[1]: gib}}
    png = tmp_path / "memory.png"
    figure: Any = plot_memory(bars, 8.0 * gib, png)
    [axes] = figure.axes
    drawn = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert drawn == [(0, 2), (0, 0), (2, 3), (0, 1)]
    assert axes.lines[0].get_xdata() == [8, 8]
    assert axes.get_xlabel().startswith("GiB")
    written(figure, png)
    assert plot_memory({"x": {"all": 5 * 2**20}}).axes[0].get_xlabel().startswith("MiB")


def test_memory_of_plans(tmp_path: Path) -> None:
    config = preset("gpt3-175b")
    plans = {
        mesh: plan(config, topology="v5p:8x8x8", batch=512, mesh=mesh, compile=False)
        for mesh in ("fsdp=64,tensor=8", "fsdp=512")
    }
    first = plans["fsdp=64,tensor=8"]
    axes: Any = plot_plan(first).axes[0]
    total = sum(bar.get_width() for bar in axes.patches)
    assert total == pytest.approx(first.peak_bytes_per_chip / 2**30)
    axes = plot_plan(plans, tmp_path / "plans.png").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(plans)
    assert first.chip_bytes is not None
    assert axes.lines[0].get_xdata()[0] == pytest.approx(first.chip_bytes / 2**30)


def test_reliability(tmp_path: Path, rng: np.random.Generator) -> None:
    probabilities = rng.dirichlet(np.ones(3), 100)
    found = calibration(probabilities, rng.integers(0, 3, 100))
    png = tmp_path / "reliability.png"
    figure: Any = plot_reliability(dict.fromkeys(ODD, found.bins), png)
    axes, below = figure.axes
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), found.bins.accuracy)
    assert sum(below.lines[0].get_ydata()) == pytest.approx(1)
    written(figure, png)


def struct(shape: tuple[int, ...], mesh: Any, *spec: Any) -> jax.ShapeDtypeStruct:
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)


def test_where_parts_are_drawn(tmp_path: Path) -> None:
    """The filled rectangles, as fractions of their outlines."""
    mesh = abstract_mesh(mesh_axes("fsdp=4,tensor=2", 8))
    tree = {
        "a": struct((8, 8), mesh),
        "b": struct((8, 8), mesh, "fsdp", "tensor"),
        "c": struct((3, 8, 2, 5), mesh, None, None, ("tensor", "fsdp")),
        "d": struct((8,), mesh, "fsdp"),
        "e": struct((4, 2, 7), mesh, "fsdp", "tensor"),
    }
    png = tmp_path / "sharding.png"
    figure: Any = plot_sharding(tree, png, title="$x$ 中")
    filled, outlines = figure.axes[0].collections
    rectangles = [path.get_extents().bounds for path in filled.get_paths()]
    frames = [path.get_extents().bounds for path in outlines.get_paths()]
    assert len(rectangles) == len(frames) == 5 * 8
    # From the left and from the top, width and height.
    got = [
        ((x - left) / w, (y - top) / h, width / w, height / h)
        for (x, y, width, height), (left, top, w, h) in zip(rectangles, frames, strict=True)
    ]
    for device in range(8):
        f, t = divmod(device, 2)
        want = [
            (0, 0, 1, 1),
            (t / 2, f / 4, 1 / 2, 1 / 4),
            ((4 * t + f) / 8, 0, 1 / 8, 1),
            (f / 4, 0, 1 / 4, 1),
            # Two dimensions of the first half: parts inside parts.
            (0, f / 4 + t / 8, 1, 1 / 8),
        ]
        for number, rectangle in enumerate(want):
            np.testing.assert_allclose(got[8 * number + device], rectangle, atol=1e-9)
    shown = texts(figure)
    assert "8÷fsdp × 8÷tensor" in shown
    assert "3 × 8 × 2÷tensor÷fsdp × 5" in shown
    assert "32 bytes, 1/8" in shown
    written(figure, png)


def test_a_mesh_that_is_not_there() -> None:
    """GPT-3 on 512 chips: bytes are those of an even split, and any devices may be drawn."""
    config = preset("gpt3-175b")
    tree = abstract_params(config, abstract_mesh(mesh_axes("fsdp=64,tensor=8", 512)))  # pyright: ignore[reportArgumentType]
    found = placements(tree)
    assert len(found.devices) == 512
    assert found.coordinates["tensor"][:9] == (0, 1, 2, 3, 4, 5, 6, 7, 0)
    assert sum(tensor.size for tensor in found.tensors) == 4 * count_params(config)
    for tensor in found.tensors:
        leaf: Any = tree
        for name in tensor.name.split("."):
            leaf = leaf[name]
        held = np.prod(leaf.sharding.shard_shape(leaf.shape))
        assert tensor.bytes_on(found.devices[77]) == pytest.approx(4 * held)
        whole = sum(share(part) for part in tensor.held.values())
        assert whole == pytest.approx(round(whole))
    figure: Any = plot_sharding(tree, devices=(0, 511))
    assert "511" in texts(figure)
    assert "650 GiB in all, 1.27 GiB on each of 512 devices" in texts(figure)
    assert len(figure.axes[0].collections[0].get_paths()) == 2 * len(found.tensors)


ON_EIGHT = """
import sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import gptjax
from gptjax.params import abstract_params
from gptjax.placements import placements
from gptjax.planning.topology import abstract_mesh
from gptjax.sharding import mesh_axes

config = gptjax.preset("char-gpt-modern").replace(num_layers=4, embed_dim=64, num_experts=4)
for axes in ("dp", "fsdp", "fsdp=4,tensor=2", "stage=2,fsdp=2,tensor=2", "expert=4,fsdp=2"):
    mesh = gptjax.parse_mesh(axes)
    zeros = lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
    params = jax.tree.map(zeros, abstract_params(config, mesh))
    found = placements(params)
    assert list(found.devices) == list(mesh.devices.flat)
    for tensor, leaf in zip(found.tensors, jax.tree.leaves(params), strict=True):
        # What JAX itself says of the array on each device.
        for shard in leaf.addressable_shards:
            starts = [index.indices(n) for index, n in zip(shard.index, leaf.shape)]
            part = tuple((start / n, stop / n) for (start, stop, _), n in zip(starts, leaf.shape))
            assert tensor.held[shard.device] == part, (axes, tensor.name)
            assert tensor.bytes_on(shard.device) == shard.data.nbytes
    # The same without devices.
    other = placements(abstract_params(config, abstract_mesh(mesh_axes(axes, 8))))
    assert found.coordinates == other.coordinates
    for one, two in zip(found.tensors, other.tensors, strict=True):
        assert list(one.held.values()) == list(two.held.values())
        assert (one.name, one.split, one.size) == (two.name, two.split, two.size)
mesh = gptjax.make_mesh(fsdp=2, devices=jax.devices()[:2])
tree = {"pair": jax.device_put(np.ones(8, np.float32), NamedSharding(mesh, P("fsdp")))}
tree["alone"] = jax.device_put(np.ones((2, 3), np.float32), jax.devices()[5])
tree["step"], tree["key"] = jax.numpy.int32(1), jax.random.key(0)
found = placements(tree)
assert [device.id for device in found.devices] == [0, 1, 5]
assert found.coordinates == {"fsdp": (0, 1, None)}
sizes = {tensor.name: tensor.size for tensor in found.tensors}
assert sizes == {"pair": 32, "alone": 24, "step": 4, "key": 8}
figure = gptjax.plot_sharding(tree, "picture.png")
said = [text.get_text() for text in figure.axes[0].texts]
assert "68 bytes in all, at most 28 bytes on one of 3 devices" in said, said
assert "matplotlib.pyplot" not in sys.modules
print("done")
"""


def test_real_arrays_on_eight_devices(tmp_path: Path) -> None:
    assert run_alone(ON_EIGHT, tmp_path, devices=8) == "done\n"


def test_shardings_that_cannot_be_drawn() -> None:
    with pytest.raises(UserError, match=r"a\.b has no sharding"):
        plot_sharding({"a": {"b": np.ones(3)}})
    with pytest.raises(UserError, match="0 tensors"):
        plot_sharding({})
    with pytest.raises(UserError, match="65 tensors"):
        plot_sharding([jnp.zeros(1)] * 65)
    for devices in ((), (1,), (-1,)):
        with pytest.raises(UserError, match="some of 0 to 0"):
            plot_sharding(jnp.zeros(1), devices=devices)


def maps(rng: np.random.Generator, *shape: int) -> np.ndarray:
    T = shape[-1]
    scores = np.where(np.tri(T, dtype=bool), rng.normal(size=shape), -np.inf)
    weights = np.exp(scores)
    return weights / weights.sum(-1, keepdims=True)


def test_attention_maps(tmp_path: Path, rng: np.random.Generator) -> None:
    attention = maps(rng, 5, 6, 6)
    png = tmp_path / "attention.png"
    figure: Any = plot_attention(attention, ODD, png, title=ODD[2])
    images = [axes.images[0] for axes in figure.axes if axes.images and axes.get_title()]
    assert [axes.axes.get_title() for axes in images] == [f"head {n}" for n in range(5)]
    for image, expected in zip(images, attention, strict=True):
        np.testing.assert_allclose(image.get_array(), expected, rtol=1e-6)
    labels = [text.get_text() for text in images[0].axes.get_yticklabels()]
    assert labels[0] == " _hidden"
    assert labels[5] == "x" * 11 + "…"
    # Head 2 has no map below it, so that its tokens are named under it.
    named = [bool(i.axes.xaxis.get_tick_params().get("labelbottom", True)) for i in images]
    assert named == [False, False, True, True, True]
    written(figure, png)
    written(plot_attention(attention[0]))
    written(plot_attention(maps(rng, 1, 1)[None], ["a"]))


def test_attention_of_all_layers(rng: np.random.Generator) -> None:
    attention = maps(rng, 3, 4, 5, 5)
    figure: Any = plot_attention(attention, title="all")
    image = np.asarray(figure.axes[0].images[0].get_array().filled(np.nan))
    assert image.shape == (4 * 6 - 1, 3 * 6 - 1)
    for layer in range(3):
        for head in range(4):
            part = image[6 * head : 6 * head + 5, 6 * layer : 6 * layer + 5]
            np.testing.assert_allclose(part**2, attention[layer, head], atol=1e-6)
    assert np.isnan(image[5::6]).all()
    assert np.isnan(image[:, 5::6]).all()
    written(figure)


def test_the_logit_lens_names_tokens(tmp_path: Path, rng: np.random.Generator) -> None:
    tokenizer = CharTokenizer("$_中\n x")
    tokens = rng.integers(0, 6, (3, 2, 4, 2))
    lens = LogitLens(tokens, rng.uniform(size=(3, 2, 4, 2)).astype(np.float32))
    png = tmp_path / "lens.png"
    figure: Any = plot_logit_lens(lens, [0, 1, 2, 3], tokenizer, png, row=1, depths=(0, 5, 9))
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), lens.probabilities[:, 1, :, 0])
    shown = {"$": r"\$", "_": " _", "\n": "↵", " ": "·"}
    likeliest = [tokenizer.alphabet[i] for i in tokens[:, 1, :, 0].flat]
    expected = [shown.get(character, character) for character in likeliest]
    # A font may have the Chinese character, or not.
    got = [text.get_text().replace("\\u4e2d", "中") for text in axes.texts]
    assert got == expected
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "5", "9"]
    written(figure, png)
    for arguments in [([0, 1], None), ([0, 1, 2, 3], (0, 1))]:
        with pytest.raises(UserError, match="the lens has 4 and 3"):
            plot_logit_lens(lens, arguments[0], tokenizer, depths=arguments[1])
    wide = LogitLens(np.zeros((1, 1, 65, 1), int), np.zeros((1, 1, 65, 1)))
    with pytest.raises(UserError, match="at most 64"):
        plot_logit_lens(wide, [0] * 65, tokenizer)


def test_norms(tmp_path: Path, rng: np.random.Generator) -> None:
    norms = {"stream": rng.uniform(1, 9, (4, 5)), "_added": rng.uniform(1, 9, (3, 5))}
    png = tmp_path / "norms.png"
    figure: Any = plot_norms(norms, png)
    stream, first, added, _ = figure.axes[0].lines
    np.testing.assert_allclose(stream.get_ydata(), np.median(norms["stream"][:, 1:], axis=1))
    np.testing.assert_array_equal(first.get_ydata(), norms["stream"][:, 0])
    np.testing.assert_array_equal(stream.get_xdata(), [0, 1, 2, 3])
    np.testing.assert_array_equal(added.get_xdata(), [1, 2, 3])
    written(figure, png)
    written(plot_norms({"one token": norms["stream"][:, :1] * 1e6}))


def test_attention_that_cannot_be_drawn(rng: np.random.Generator) -> None:
    for shape in ((3,), (2, 3), (2, 3, 4), (0, 3, 3), (1, 1, 1, 3, 3)):
        with pytest.raises(UserError, match="give"):
            plot_attention(np.zeros(shape))
    with pytest.raises(UserError, match="2 labels for 3 tokens"):
        plot_attention(np.eye(3), ["a", "b"])


def test_a_notebook_shows_the_picture_once() -> None:
    """IPython finds the PNG of a figure by itself, at the size of the figure."""
    formatters = pytest.importorskip("IPython.core.formatters")
    figure: Any = plot_attention(np.eye(2))
    png = formatters.PNGFormatter()(figure)
    width, height = matplotlib.image.imread(io.BytesIO(png)).shape[1::-1]
    np.testing.assert_allclose((width, height), 100 * figure.get_size_inches(), atol=1)
