"""The real train step compiled for TPUs that are not there, and what the compiler says of it.

    pip install -e ".[plan]"
    python experiments/benchmarks/tpu_programs.py --only gpt2
    python experiments/benchmarks/tpu_programs.py --json tpu_programs.json

prints a table in Markdown, a row for each target, each compiled in a process of its own. The
matrix products of the compiled program are counted in its text, loops by their length, those of
attention's kernel in the trace; both, and the model's own, count all pairs of tokens, though the
kernel leaves out the blocks above the diagonal. Cycles are those that the compiler reckons for all
operations of a device but kernels and collectives that are waited for.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjax.command_line import parse_flags, run_command
from gptjax.config import preset
from gptjax.errors import UserError, nearest
from gptjax.planning import plan
from gptjax.planning.report import mesh_name

GIB = 2**30


@dataclass(frozen=True)
class Target:
    """A model, the chips that its step is compiled for, and how many sequences a step has."""

    model: str
    topology: str
    mesh: str
    batch: int


TARGETS = {
    "gpt2": Target("gpt2", "v6e:1x1", "data=1", 16),
    "gpt2-xl": Target("gpt2-xl", "v5e:2x4", "fsdp=8", 64),
    # What Google calls v5p-64 has 64 cores, which are 32 chips.
    "llama3-8b": Target("llama3-8b", "v5p:4x4x2", "fsdp=32", 32),
    "gpt3-175b": Target("gpt3-175b", "v5p:8x8x8", "fsdp=64,tensor=8", 512),
}


@dataclass(frozen=True)
class Settings:
    """What to compile.

    Attributes:
        only: One target: gpt2, gpt2-xl, llama3-8b or gpt3-175b.
        remat: What the backward pass recomputes: none, dots, full or offload; auto is the first
            that fits.
        json: A file that the rows are written to as JSON, too.
    """

    only: str | None = None
    remat: str = "auto"
    json: str | None = None


COLUMNS: dict[str, Any] = {
    "model": lambda row: row["name"],
    "chips": lambda row: row["topology"],
    "mesh": lambda row: mesh_name(row["mesh"]),
    "batch": lambda row: f"{row['batch']} × {row['context']}",
    "remat": lambda row: row["remat"],
    "compile s": lambda row: f"{row['compile_seconds']:.0f}",
    "peak GiB": lambda row: f"{row['peak_bytes_per_chip'] / GIB:.2f}",
    "FLOPs a token, model": lambda row: f"{row['flops_per_token']:.3e}",
    "and recomputed": lambda row: f"{row['stated_flops_per_token'] - row['flops_per_token']:.2e}",
    "in the program": lambda row: f"{row['program_flops_per_token']:.3e}",
    "ratio": lambda row: f"{row['program_flops_per_token'] / row['stated_flops_per_token']:.3f}",
    "logits at once, MiB": lambda row: f"{row['logits_bytes'] / 2**20:.0f}",
    "of all": lambda row: f"{row['logits_share']:.0%}",
    "padding": lambda row: f"{row['padding']:.1%}",
    "by the mesh": lambda row: f"{row['added_padding']:.1%}",
    "cycles": lambda row: f"{row['cycles']:.3e}",
    "gathers in loops, overlapped": lambda row: (
        f"{row['loop_gathers_overlapped']} of {row['loop_gathers']}"
    ),
    "of their bytes": lambda row: f"{row['loop_gathers_share']:.0%}",
}


def compiled_row(name: str, remat: str) -> dict[str, Any]:
    """What the plan of a target says, JSON-serializable.

    Args:
        name: of the target.
        remat: as `plan` takes it.
    """
    target = TARGETS[name]
    config = preset(target.model)
    options: Any = {"batch": target.batch, "mesh": target.mesh, "remat": remat}
    made = plan(config, target.topology, **options)
    # Rows and vocabulary are split over all chips.
    whole = 4 * made.batch * made.context * config.vocab_size / made.chips
    share = (made.logits_bytes or 0) / whole
    return {"name": name, "logits_share": share} | made.to_dict()


def main() -> None:
    """Compiles the targets and prints the table."""
    settings = parse_flags(Settings, Settings(), __doc__ or "", None)
    if settings.only is not None and settings.only not in TARGETS:
        raise UserError(f"--only is {settings.only!r}{nearest(settings.only, TARGETS)}")
    names = TARGETS if settings.only is None else [settings.only]
    rows: list[dict[str, Any]] = []
    print("| " + " | ".join(COLUMNS) + " |")
    print("| --- " * len(COLUMNS) + "|", flush=True)
    for name in names:
        if settings.only is not None:
            row = compiled_row(name, settings.remat)
        else:
            # A process for each: what the compiler keeps would else add up.
            script = (
                "import json, sys; from tpu_programs import compiled_row; "
                "print('ROW' + json.dumps(compiled_row(*sys.argv[1:])))"
            )
            done = subprocess.run(
                [sys.executable, "-c", script, name, settings.remat],
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise UserError(f"{name} could not be compiled: {done.stderr[-2000:]}")
            row = json.loads(done.stdout.partition("ROW")[2])
        rows.append(row)
        print("| " + " | ".join(cell(row) for cell in COLUMNS.values()) + " |", flush=True)
    if settings.json is not None:
        Path(settings.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
