"""What a chip holds of a model's parameters and optimizer state, from 8 to 512 chips.

    python experiments/benchmarks/memory_per_chip.py --model gpt3-175b --batch 512

prints a table in Markdown. Both are exact: the shapes of each device's parts, by the shardings of
the train state. `--compile True` also compiles the train step for each size (a TPU v5p slice),
where libtpu is installed, and adds the peak.
"""

from dataclasses import dataclass

from gptjax.command_line import parse_flags, run_command
from gptjax.planning import plan
from gptjax.planning.inputs import read_model

SLICES = ("2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
GIB = 2**30


@dataclass(frozen=True)
class Settings:
    """What to tabulate.

    Attributes:
        model: A preset, a folder in Hugging Face's layout, or a run folder.
        batch: Sequences a step.
        mesh: The axes; -1 is what is left.
        compile: Whether each step is compiled, too.
    """

    model: str = "gpt3-175b"
    batch: int = 512
    mesh: str = "fsdp=-1"
    compile: bool = False


def main() -> None:
    """Prints the table."""
    settings = parse_flags(Settings, Settings(), __doc__ or "", None)
    config = read_model(settings.model)
    columns = ["chips", "parameters", "optimizer", "both, times chips"]
    columns += ["peak"] if settings.compile else []
    print("| " + " | ".join(columns) + " |")
    print("| --- " * len(columns) + "|")
    for layout in SLICES:
        made = plan(
            config,
            f"v5p:{layout}",
            batch=settings.batch,
            mesh=settings.mesh,
            remat="full",
            compile=settings.compile,
        )
        parameters, optimizer = (made.memory[name] / GIB for name in ("parameters", "optimizer"))
        cells = [f"{made.chips}", f"{parameters:.2f}", f"{optimizer:.2f}"]
        cells.append(f"{(parameters + optimizer) * made.chips:.0f}")
        if settings.compile:
            peak = f"{made.peak_bytes_per_chip / GIB:.2f}"
            cells.append(peak if made.fits else f"{peak}, does not fit")
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    run_command(main)
