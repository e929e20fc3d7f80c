"""The benchmark scripts: what they measure adds up, in small; how they fail and go on."""

import importlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import REPOSITORY, Command
from processes import all_end

import gptjax
from gptjax import command_line
from gptjax.devices import CHIPS
from gptjax.params import count_params, flops_per_token

BENCHMARKS = REPOSITORY / "experiments" / "benchmarks"
LIMIT_SECONDS = 600
SMALL = ("--turns", "2", "--warmup", "1", "--steps", "3")

PEER = """
from dataclasses import dataclass

import torch


@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool


class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.table = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("what a peer prints")
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas)

    def forward(self, x, y):
        logits = self.table(x) @ self.table.weight.T
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
"""

PEER_RUN = """
import sys, time

for step, loss in ((0, 4.2), (2, 3.9), (4, 1.4)):
    print(f"step {step}: train loss 1.0, val loss {loss:.4f}", flush=True)
    # The first has an evaluation in it.
    for number, ms in enumerate((900, 30, 40)):
        print(f"iter {step + number}: loss 2.0, time {ms}.00ms, mfu 1.00%", flush=True)
    time.sleep(0.2)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def scripts_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def load(name: str) -> Any:
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    shape = {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 4, "n_head": 2}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"} | shape))
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands for nanoGPT: its interface, and a run that prints as its own does."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "model.py").write_text(PEER)
    (folder / "train.py").write_text(PEER_RUN)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "input.txt"
    path.write_text("".join(np.random.default_rng(3).choice(list("abcdef \n"), 900)))
    return path


def run(name: str, tmp_path: Path, *args: object) -> tuple[dict[str, Any], str]:
    """Runs a script as people start it: its JSON, and what it printed."""
    out, png = tmp_path / f"{name}.json", tmp_path / f"{name}.png"
    environment = os.environ | {
        "PYTHONPATH": str(Path(gptjax.__file__).parents[1]),
        "JAX_PLATFORMS": "cpu",
        "GPTJAX_CACHE": str(tmp_path / "cache"),
        "NO_COLOR": "1",
    }
    done = subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", *map(str, args), "--json", out, "--png", png],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert png.stat().st_size > 5000
    values = json.loads(out.read_text())
    assert values["machine"]["jax"]
    return values, done.stdout


class StandIn:
    """What a test's own measurement process need not do."""

    def __enter__(self) -> "StandIn":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass


def test_training_measures_in_turns_with_its_peers(tmp_path: Path, model: Path, clone: Path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    size = ("--model", model, "--batch-size", 4, "--accumulate", 2, "--dtype", "float32")
    peers = ("--nanogpt", clone, "--transformers", "True", "--matrix-rate", 1e9)
    trace = ("--profile", tmp_path / "trace")
    values, printed = run("training", tmp_path, *size, *SMALL, *peers, *trace)
    assert set(values["rows"]) == {"gptjax", "nanoGPT", "transformers"}
    assert "what a peer prints" not in printed
    config = load("training").read_model(str(model))
    assert values["flops_per_token"] == flops_per_token(config)
    for row in values["rows"].values():
        for rate, middle, mfu in zip(
            row["tokens_per_second"], row["milliseconds"], row["mfu"], strict=True
        ):
            assert rate == pytest.approx(4 * 16 / middle * 1e3)
            assert mfu == pytest.approx(rate * flops_per_token(config) / values["peak_flops"])
        assert len(row["milliseconds"]) == 2
        assert all(a <= b for a, b in zip(row["fastest"], row["milliseconds"], strict=True))
        assert row["peak_bytes"] > 2**24
    rates = {name: row["tokens_per_second"] for name, row in values["rows"].items()}
    expected = [a / b for a, b in zip(rates["gptjax"], rates["nanoGPT"], strict=True)]
    assert values["rows"]["gptjax"]["ratio_nanoGPT"] == pytest.approx(expected)
    inverse = values["step_time_ratio"]["nanoGPT"]["median"]
    assert [1 / ratio for ratio in inverse] == pytest.approx(expected)
    assert 0 < min(values["profile"]["explained"]) <= 1
    assert len(values["profile"]["costliest"]) == 10
    assert "costliest operations" in printed
    assert "MFU = tokens/s ×" in printed


def test_each_way_to_unroll_is_a_row(tmp_path: Path, model: Path):
    size = ("--model", model, "--batch-size", 2, "--scan-unroll", 1, 4, "--remat", "none", "full")
    values, _ = run("training", tmp_path, *size, *SMALL)
    assert len(values["rows"]) == 4
    assert "gptjax, remat full, 4 blocks a turn" in values["rows"]


def test_8_bit_floats_are_a_row(tmp_path: Path, model: Path):
    size = ("--model", model, "--batch-size", 2, "--float8", "False", "True")
    values, _ = run("training", tmp_path, *size, *SMALL)
    assert list(values["rows"]) == ["gptjax", "gptjax, float8"]
    rates = [np.median(row["tokens_per_second"]) for row in values["rows"].values()]
    assert load("gpu").float8_rate(values) == pytest.approx(rates[1] / rates[0])
    assert load("gpu").float8_rate({}) is None


def test_times_to_the_same_loss():
    compared = load("shakespeare").time_to_same_loss
    one = {"curve": [(1, 4.0, 0), (2, 3.0, 10), (3, 2.0, 20), (4, 2.5, 30)], "step_seconds": 1.0}
    other = {"curve": [(1, 4.1, 0), (9, 2.2, 10), (9, 2.1, 40), (9, 2.3, 50)], "step_seconds": 0.4}
    assert compared(one, other) == (2.1, pytest.approx(40 * 0.4 / 20))
    assert compared(one | {"curve": [(1, 4.0, 0)]}, other) is None
    assert compared(one, other | {"step_seconds": None}) is None


def test_the_first_way_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch, model: Path):
    training = load("training")
    asked = []

    class Scarce(StandIn):
        def __init__(self, _: Any, recipe: Any, environment: Any):
            self.recipe = recipe

        def wait(self) -> None:
            asked.append((self.recipe.accumulate, self.recipe.model.remat))
            if self.recipe.accumulate < 4 or self.recipe.model.remat == "none":
                raise training.DoesNotFitError("RESOURCE_EXHAUSTED")

        def __call__(self, steps: int) -> dict[str, Any]:
            facts = {"device": "one", "kind": "none", "devices": 1, "peak_flops": 1e9}
            times = {"milliseconds": [1.0] * steps, "compile_seconds": 1.0, "peak_bytes": 1}
            return facts | times

    monkeypatch.setattr(training, "Worker", Scarce)
    ways = {"accumulate": (2, 4, 8), "remat": ("none", "dots"), "first_that_fits": True}
    settings = training.Settings(model=str(model), batch_size=8, **ways)
    report, fitted = training.measure(settings)
    # Rows are given up before anything is computed again.
    assert asked == [(2, "none"), (4, "none"), (8, "none"), (2, "dots"), (4, "dots")]
    assert [(r.accumulate, r.model.remat) for r in fitted.values()] == [(4, "dots")]
    assert next(iter(report.rows.values()))["tokens_per_second"] == "does not fit"
    with pytest.raises(gptjax.UserError, match="does not fit in memory"):
        training.measure(training.Settings(model=str(model), batch_size=8))


def test_a_peer_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, model: Path, clone: Path, tmp_path: Path
):
    training = load("training")
    closed, tried = [], []

    class Worker(StandIn):
        """nanoGPT runs out of memory, then breaks in its second turn; transformers never starts."""

        def __init__(self, build: Any, recipe: Any, *_: Any, environment: Any = None):
            self.build, self.recipe, self.calls = build.__name__, recipe, 0

        def close(self) -> None:
            closed.append(self.build)

        def wait(self) -> None:
            tried.append((self.build, self.recipe.accumulate))
            if self.build == "nanogpt_run" and self.recipe.accumulate < breaks_at:
                raise training.DoesNotFitError("OutOfMemoryError")
            if self.build == "transformers_run":
                raise training.MeasurementError("BackendCompilerFailed: backend='inductor'")

        def __call__(self, steps: int) -> dict[str, Any]:
            self.calls += 1
            if self.build == "nanogpt_run" and self.calls == 2 and breaks:
                raise training.MeasurementError("it ended with status -11")
            facts = {"device": "one", "kind": "none", "devices": 1, "peak_flops": 1e9}
            times = {"milliseconds": [2.0] * steps, "compile_seconds": 1.0, "peak_bytes": 1}
            return facts | times

    monkeypatch.setattr(training, "Worker", Worker)
    given = {"batch_size": 8, "accumulate": (2, 4, 8), "first_that_fits": True, "turns": 2}
    peers = {"nanogpt": clone, "transformers": True}
    settings = training.Settings(model=str(model), **given, **peers)
    breaks_at, breaks = 4, False
    report, fitted = training.measure(settings)
    # Each tries the same rows, and has those that fit.
    assert tried == [
        ("gptjax_run", 2),
        ("nanogpt_run", 2),
        ("nanogpt_run", 4),
        ("transformers_run", 2),
    ]
    assert closed == ["nanogpt_run", "transformers_run"]
    [ours] = fitted
    assert report.rows[ours]["ratio_nanoGPT"] == [1.0, 1.0]
    assert "ratio_transformers" not in report.rows[ours]
    assert report.extra["failed"] == {
        "transformers": "BackendCompilerFailed: backend='inductor'",
    }
    assert any("rows at once 4 / 2" in note for note in report.notes)
    breaks = True
    report, fitted = training.measure(settings)
    [ours] = fitted
    assert len(report.rows[ours]["milliseconds"]) == 2
    assert "ratio_nanoGPT" not in report.rows[ours]
    assert report.extra["failed"]["nanoGPT"] == "it ended with status -11"
    breaks_at, breaks = 99, False
    report, _ = training.measure(settings)
    assert report.extra["failed"]["nanoGPT"] == "OutOfMemoryError"
    report.show(training.COLUMNS)
    report.save(tmp_path / "a.json", tmp_path / "a.png", "tokens_per_second")
    assert json.loads((tmp_path / "a.json").read_text())["failed"] == report.extra["failed"]


def test_generation_goes_on_without_its_peer(monkeypatch: pytest.MonkeyPatch):
    generation = load("generation")
    fails: tuple[str, str] = ("", "")

    class Worker(StandIn):
        def __init__(self, build: Any, name: str, *_: Any, environment: Any = None):
            self.name, self.calls = name, 0

        def wait(self) -> None:
            if fails == (self.name, "starting"):
                raise generation.MeasurementError("ImportError")

        def __call__(self) -> dict[str, float]:
            self.calls += 1
            if fails == (self.name, "running") and self.calls == 2:
                raise generation.MeasurementError("it ended with status -11")
            return {"rate": 2.0}

    monkeypatch.setattr(generation, "Worker", Worker)
    names = [generation.GPTJAX, generation.TRANSFORMERS]
    turns = [{"rate": 2.0}] * 3
    assert generation.measure(names, generation.Settings(), 8) == (dict.fromkeys(names, turns), {})
    for when, reason in (("starting", "ImportError"), ("running", "it ended with status -11")):
        fails = (generation.TRANSFORMERS, when)
        found, failures = generation.measure(names, generation.Settings(), 8)
        assert found == {generation.GPTJAX: turns}
        assert failures == {generation.TRANSFORMERS: reason}
        fails = (generation.GPTJAX, when)
        with pytest.raises(generation.MeasurementError, match=reason):
            generation.measure(names, generation.Settings(), 8)


def test_a_process_that_dies_is_not_short_of_memory(
    monkeypatch: pytest.MonkeyPatch, model: Path, capsys: pytest.CaptureFixture[str]
):
    measuring, training = load("measuring"), load("training")
    with measuring.Worker(answer, "a") as worker:
        worker.wait()
        with pytest.raises(measuring.MeasurementError, match="status 3") as failed:
            worker(98)
        assert not isinstance(failed.value, measuring.DoesNotFitError)
        # Nor is it later, when nothing takes what is sent.
        with pytest.raises(measuring.MeasurementError, match="status 3"):
            worker(1)
    asked = []

    def build(_: Any, recipe: Any, **__: Any) -> Any:
        asked.append(recipe.accumulate)
        raise measuring.MeasurementError("it ended with status -11, backend")

    monkeypatch.setattr(training, "Worker", build)
    # Other tests have started JAX in this process.
    monkeypatch.setattr(command_line, "configure_jax", lambda: None)
    settings = training.Settings(
        model=str(model), batch_size=8, accumulate=(2, 4), first_that_fits=True
    )
    with pytest.raises(SystemExit) as end:
        measuring.run_benchmark(lambda: training.measure(settings))
    assert (end.value.code, asked) == (1, [2])
    error = capsys.readouterr().err
    assert "status -11" in error
    assert "doctor" not in error


def answer(value: Any) -> Any:
    """What a worker's process builds."""
    if value == "too large":
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory allocating")
    calls = []

    def function(more: int) -> tuple[Any, int, int]:
        if more < 0:
            raise ValueError("below zero")
        if more == 98:
            os._exit(3)
        if more == 99:
            os.kill(os.getpid(), 9)
        calls.append(more)
        return value, len(calls), os.getpid()

    return function


def test_workers_are_processes_that_stay(monkeypatch: pytest.MonkeyPatch):
    measuring = load("measuring")
    with measuring.Worker(answer, "a") as a, measuring.Worker(answer, "b") as b:
        a.wait()
        b.wait()
        found = measuring.in_turns({"a": a, "b": b}, 2, 5)
        assert [(value, call) for value, call, _ in found["a"]] == [("a", 1), ("a", 2)]
        processes = {process for turns in found.values() for _, _, process in turns}
        assert len(processes) == 2
        assert os.getpid() not in processes
        with pytest.raises(RuntimeError, match="below zero"):
            a(-1)
        with pytest.raises(measuring.DoesNotFitError, match="status -9"):
            b(99)
    large = measuring.Worker(answer, "too large")
    with large, pytest.raises(measuring.DoesNotFitError, match="RESOURCE_EXHAUSTED"):
        large.wait()


def test_mistakes_are_one_line(tmp_path: Path, model: Path, text: Path, command: Command):
    for name, args, parts in [
        ("training", ["--turns", 0], ("turns is 0",)),
        ("training", ["--nanogpt", tmp_path], ("no model.py",)),
        ("training", ["--model", "gpt-2"], ("'gpt-2'", "'gpt2'")),
        ("training", ["--peer-accumulate", 0], ("(0) is 0",)),
        ("training", ["--peer-accumulate", 5], ("batch_size 12", "5 microbatches")),
        ("training", ["--accumulate", 5], ("batch_size 12", "5 microbatches")),
        ("roofline", ["--chip", "h10"], ("'h10'", "'h100'")),
        ("roofline", ["--chip", "l4"], ("memory rate",)),
        ("gpu", ["--out", tmp_path / "o", "--only", "gpt-2"], ("'gpt-2'", "'gpt2'")),
        ("gpu", ["--out", tmp_path / "o", "--data", tmp_path / "x"], ("is not there",)),
        ("shakespeare", ["--data", tmp_path / "x"], ("is not there",)),
        ("shakespeare", ["--data", text, "--nanogpt", tmp_path], ("no train.py",)),
        ("shakespeare", ["--data", text, "--width", 100], ("multiple of 64",)),
        ("shakespeare", ["--data", text, "--width", 64, "--tiny", "True"], ("gptjax alone",)),
        ("start_up", ["--turns", 0], ("turns is 0",)),
        ("loading", ["--turns", 0], ("turns is 0",)),
        ("scaling", ["--batches", 4], ("two or more",)),
    ]:
        status, _, error = command(f"benchmarks/{name}", *args)
        assert (status, error.count("\n")) == (2, 1), (name, args, error)
        for part in parts:
            assert part in error, (part, error)


def test_a_roofline_counts_what_a_model_needs(rng: np.random.Generator):
    roofline = load("roofline")
    heads = int(rng.integers(1, 5)) * 2
    config = gptjax.ModelConfig(
        vocab_size=int(rng.integers(10, 999)),
        num_layers=int(rng.integers(1, 9)),
        embed_dim=heads * 8 * int(rng.integers(1, 5)),
        num_heads=heads,
        num_kv_heads=2,
        gated_mlp=bool(rng.integers(2)),
    )
    rows, context = int(rng.integers(1, 9)), int(rng.integers(2, 99))
    found = roofline.operations(config, rows, context)
    tokens = rows * context
    # Twelve for full attention, forward and backward, are seven for half of it with the scores
    # computed again.
    attention = config.num_layers * config.num_heads * config.head_width * context
    needed = (flops_per_token(config, context) - (12 - 7) * attention) * tokens
    assert sum(operation.flops for operation in found) == pytest.approx(needed)
    [optimizer] = [o.moved for o in found if o.part == "optimizer"]
    assert optimizer == 32 * count_params(config)
    # A step with more microbatches reads the weights more often, and computes the same.
    more = roofline.operations(config, rows, context, accumulate=4)
    assert sum(o.flops for o in more) == pytest.approx(needed)
    assert sum(o.moved for o in more) > sum(o.moved for o in found)
    again = roofline.operations(config.replace(remat="full"), rows, context)
    blocks = sum(o.flops for o in found if o.part in ("attention", "mlp"))
    scores = 7 * attention * tokens
    extra = (blocks - scores) / 3 + scores * 2 / 7
    assert sum(o.flops for o in again) == pytest.approx(needed + extra)
    chip = CHIPS["h100"]
    report = roofline.report(config, chip, rows, context, 1, {"mlp": 2.0, "other": 1.0})
    assert report.rows["sum"]["measured"] == 3
    assert report.rows["sum"]["flops"] == pytest.approx(needed)
    assert report.rows.pop("other") == {"measured": 1.0}
    for row in report.rows.values():
        assert row["least"] >= max(row["compute"], row["memory"]) * (1 - 1e-9)
        assert row["least"] <= row["compute"] + row["memory"] + 1e-12


def test_several_turns_are_shown_by_their_middle():
    column = load("measuring").Column("ms", 1, 1e3)
    assert column.cell([0.004, 0.001, 0.003]) == "3.0 (1.0 to 4.0)"
    assert column.cell([0.004]) == column.cell(0.004) == "4.0"
    assert column.cell(None) == ""
    assert load("measuring").Column("s", 0, ranged=False).cell([1.0, 2000.0, 3.0]) == "3"


def test_cost_over_depth_and_batch(tmp_path: Path):
    size = ("--width", 16, "--context", 8, "--layers", 1, "--steps", 2)
    values, printed = run("scaling", tmp_path, *size, "--depths", 2, "--batches", 1, 3)
    [row] = values["rows"].values()
    assert row["per_layer"] == pytest.approx(row["tokens_per_second"] * 2)
    one, three = (row["peak_bytes"] for row in values["memory"].values())
    assert one < three
    assert values["memory"]["batch 3"]["slope"] == (three - one) / 2
    assert "Over batch" in printed


def test_one_command_goes_on_where_it_was(tmp_path: Path, command: Command):
    gpu = load("gpu")
    out = tmp_path / "out"

    def start(*parts: str) -> str:
        given = ("--small", "True", "--out", out, "--only", *parts)
        done = subprocess.run(
            [sys.executable, BENCHMARKS / "gpu.py", *given],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "GPTJAX_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "matrix-rate: done\n" in start("matrix-rate", "shakespeare")
    before = (out / "matrix-rate.json").read_bytes()
    assert "matrix-rate: done before" in start("matrix-rate", "gpt2-medium")
    assert (out / "matrix-rate.json").read_bytes() == before
    states = json.loads((out / "parts.json").read_text())["parts"]
    assert "--data" in states["shakespeare"]["state"]
    report = json.loads((out / "report.json").read_text())
    rate = report["results"]["matrix-rate"]["matrix_rate"]
    [found] = [g for g in report["goals"] if g["goal"].startswith("GPT-2 350M")]
    rows = report["results"]["gpt2-medium"]["rows"]
    [row] = [row for row in rows.values() if "mfu" in row]
    flops = report["results"]["gpt2-medium"]["flops_per_token"]
    middle = np.median(row["tokens_per_second"])
    assert found["found"] == pytest.approx(middle * flops / rate)
    assert found["reached"] is bool(found["found"] >= 0.55)
    text = (out / "report.md").read_text()
    assert "GPT-2 350M" in text
    assert "not measured" in text
    assert "shrunk" in text
    names = [part.name for part in gpu.parts(gpu.Settings(out=out))]
    assert len(set(names)) == len(names)
    assert {goal.part for goal in gpu.GOALS} <= set(names)
    with tarfile.open(out / "results.tar.gz") as archive:
        packed = set(archive.getnames())
    ran = {f"{n}.{end}" for n in ("matrix-rate", "gpt2-medium") for end in ("json", "png", "log")}
    assert packed == {"report.md", "report.json"} | ran
    # What was measured with other settings is not mixed with these.
    status, _, error = command("benchmarks/gpu", "--out", out, "--only", "matrix-rate")
    assert (status, error.count("\n")) == (2, 1)
    assert "was begun with" in error
    # A part that fails now has no result from before.
    settings = gpu.Settings(out=out, small=True)
    failing = gpu.Part("matrix-rate", "matrix_rate.py", ("--width", "none"), 60)
    assert gpu.run_part(failing, settings, 60).startswith("failed")
    assert gpu.read(settings, "matrix-rate") == {}


def test_the_parts_that_matter_most_have_time(tmp_path: Path):
    gpu = load("gpu")
    settings = gpu.Settings(out=tmp_path)
    first = gpu.chosen(settings)[:4]
    assert [part.name for part in first] == ["backends", "matrix-rate", "gpt2", "gpt2-xl"]
    assert sum(part.limit for part in first) <= settings.seconds <= 540


def test_only_kernels_count_as_agreeing():
    agreeing = load("gpu").agreeing
    plain = {"backend": "plain", "ok": True}
    good, bad, unknown = ({"backend": "cudnn", "ok": ok} for ok in (True, False, None))
    assert agreeing({}) is None
    assert agreeing([plain, plain]) == 0
    assert agreeing([plain, unknown]) == 0
    assert agreeing([plain, good, unknown]) == 1
    assert agreeing([plain, good, bad]) == 0.5


def test_a_case_of_attention_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch):
    backends = load("attention_backends")
    exact, calls = backends._check_exactly, []

    def check(case: Any, rng: Any) -> Any:
        calls.append(case)
        if len(calls) == 1:
            raise ValueError("no engine " * 100)
        return exact(case, rng)

    monkeypatch.setattr(backends, "SMALL", backends.SMALL[2:])
    monkeypatch.setattr(backends, "_check_exactly", check)
    failed, *others = backends.check_backends(turns=1)
    assert failed["ok"] is False
    assert failed["reason"].startswith("ValueError: no engine")
    assert len(failed["reason"]) == 300
    assert [row["ok"] for row in others] == [True] * 2
    assert len(backends.table([failed, *others]).splitlines()) == 4


def test_a_part_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gpu = load("gpu")
    script = tmp_path / "endless.py"
    script.write_text("import subprocess, sys, time\n")
    with script.open("a") as file:
        file.write(f"child = subprocess.Popen(['sleep', '600']); open({str(tmp_path / 'pid')!r}, ")
        file.write("'w').write(str(child.pid)); time.sleep(600)\n")
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    part = gpu.Part("endless", "endless.py", (), 3)
    assert gpu.run_part(part, gpu.Settings(out=tmp_path), 3) == "ended after 3 s"
    assert all_end([int((tmp_path / "pid").read_text())])


def test_a_run_is_timed_to_its_loss(tmp_path: Path, clone: Path, text: Path):
    size = ("--tiny", "True", "--data", text, "--nanogpt", clone, "--only-nanogpt", "True")
    values, _ = run("shakespeare", tmp_path, *size, "--target", 1.5)
    row = values["rows"]["nanoGPT"]
    assert row["best"] == 1.4
    assert 0.3 < row["seconds"] < 50
    assert [loss for _, loss, _ in row["curve"]] == [4.2, 3.9, 1.4]
    assert row["steps"] == 4
    assert row["train_seconds"] == pytest.approx(4 * 0.04)


@pytest.mark.parametrize("small", [False, True])
def test_every_part_has_flags_that_its_script_knows(small: bool, tmp_path: Path, clone: Path):
    gpu = load("gpu")
    for part in gpu.parts(gpu.Settings(out=tmp_path, nanogpt=clone, data=clone, small=small)):
        settings = load(part.script.removesuffix(".py")).Settings
        given = [*part.flags, "--json", str(tmp_path / "x.json")]
        assert command_line.parse_flags(settings, None, "", given).json.name == "x.json"


@pytest.mark.slow
def test_what_a_gpu_is_measured_by_runs_small(tmp_path: Path, clone: Path, text: Path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    out = tmp_path / "out"
    gpu = load("gpu")
    # The essential ones and those that no other test runs.
    names = [part.name for part in gpu.parts(gpu.Settings(out=out)) if part.essential]
    names += ["float8-loss", "start-up", "loading"]
    args = ("--nanogpt", clone, "--data", text, "--seconds", 3000, "--only", *names)
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py", "--small", "True", "--out", out, *map(str, args)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "GPTJAX_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr
    states = json.loads((out / "parts.json").read_text())["parts"]
    assert set(states) == set(names)
    failed = {name: state for name, state in states.items() if state["state"] != "done"}
    assert not failed, failed
    report = json.loads((out / "report.json").read_text())
    ran = {goal.text for goal in gpu.GOALS if goal.part in names}
    missing = [goal["goal"] for goal in report["goals"] if goal["found"] is None]
    # The tiny model does not come to nanoGPT's loss.
    assert [goal for goal in missing if goal in ran and "time to" not in goal] == []
    assert "8-bit floats, 2,048 wide: time to bfloat16's loss over bfloat16's" not in missing


@pytest.mark.slow
def test_text_becomes_shards_at_a_rate(tmp_path: Path, text: Path):
    from gptjax.pretrained.tokenizer_files import write_tokenizer
    from gptjax.tokenizer import BPETokenizer

    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    write_tokenizer(BPETokenizer.train([text.read_text()], 300), tokenizer)
    size = ("--tokenizer", tokenizer, "--data", text, "--workers", 1)
    small = ("--context-length", 8, "--batch-size", 2, "--batches", 5)
    values, _ = run("data", tmp_path, *size, *small)
    assert values["reading"]["1 file"]["batches_per_second"] > 0
