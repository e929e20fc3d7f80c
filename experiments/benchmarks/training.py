r"""Times a train step in gptjax, in turns with nanoGPT and transformers where they are given.

    python experiments/benchmarks/training.py --nanogpt PATH_TO_NANOGPT_CLONE
    python experiments/benchmarks/training.py --model gpt2 --batch-size 4 --context 256 \
        --dtype float32 --clip-norm None --transformers True

A step is forward, backward, clipping, update, and fetching the loss. Every contestant has a process
of its own, which builds and compiles the step, warms up, and then takes turns with the others,
since other load on a machine comes and goes: compare within a turn. The peers need PyTorch
(`pip install -e ".[parity]"`). On a GPU they run compiled (`torch.compile`), with PyTorch's flash
attention and fused AdamW, under autocast; on a CPU as their READMEs have it, uncompiled.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import itertools
import math
import os
import runpy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from measuring import (
    Column,
    DoesNotFitError,
    MeasurementError,
    Report,
    Worker,
    in_turns,
    peak_memory,
    run_benchmark,
    say,
    transformers_gpt2,
)

from gptjax.command_line import configure_jax, parse_flags
from gptjax.config import ComputeDtype, ModelConfig
from gptjax.devices import has_nvidia
from gptjax.errors import UserError
from gptjax.optimizer import OptimizerConfig
from gptjax.params import count_params, flops_per_token
from gptjax.planning.inputs import read_model

GPTJAX, NANOGPT, TRANSFORMERS = "gptjax", "nanoGPT", "transformers"
MODERN = "gptjax, modern recipe with Muon"
SHAKESPEARE = {"nanogpt-cpu": "cpu", "nanogpt-gpu": "gpu"}
CHARACTERS = 65
Remat = Literal["none", "dots", "full", "offload"]
BATCHES = 8


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Times a train step.

    Attributes:
        model: "nanogpt-cpu" or "nanogpt-gpu", nanoGPT's recipes for Shakespeare by characters; or a
            preset, a folder in Hugging Face's layout, or a run folder.
        batch_size: Sequences a step; the recipes have their own.
        context: Tokens of each; None is the model's context.
        accumulate: Microbatches that a batch is split into. Of several numbers each is a row.
        vocab_size: Another vocabulary, such as 50304, which nanoGPT pads GPT-2's to.
        use_bias: Whether there are biases; nanoGPT's default has none.
        dtype: Of matrix work; of peers "auto" is bfloat16 on a GPU.
        clip_norm: The gradient's largest norm; None does not clip.
        mesh: How gptjax shares the batch among devices, as in the training scripts; None is each
            device with its share, or one of a CPU's where the model is large for the batch.
        scan_unroll: Blocks in a row for each turn of the loop over blocks. Each number is a row.
        remat: What the backward pass recomputes. Each is a row.
        float8: Whether blocks multiply in 8-bit floats. Each is a row.
        first_that_fits: Whether to stop at the first of the rows that the memory is enough for;
            peers try the numbers of microbatches likewise.
        turns: How often each is measured.
        warmup: Steps before the first clock runs, after the one that compiles.
        steps: Steps timed in a turn.
        nanogpt: A clone of nanoGPT, to compare with.
        peer_accumulate: Microbatches of peers, of several the first that fits; none are those of
            gptjax.
        transformers: Whether to compare with transformers' GPT-2.
        matrix_rate: Floating-point operations a second that the chip was measured to do in a matrix
            product, to tell the share of it.
        profile: A folder to write a trace of three more steps to; its costliest operations are
            printed, and a roofline beside them where the chip is known.
        json: A file to write the results to.
        png: A picture of tokens a second.
    """

    model: str = "nanogpt-cpu"
    batch_size: int | None = None
    context: int | None = None
    accumulate: tuple[int, ...] = (1,)
    vocab_size: int | None = None
    use_bias: bool | None = None
    dtype: ComputeDtype = "auto"
    clip_norm: float | None = 1.0
    mesh: str | None = None
    scan_unroll: tuple[int, ...] = ()
    remat: tuple[Remat, ...] = ("none",)
    float8: tuple[bool, ...] = (False,)
    first_that_fits: bool = False
    turns: int = 5
    warmup: int = 20
    steps: int = 60
    nanogpt: Path | None = None
    peer_accumulate: tuple[int, ...] = ()
    transformers: bool = False
    matrix_rate: float | None = None
    profile: Path | None = None
    json: Path | None = None
    png: Path | None = None

    def check(self) -> None:
        """Raises a UserError where something is out of range or absent."""
        numbers = {"turns": self.turns, "steps": self.steps, "batch_size": self.batch_size}
        several = (*self.accumulate, *self.scan_unroll, *self.peer_accumulate)
        numbers |= {f"accumulate or scan_unroll ({n})": n for n in several}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; at least 1")
        if self.warmup < 0:
            raise UserError(f"warmup is {self.warmup}; at least 0")
        if not self.accumulate or not self.remat or not self.float8:
            raise UserError("accumulate, remat and float8 are at least one each")
        if self.nanogpt is not None and not (self.nanogpt / "model.py").is_file():
            raise UserError(f"{self.nanogpt} holds no model.py; --nanogpt is a clone of nanoGPT")
        for package, asked in (("torch", self.nanogpt), (TRANSFORMERS, self.transformers)):
            if asked and importlib.util.find_spec(package) is None:
                raise UserError(f'{package} is not installed; pip install -e ".[parity]"')


@dataclass(frozen=True)
class Recipe:
    """What is trained, the same for every contestant.

    Attributes:
        model: the model.
        optimizer: how it is updated.
        batch_size: sequences a step.
        accumulate: microbatches.
        rows: what the rows of a replica's share must divide.
        mesh: see `Settings`.
        warmup: see `Settings`.
    """

    model: ModelConfig
    optimizer: OptimizerConfig
    batch_size: int
    accumulate: int
    rows: int
    mesh: str | None = None
    warmup: int = 0


Run = Callable[..., dict[str, Any]]
"""`run(steps)`: milliseconds of single steps, and the other figures of a contestant."""


@dataclass
class Plan:
    """Contestants by the name of their row; of a peer's recipes the first that fits counts."""

    ours: dict[str, Recipe] = field(default_factory=dict)
    peers: dict[str, tuple[Callable[..., Run], list[Recipe]]] = field(default_factory=dict)


def plan(settings: Settings) -> Plan:
    """What the settings ask for.

    Raises:
        UserError: if a batch does not divide into its microbatches.
    """
    base = recipe(settings)
    made = Plan()
    unrolls = settings.scan_unroll or (None,)
    for accumulate in (*settings.accumulate, *settings.peer_accumulate):
        if base.batch_size % accumulate:
            raise UserError(
                f"batch_size {base.batch_size} does not divide into {accumulate} microbatches"
            )
    # Fewer rows at once come before computing anything again, which costs more.
    for float8, remat, accumulate, unroll in itertools.product(
        settings.float8, settings.remat, settings.accumulate, unrolls
    ):
        label = GPTJAX
        label += f", {accumulate} microbatches" if len(settings.accumulate) > 1 else ""
        label += f", remat {remat}" if len(settings.remat) > 1 else ""
        label += f", {unroll} blocks a turn" if unroll is not None else ""
        label += ", float8" if float8 else ""
        changes: dict[str, Any] = {"remat": remat, "scan_unroll": unroll, "float8": float8}
        made.ours[label] = changed(base, accumulate, changes)
    same = settings.accumulate if settings.first_that_fits else settings.accumulate[:1]
    tries = [changed(base, n, {}) for n in settings.peer_accumulate or same]
    if settings.nanogpt is not None:
        made.peers[NANOGPT] = (nanogpt_run, tries)
    if settings.transformers:
        made.peers[TRANSFORMERS] = (transformers_run, tries)
    if settings.model == "nanogpt-cpu" and len(made.ours) == 1:
        made.ours[MODERN] = recipe(settings, "cpu-modern")
    return made


def recipe(settings: Settings, shakespeare: str | None = None) -> Recipe:
    """The recipe that the settings name, or another one for Shakespeare."""
    name = shakespeare or SHAKESPEARE.get(settings.model)
    if name is not None:
        script = Path(__file__).parents[1] / "shakespeare_char.py"
        given = runpy.run_path(str(script))["PRESETS"][name]
        model, optimizer = given.model.replace(vocab_size=CHARACTERS), given.optimizer
        batch, rows = given.batch_size, given.eval_batch_size
        if shakespeare is None:
            # nanoGPT's own default has no biases.
            model = model.replace(use_bias=False)
    else:
        model, batch, rows = read_model(settings.model), 8, 0
        # nanoGPT's, which are GPT-3's for a model of this size (Brown et al. 2020, appendix B).
        optimizer = OptimizerConfig(learning_rate=6e-4, beta2=0.95, weight_decay=0.1)
    changes: dict[str, Any] = {"compute_dtype": settings.dtype}
    for key, value in (("vocab_size", settings.vocab_size), ("use_bias", settings.use_bias)):
        changes |= {} if value is None else {key: value}
    if settings.context is not None:
        changes["context_length"] = settings.context
    if shakespeare is None:
        optimizer = dataclasses.replace(optimizer, clip_norm=settings.clip_norm)
    size = settings.batch_size or batch
    made = Recipe(
        model.replace(**changes), optimizer, size, 1, rows, settings.mesh, settings.warmup
    )
    return changed(made, next(iter(settings.accumulate)), {}) if shakespeare else made


def changed(base: Recipe, accumulate: int, changes: dict[str, Any]) -> Recipe:
    """A recipe with other microbatches, and changes to its model."""
    model = base.model.replace(**changes)
    return dataclasses.replace(base, accumulate=accumulate, model=model)


def random_batches(recipe: Recipe) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of tokens and targets, each `[B, T]`, int32; a step's time depends on no values."""
    model = recipe.model
    shape = (BATCHES, recipe.batch_size, model.context_length + 1)
    rows = np.random.default_rng(0).integers(model.vocab_size, size=shape, dtype=np.int32)
    return [(row[:, :-1].copy(), row[:, 1:].copy()) for row in rows]


def timed(step: Callable[[int], float], recipe: Recipe) -> Callable[[int], list[float]]:
    """Milliseconds of so many steps, after the warm-up."""
    number = 0

    def run(steps: int) -> list[float]:
        nonlocal number
        milliseconds = []
        for _ in range(steps):
            start = time.perf_counter()
            loss = step(number)
            milliseconds.append((time.perf_counter() - start) * 1e3)
            number += 1
            if not math.isfinite(loss):
                raise RuntimeError(f"the loss of step {number} is {loss}")
        return milliseconds

    run(recipe.warmup)
    return run


def gptjax_run(recipe: Recipe) -> Run:
    """The step in gptjax, compiled."""
    configure_jax()
    import jax

    from gptjax import devices, profiling
    from gptjax.optimizer import make_optimizer
    from gptjax.sharding import data_mesh, mesh_devices, parse_mesh, place_batch
    from gptjax.training import init_state, make_train_step

    # How long compiling takes is one of the figures.
    jax.config.update("jax_enable_compilation_cache", False)
    config = recipe.model
    at_once = recipe.batch_size // recipe.accumulate
    rows = math.gcd(at_once, recipe.rows) if recipe.rows else at_once
    if recipe.mesh:
        mesh = parse_mesh(recipe.mesh)
    else:
        mesh = data_mesh(rows, at_once * config.context_length, count_params(config))
    optimizer = make_optimizer(recipe.optimizer, config, 10_000)
    state = init_state(config, optimizer, jax.random.key(0), mesh)
    train_step: Any = make_train_step(config, optimizer, mesh, accumulate=recipe.accumulate)
    batches: list[Any] = [
        place_batch({"tokens": tokens, "targets": targets}, mesh)
        for tokens, targets in random_batches(recipe)
    ]
    start = time.perf_counter()
    compiled = train_step.lower(state, batches[0]).compile()
    compile_seconds = time.perf_counter() - start

    def step(number: int) -> float:
        nonlocal state
        state, metrics = compiled(state, batches[number % BATCHES])
        # The loss could be there before the update is.
        jax.block_until_ready(state)
        return float(metrics["loss"])

    run = timed(step, recipe)
    used = mesh_devices(mesh)
    peak_flops = devices.peak_flops(used)
    on_cpu = used[0].platform == "cpu"

    def measure(steps: int, profile: Path | None = None) -> dict[str, Any]:
        if profile is not None:
            with profiling.trace(profile, compiled):
                for number in range(steps):
                    with profiling.traced_step(number):
                        step(number)
            return {}
        return {
            "milliseconds": run(steps),
            "compile_seconds": compile_seconds,
            "peak_bytes": peak_memory() if on_cpu else devices.peak_bytes(compiled),
            "program_bytes": devices.program_bytes(compiled),
            "peak_flops": peak_flops,
            "device": devices.describe(used),
            "kind": used[0].device_kind,
            "devices": len(used),
        }

    return measure


def nanogpt_run(recipe: Recipe, clone: Path) -> Run:
    """The step in nanoGPT, as its train.py has it."""
    sys.path.insert(0, str(clone))
    nanogpt = importlib.import_module("model")
    shape = recipe.model
    # It prints as it builds; the table is what belongs on the standard output.
    with contextlib.redirect_stdout(sys.stderr):
        model = nanogpt.GPT(
            nanogpt.GPTConfig(
                block_size=shape.context_length,
                vocab_size=shape.vocab_size,
                n_layer=shape.num_layers,
                n_head=shape.num_heads,
                n_embd=shape.embed_dim,
                dropout=shape.dropout,
                bias=shape.use_bias,
            )
        )

        def optimizer(model: Any, device: str) -> Any:
            optim = recipe.optimizer
            betas = (optim.beta1, optim.beta2)
            return model.configure_optimizers(
                optim.weight_decay, optim.learning_rate, betas, device
            )

        return torch_run(recipe, model, optimizer, lambda model, x, y: model(x, y)[1])


def transformers_run(recipe: Recipe, _: Path | None) -> Run:
    """The step of transformers' GPT-2, with PyTorch's AdamW."""
    import torch  # pyright: ignore[reportMissingImports]

    shape, optim = recipe.model, recipe.optimizer
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), shape.dropout)
    model = transformers_gpt2(shape, use_cache=False, **dropout)

    def optimizer(model: Any, device: str) -> Any:
        return torch.optim.AdamW(
            model.parameters(),
            lr=optim.learning_rate,
            betas=(optim.beta1, optim.beta2),
            weight_decay=optim.weight_decay,
            fused=device == "cuda",
        )

    def loss(model: Any, x: Any, y: Any) -> Any:
        logits = model(x).logits
        return torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), y.reshape(-1))

    return torch_run(recipe, model, optimizer, loss)


def torch_run(
    recipe: Recipe,
    model: Any,
    make_optimizer: Callable[[Any, str], Any],
    loss_of: Callable[[Any, Any, Any], Any],
) -> Run:
    """A step in PyTorch: microbatches in turn, clipping, update."""
    import torch  # pyright: ignore[reportMissingImports]

    start = time.perf_counter()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    model = model.to(device).train()
    optimizer = make_optimizer(model, device)
    if on_gpu:
        model = torch.compile(model)
    dtype = recipe.model.compute_dtype
    half = dtype == "bfloat16" or (dtype == "auto" and on_gpu)
    context = torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext()
    clip = recipe.optimizer.clip_norm
    batches = [
        [torch.from_numpy(part).long().to(device) for part in pair]
        for pair in random_batches(recipe)
    ]

    def step(number: int) -> float:
        pair = batches[number % BATCHES]
        parts = zip(*(part.chunk(recipe.accumulate) for part in pair), strict=True)
        for x, y in parts:
            with context:
                loss = loss_of(model, x, y) / recipe.accumulate
            loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    step(0)
    first = time.perf_counter() - start
    run = timed(step, recipe)

    def measure(steps: int) -> dict[str, Any]:
        milliseconds = run(steps)
        return {
            "milliseconds": milliseconds,
            # Until the first step is done, as far as it is longer than a later one.
            "compile_seconds": max(first - min(milliseconds) / 1e3, 0.0) if on_gpu else None,
            "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_memory(),
        }

    return measure


def measure(settings: Settings) -> tuple[Report, dict[str, Recipe]]:
    """Measures every contestant: the report, and gptjax's rows that fitted.

    A peer that fails is named in the report with the reason; the others go on without it.

    Raises:
        UserError: if none of gptjax's rows fits.
        MeasurementError: if one of them fails otherwise.
    """
    contestants = plan(settings)
    report = Report(f"Train step of {settings.model}", settings)
    # A GPU's memory is for one at a time, but where peers take turns.
    together = bool(contestants.peers) or not has_nvidia()
    environment = memory_flags(settings)
    found: dict[str, list[dict[str, Any]]] = {}
    fitted: dict[str, Recipe] = {}
    workers: dict[str, Worker] = {}
    peers: dict[str, Recipe] = {}
    failures: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for label, given in contestants.ours.items():
            say(f"{label}: compiling")
            worker = stack.enter_context(Worker(gptjax_run, given, environment=environment))
            try:
                worker.wait()
                if not together:
                    found |= in_turns({label: worker}, settings.turns, settings.steps)
                    worker.close()
            except DoesNotFitError as error:
                worker.close()
                report.add(
                    label, note=f"does not fit: {error.reason}", tokens_per_second="does not fit"
                )
                continue
            workers[label], fitted[label] = worker, given
            if settings.first_that_fits:
                break
        if not fitted:
            raise UserError(f"{settings.model} does not fit in memory in any of these ways")
        for label, (build, tries) in contestants.peers.items():
            for given in tries:
                say(f"{label}: getting ready, {given.accumulate} microbatches")
                worker = stack.enter_context(Worker(build, given, settings.nanogpt))
                try:
                    worker.wait()
                except MeasurementError as error:
                    say(f"{label}: {error}")
                    worker.close()
                    failures[label] = error.reason
                    if isinstance(error, DoesNotFitError):
                        continue
                    break
                failures.pop(label, None)
                workers[label], peers[label] = worker, given
                break
        if together:
            found = in_turns(
                workers, settings.turns, settings.steps, may_fail=peers, failures=failures
            )
    peak = next(iter(found[next(iter(fitted))]))["peak_flops"]
    for label, turns in found.items():
        given = fitted.get(label) or peers[label]
        add_row(report, label, turns, given, peak, settings.matrix_rate)
    ours = next(iter(fitted))
    for peer in peers:
        if peer in found:
            compare(report, ours, peer)
    for peer, reason in failures.items():
        report.add(peer, tokens_per_second="failed", note=reason)
        report.notes.append(f"{peer} failed, and is not compared with: {reason}")
    report.extra["failed"] = failures
    facts = found[ours][0]
    model = fitted[ours].model
    report.extra |= {name: facts[name] for name in ("device", "kind", "devices", "peak_flops")}
    report.extra |= {"flops_per_token": flops_per_token(model), "fitted": list(fitted)}
    report.notes.append(
        f"MFU = tokens/s × {flops_per_token(model):.4g} FLOPs a token (6 N + 12 L H C T) "
        f"/ {peak:.4g} FLOP/s of {facts['device']}"
    )
    return report, fitted


def memory_flags(settings: Settings) -> dict[str, str]:
    """The environment by which JAX takes a GPU's memory in gptjax's rows."""
    if settings.nanogpt is not None or settings.transformers:
        # Of a share that is taken at once, a peer would have nothing.
        return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93"}


def add_row(
    report: Report,
    label: str,
    turns: list[dict[str, Any]],
    given: Recipe,
    peak_flops: float,
    matrix_rate: float | None,
) -> None:
    """A contestant's figures, lists by turn."""
    tokens = given.batch_size * given.model.context_length
    middle = [statistics.median(turn["milliseconds"]) for turn in turns]
    rates = [tokens / one * 1e3 for one in middle]
    flops = flops_per_token(given.model)
    report.add(
        label,
        tokens_per_second=rates,
        milliseconds=middle,
        fastest=[min(turn["milliseconds"]) for turn in turns],
        mfu=[rate * flops / peak_flops for rate in rates],
        of_matrix_rate=None if matrix_rate is None else [r * flops / matrix_rate for r in rates],
        compile_seconds=turns[0]["compile_seconds"],
        peak_bytes=turns[-1]["peak_bytes"],
        rows_at_once=given.batch_size // given.accumulate,
        accumulate=given.accumulate,
        remat=given.model.remat,
    )


def compare(report: Report, ours: str, peer: str) -> None:
    """Adds gptjax's step time over a peer's, by turn: of the fastest step and of the median."""
    ratios = {
        name: [a / b for a, b in zip(report.rows[ours][name], report.rows[peer][name], strict=True)]
        for name in ("fastest", "milliseconds")
    }
    named = {"fastest": ratios["fastest"], "median": ratios["milliseconds"]}
    report.extra.setdefault("step_time_ratio", {})[peer] = named
    report.add(ours, **{f"ratio_{peer}": [1 / ratio for ratio in named["median"]]})
    cell = Column("", 2).cell
    at_once = {name: report.rows[name]["rows_at_once"] for name in (ours, peer)}
    report.notes.append(
        f"step time of {ours} / {peer}: fastest {cell(named['fastest'])}, "
        f"median {cell(named['median'])}; below 1 gptjax is faster; "
        f"rows at once {at_once[ours]} / {at_once[peer]}"
    )


def profile(settings: Settings, report: Report, given: Recipe) -> list[Report]:
    """Traces steps, and tells what they spend their time on."""
    from roofline import report as roofline

    from gptjax import profiling
    from gptjax.devices import find_chip

    assert settings.profile is not None
    steps = 3
    say("tracing")
    # The memory that the measured row had. And without command buffers, or a GPU's operations come
    # in bundles without names.
    flags = memory_flags(settings) | {"XLA_FLAGS": flags_without_command_buffers()}
    with Worker(gptjax_run, given, environment=flags) as worker:
        worker.wait()
        worker(steps, settings.profile)
    every = profiling.costliest(settings.profile, None)
    covered = profiling.explained(settings.profile)
    # Of a step on one device.
    each = steps * report.extra["devices"]
    table = Report("The ten costliest operations, by step and device", measured=False)
    for number, operation in enumerate(every[:10]):
        table.add(
            f"{number + 1}. {operation.name}",
            scope=operation.scope,
            milliseconds=operation.seconds / each * 1e3,
            share=operation.share,
            count=operation.count / each,
        )
    shares = [step.busy / step.seconds for step in covered]
    table.notes.append(
        f"Operations account for {Column('', 1, 100).cell(shares)} % of the traced steps' time, "
        f"{Column('', 1, 1e3).cell([step.seconds for step in covered])} ms each."
    )
    parts = {part: spent / each for part, spent in profiling.by_part(every).items()}
    report.extra["profile"] = {
        "costliest": list(table.rows.items()),
        "explained": shares,
        "seconds_by_part": parts,
        "step_seconds": [step.seconds for step in covered],
    }
    chip = find_chip(report.extra["kind"])
    if chip is None or chip.memory_bandwidth is None:
        return [table]
    model = given.model
    size = model.context_length
    return [table, roofline(model, chip, given.batch_size, size, given.accumulate, parts)]


def flags_without_command_buffers() -> str:
    """`XLA_FLAGS` with which a GPU's operations are launched one by one."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer=".strip()


COLUMNS: dict[str, Column] = {
    "fastest": Column("fastest ms", 1, ranged=False),
    "rows_at_once": Column("rows", 0),
    "of_matrix_rate": Column("% of measured matrix rate", 1, 100, ranged=False),
    f"ratio_{NANOGPT}": Column("times nanoGPT's rate", 2),
    f"ratio_{TRANSFORMERS}": Column("times transformers' rate", 2),
    "scope": Column("part of the model"),
    "share": Column("share %", 1, 100),
    "count": Column("times a step", 1),
}


def main() -> None:
    settings = parse_flags(Settings, Settings(), str(__doc__))
    settings.check()
    report, fitted = measure(settings)
    report.show(COLUMNS)
    # What is there so far, should the trace fail.
    report.save(settings.json, settings.png, "tokens_per_second")
    if settings.profile is not None:
        import roofline

        for made in profile(settings, report, next(iter(fitted.values()))):
            made.show(roofline.COLUMNS | COLUMNS)
        report.save(settings.json, settings.png, "tokens_per_second")


if __name__ == "__main__":
    run_benchmark(main)
