"""The real train step, compiled ahead of time, and what its program says."""

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from gptjax import sharding, xla_flags
from gptjax.devices import program_bytes
from gptjax.errors import UserError
from gptjax.planning.estimate import Layout
from gptjax.planning.programs import (
    Collective,
    count_cycles,
    count_flops,
    count_operations,
    largest_array,
    read_collectives,
    read_products,
)
from gptjax.planning.topology import CompilerMissingError, Topology, compile_mesh
from gptjax.training import abstract_state, make_train_step

if TYPE_CHECKING:
    import optax


@dataclass(frozen=True)
class CompiledStep:
    """What the compiler says of a step; None is what it could not be asked.

    Attributes:
        note: why not, or what it refused; "" otherwise.
        seconds: how long tracing and compiling took.
        peak: bytes on a device; of a program that does not fit, what it would need.
        flops: of its matrix products on all devices, loops by their length.
        xla_flops: by XLA's cost analysis, on all devices, corrected for loops.
        program_flops: of the compiled program's matrix products, on all devices, loops by their
            length, with those of its kernels.
        padding: the share of the matrix unit's work, kernels apart, that is on the empty part of
            tiles, 0 to 1; see `programs.Products`.
        added_padding: the share of it that the model's own dimensions do not ask for, but their
            split over devices, and what is filled up.
        logits_bytes: of the largest array with the vocabulary in it, or a device's share of it,
            that is no table of vectors.
        operations: how long the program's text is.
        cycles: that the compiler reckons for a step on a device, see `programs.count_cycles`.
        collectives: what goes over the network.
    """

    note: str = ""
    seconds: float = 0.0
    peak: int | None = None
    flops: float | None = None
    xla_flops: float | None = None
    program_flops: float | None = None
    padding: float | None = None
    added_padding: float | None = None
    logits_bytes: int | None = None
    operations: int | None = None
    cycles: int | None = None
    collectives: list[Collective] | None = None


def compile_step(
    layout: Layout, target: Topology, optimizer: "optax.GradientTransformation"
) -> CompiledStep:
    """Compiles the real train step for a topology's devices.

    Args:
        layout: of the step.
        target: the topology.
        optimizer: any optax transformation.
    """
    config = layout.config
    try:
        mesh = compile_mesh(target, layout.axes)
    except CompilerMissingError as error:
        return CompiledStep(note=f"closed form: {error}")
    start = time.monotonic()
    step: Any = make_train_step(config, optimizer, mesh, accumulate=layout.accumulate)
    place = sharding.batch_sharding(mesh)
    shape = (layout.batch, config.context_length)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
    state = abstract_state(config, optimizer, mesh)
    traced = step.trace(state, {"tokens": ids, "targets": ids})
    flops = count_flops(traced.jaxpr)
    try:
        executable = traced.lower().compile(compiler_options=_options(target))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = _needed_bytes(str(error))
        seconds = time.monotonic() - start
        return CompiledStep("the compiler ran out of the chip's memory", seconds, needed, flops)
    seconds = time.monotonic() - start
    text = executable.as_text()
    collectives = read_collectives(text, layout.axes, target.linked)
    products = read_products(text, target.tile)
    program_flops = products.flops * target.devices + count_flops(traced.jaxpr, kernels=True)
    own = count_flops(traced.jaxpr, tile=target.tile)
    # Products that other libraries do are in no HLO operation of their own.
    known = target.platform != "gpu" and products.flops > 0
    cost: Any = executable.cost_analysis() or {}
    xla_flops = cost.get("flops", 0.0) * target.devices
    once = count_flops(traced.jaxpr, loops_once=True)
    return CompiledStep(
        seconds=seconds,
        peak=_peak_bytes(executable, target.platform),
        flops=flops,
        xla_flops=xla_flops * flops / once if xla_flops > 0 and once else None,
        program_flops=program_flops if known else None,
        padding=products.padding if known else None,
        added_padding=max(0.0, 1 - own / (products.tiled * target.devices)) if known else None,
        logits_bytes=_logits_bytes(text, layout),
        operations=count_operations(text),
        cycles=count_cycles(text),
        collectives=collectives,
    )


def _options(target: Topology) -> dict[str, str] | None:
    """The compiler's options that a run on these chips has, by `xla_flags.set_flags`."""
    if target.platform != "tpu":
        return None
    missing = xla_flags.missing_tpu_flags()
    return {name.removeprefix("--"): value for name, value in missing.items()}


def _logits_bytes(text: str, layout: Layout) -> int:
    """Of the largest block of logits that a device holds at once."""
    config = layout.config
    parts = layout.parts("vocab_parts")
    filled = [-(-config.vocab_size // rows) * rows for rows in (1, parts, 128, 128 * parts)]
    vocab = {size // n for size in filled for n in (1, parts)}
    # Tables of vectors have the model's width, or a device's share of it, beside the vocabulary.
    splits = {1, layout.parts("table"), layout.parts("columns"), layout.parts("embed")}
    return largest_array(text, vocab, {config.embed_dim // n for n in splits})


def _peak_bytes(executable: Any, platform: str) -> int | None:
    if platform == "tpu":
        return executable.memory_analysis().peak_memory_in_bytes
    # The other compilers do not count temporaries in their peak.
    return program_bytes(executable)


def _needed_bytes(message: str) -> int:
    """What a program needs by the TPU compiler's complaint that it does not fit."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.search(
        r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm|\(([\d.]+)([KMGT]?)\) exceeds available HBM",
        message,
    )
    if found is None:
        raise UserError(f"the program does not fit: {message.splitlines()[0]}")
    number, unit = found[1] or found[3], found[2] or found[4]
    return int(float(number) * units[unit or ""])
