"""What limits a train step on a chip: floating-point operations and bytes of each part of a GPT.

    python experiments/benchmarks/roofline.py --model gpt2 --batch-size 480 --accumulate 15

Computed from shapes and the chip's data sheet, not measured: each matrix product, the attention
kernel and each elementwise pass between them reads its inputs from memory and writes its outputs
once. An operation takes at least the longer of its time at the chip's matrix rate and at its memory
rate. `--trace DIR` sets beside it what a trace of `training.py --profile DIR` measured.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from measuring import Column, Report

from gptjax.command_line import parse_flags, run_command
from gptjax.config import ModelConfig
from gptjax.devices import CHIPS, Chip
from gptjax.errors import UserError, nearest
from gptjax.params import count_params, flops_per_token
from gptjax.planning.inputs import read_model

Remat = Literal["none", "dots", "full", "offload"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The roofline of a train step.

    Attributes:
        model: A preset, a folder in Hugging Face's layout, or a run folder.
        chip: A name of `gptjax.devices.CHIPS`.
        batch_size: Sequences a step.
        context: Tokens of each; None is the model's context.
        accumulate: Microbatches.
        remat: What the backward pass recomputes.
        trace: A folder with a trace to compare with.
        json: A file to write the results to.
        png: A picture of the parts' times.
    """

    model: str = "gpt2"
    chip: str = "h100"
    batch_size: int = 480
    context: int | None = None
    accumulate: int = 15
    remat: Remat = "none"
    trace: Path | None = None
    json: Path | None = None
    png: Path | None = None


@dataclass(frozen=True)
class Operation:
    """An operation of a step.

    Attributes:
        part: of the model, as its named scopes are called.
        flops: floating-point operations of matrix products in a step.
        moved: bytes to and from memory in a step.
    """

    part: str
    flops: float
    moved: float

    def seconds(self, chip: Chip) -> float:
        """The longer of its times at the two rates."""
        return max(self.flops / chip.flops, self.moved / (chip.memory_bandwidth or math.inf))


def operations(
    config: ModelConfig, rows: int, context: int, accumulate: int = 1, width: int = 2
) -> list[Operation]:
    """Every operation of a train step with an attention that writes no scores to memory.

    Attention counts half of its scores, the causal ones, and five products in the backward pass for
    two in the forward (Dao et al. 2022, section 3.1). AdamW reads gradient, parameter and two
    moments and writes the last three, in float32; the gradient's norm reads it once more.

    Args:
        config: the model, dense.
        rows: sequences a step.
        context: tokens of each.
        accumulate: microbatches.
        width: bytes of a number in matrix work.
    """
    return list(_operations(config, rows * context, context, accumulate, width))


def _operations(
    config: ModelConfig, tokens: float, T: int, accumulate: int, c: int
) -> Iterator[Operation]:
    D, V, L, F = config.embed_dim, config.vocab_size, config.num_layers, config.mlp_width
    A, KV = config.num_heads * config.head_width, 2 * config.kv_heads * config.head_width
    up = 2 * F if config.gated_mlp else F
    forwards = 2 if config.remat in ("full", "offload") else 1

    def product(part: str, inputs: int, outputs: int) -> Iterator[Operation]:
        """Forward, the gradient of its input, and that of its kernel."""
        flops, kernel = 2.0 * L * tokens * inputs * outputs, L * accumulate * inputs * outputs
        moved = L * tokens * (inputs + outputs) + kernel
        for _ in range(forwards + 2):
            yield Operation(part, flops, moved * c)

    def pointwise(part: str, forward: float, backward: float) -> Iterator[Operation]:
        """Passes over numbers of a token and block."""
        times = forwards + (config.remat == "dots")
        yield Operation(part, 0, (forward * times + backward) * L * tokens * c)

    # Rows of the float32 table, their gradient summed into it.
    yield Operation("embed", 0, tokens * D * (4 + c + c + 8))
    blocks = L * (D * (A + KV) + A * D + D * up + F * D)
    # The float32 masters as the products take them.
    yield Operation("casts", 0, accumulate * (blocks + V * D) * (4 + c) if c < 4 else 0)
    for part in ("attention", "mlp"):
        # The norm, and the sum with the residual; their gradients.
        yield from pointwise(part, 5 * D, 6 * D)
    yield from product("attention", D, A + KV)
    yield from product("attention", A, D)
    scores = 2.0 * L * tokens * T * A
    attended = L * tokens * c
    for _ in range(forwards + (config.remat == "dots")):
        yield Operation("attention", scores, attended * (2 * A + KV))
    yield Operation("attention", 2.5 * scores, attended * (4 * A + 2 * KV))
    yield from product("mlp", D, up)
    yield from product("mlp", F, D)
    yield from pointwise("mlp", up + F, 2 * up + F)
    yield Operation("final_norm", 0, tokens * c * 5 * D)
    logits, head = tokens * V, accumulate * V * D
    yield Operation("loss", 2.0 * tokens * V * D, tokens * D * c + head * c + logits * 4)
    # Log-sum-exp and the logits' gradient.
    yield Operation("loss", 0, logits * (4 + c))
    yield Operation("loss", 2.0 * tokens * V * D, logits * c + head * c + tokens * D * c)
    yield Operation("loss", 2.0 * tokens * V * D, logits * c + tokens * D * c + head * 4)
    params = count_params(config)
    if accumulate > 1:
        yield Operation("accumulation", 0, 12.0 * accumulate * params)
    yield Operation("optimizer", 0, (7 + 1) * 4.0 * params)


COLUMNS = {
    "flops": Column("TFLOP", 2, 1e-12),
    "moved": Column("GB", 2, 1e-9),
    "compute": Column("ms at matrix rate", 2, 1e3),
    "memory": Column("ms at memory rate", 2, 1e3),
    "least": Column("least ms", 2, 1e3),
    "share": Column("share %", 1, 100),
    "limit": Column("limit"),
    "measured": Column("measured ms", 2, 1e3),
}


def report(
    config: ModelConfig,
    chip: Chip,
    rows: int,
    context: int,
    accumulate: int,
    measured: dict[str, float] | None = None,
) -> Report:
    """The table of parts, with measured seconds a step by part where there are some.

    Raises:
        UserError: if the chip's memory rate is not known, or the model is a mixture of experts.
    """
    if chip.memory_bandwidth is None:
        raise UserError(f"the memory rate of {chip.kind} is not known here; choose another chip")
    if config.num_experts is not None:
        raise UserError("there is no roofline of mixtures of experts; choose a dense model")
    width = 4 if config.compute_dtype == "float32" else 2
    every = operations(config, rows, context, accumulate, width)
    seconds = {operation: operation.seconds(chip) for operation in every}
    total = sum(operation.seconds(chip) for operation in every)
    title = f"Computed roofline of {rows} × {context} tokens a step on one {chip.kind}"
    made = Report(title, measured=False)
    for part in dict.fromkeys(operation.part for operation in every):
        own = [operation for operation in every if operation.part == part]
        flops, moved = (sum(getattr(o, name) for o in own) for name in ("flops", "moved"))
        by_memory = sum(seconds[o] for o in own if o.moved / chip.memory_bandwidth == seconds[o])
        least = sum(seconds[o] for o in own)
        made.add(
            part,
            flops=flops,
            moved=moved,
            compute=flops / chip.flops,
            memory=moved / chip.memory_bandwidth,
            least=least,
            share=least / total,
            limit="memory" if by_memory > least / 2 else "matrix products",
            measured=(measured or {}).get(part),
        )
    for part, spent in (measured or {}).items():
        if part not in made.rows:
            made.add(part, measured=spent)
    sums = {
        name: sum(row.get(name) or 0.0 for row in made.rows.values())
        for name in ("flops", "moved", "compute", "memory")
    }
    whole = sum(measured.values()) if measured else None
    made.add("sum", **sums, least=total, share=1.0, measured=whole)
    needed = flops_per_token(config, context) * rows * context
    made.notes.append(
        f"At most {rows * context / total:,.0f} tokens/s, an MFU of "
        f"{100 * needed / total / chip.flops:.1f} % of {chip.flops / 1e12:.0f} TFLOP/s "
        f"(FLOPs a token by 6 N + 12 L H C T, causality not deducted); "
        f"memory at {chip.memory_bandwidth / 1e12:.2f} TB/s."
    )
    return made


def chip_named(name: str) -> Chip:
    """The chip of that name.

    Raises:
        UserError: if there is none; the nearest is named.
    """
    if name not in CHIPS:
        raise UserError(f"unknown chip {name!r}{nearest(name, CHIPS)}")
    return CHIPS[name]


def main() -> None:
    settings = parse_flags(Settings, Settings(), str(__doc__))
    config = read_model(settings.model).replace(remat=settings.remat)
    context = settings.context or config.context_length
    measured = None
    if settings.trace is not None:
        from gptjax.profiling import by_part, costliest, explained

        steps = len(explained(settings.trace))
        parts = by_part(costliest(settings.trace, None))
        measured = {part: spent / steps for part, spent in parts.items()}
    chip = chip_named(settings.chip)
    made = report(config, chip, settings.batch_size, context, settings.accumulate, measured)
    made.title = f"{settings.model}: {made.title}"
    made.settings = settings
    made.show(COLUMNS)
    made.save(settings.json, settings.png, "least")


if __name__ == "__main__":
    run_command(main)
