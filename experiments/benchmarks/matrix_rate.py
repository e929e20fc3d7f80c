"""How many floating-point operations a second the device does in one matrix product.

    python experiments/benchmarks/matrix_rate.py --width 8192

What a train step can at best come near: chips do not reach their data sheets' rates for long, since
power and clocks limit them. The sheet's rate stands beside it.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from measuring import Column, Report, in_own_process

from gptjax.command_line import configure_jax, parse_flags, run_command
from gptjax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Times products of two square matrices.

    Attributes:
        width: Of the matrices.
        dtype: Of their numbers.
        turns: How often the rate is measured.
        seconds: About how long each turn takes.
        json: A file to write the results to.
        png: A picture of the rate.
    """

    width: int = 8192
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    turns: int = 5
    seconds: float = 1.0
    json: Path | None = None
    png: Path | None = None


def rates(settings: Settings) -> dict[str, object]:
    """Operations a second by turn, and the device."""
    configure_jax()
    import jax
    import jax.numpy as jnp

    from gptjax.devices import find_chip

    width = settings.width
    keys = jax.random.split(jax.random.key(0))
    # Random numbers: a chip that multiplies zeros takes less power, and is faster.
    a, b = (jax.random.normal(key, (width, width), jnp.dtype(settings.dtype)) for key in keys)
    scaled = b / width**0.5
    # Chained, so that no product is left out; the scale keeps the numbers where they are.
    product = jax.jit(lambda x, y: x @ y)
    x = product(a, scaled)
    start = time.perf_counter()
    jax.block_until_ready(product(x, scaled))
    once = time.perf_counter() - start
    repeats = max(1, min(1000, round(settings.seconds / once)))
    found = []
    for _ in range(settings.turns):
        start = time.perf_counter()
        for _ in range(repeats):
            x = product(x, scaled)
        jax.block_until_ready(x)
        found.append(2 * width**3 * repeats / (time.perf_counter() - start))
    device = jax.devices()[0]
    chip = find_chip(device.device_kind)
    sheet = None if chip is None else chip.flops / chip.devices
    return {"rates": found, "device": device.device_kind, "sheet": sheet}


def main() -> None:
    settings = parse_flags(Settings, Settings(), str(__doc__))
    if min(settings.width, settings.turns) < 1:
        raise UserError("width and turns are at least 1")
    found = in_own_process(rates, settings)
    report = Report(f"{settings.dtype} products of {settings.width}-wide matrices", settings)
    report.add(found["device"], flops=found["rates"])
    report.extra |= {"matrix_rate": statistics.median(found["rates"]), "device": found["device"]}
    if found["sheet"] is not None:
        report.add("its data sheet", flops=found["sheet"])
        report.extra["sheet"] = found["sheet"]
    report.show({"flops": Column("TFLOP/s", 2, 1e-12)})
    report.save(settings.json, settings.png, "flops")


if __name__ == "__main__":
    run_command(main)
