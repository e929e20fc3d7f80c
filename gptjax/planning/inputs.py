"""What the command line gives a plan: a model by its name, numbers with suffixes, a batch."""

import math

from gptjax.config import PRESETS, ModelConfig, preset
from gptjax.errors import UserError
from gptjax.planning.topology import abstract_mesh, parse_topology
from gptjax.sharding import axis_parts, mesh_axes

_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def parse_number(text: str, name: str) -> float:
    """Reads "3.2M" or "300B" as a number above 0.

    Args:
        text: what was given.
        name: of what, for the error.

    Raises:
        UserError: if it is none.
    """
    digits = text.strip().replace(",", "").replace("_", "")
    factor = _SUFFIXES.get(digits[-1:].upper())
    try:
        number = float(digits if factor is None else digits[:-1]) * (factor or 1)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise UserError(f"{name} is {text!r}; a number above 0, such as 512, 3.2M, 300B or 1.5T")
    return number


def read_model(name: str) -> ModelConfig:
    """The configuration of a preset, a folder in Hugging Face's layout, or a run.

    Weights are not read and need not be there.

    Raises:
        UserError: if it is none of these; for a name the nearest preset is named.
    """
    from pathlib import Path

    from gptjax.checkpoint import read_metadata
    from gptjax.pretrained.families import read_config
    from gptjax.pretrained.json_files import read_json

    path = Path(name).expanduser()
    if name in PRESETS or not path.exists():
        return preset(name)
    file = path / "config.json"
    values = read_json(file) if file.is_file() else {}
    if "model_type" in values:
        return read_config(values, str(file))[1]
    return ModelConfig.from_dict(read_metadata(path)["model"])


def sequences(
    batch: str | None,
    batch_tokens: str | None,
    config: ModelConfig,
    topology: str,
    mesh: str,
    accumulate: int,
) -> int:
    """The sequences of a step from one of the two ways to say it.

    A number of tokens is rounded to a number of sequences that divides over the mesh; where the
    mesh is still to be chosen, over all devices, or up to a divisor of their number.

    Args:
        batch: sequences, as a flag gives them.
        batch_tokens: tokens, as a flag gives them: 3.2M.
        config: the model, whose context is the length of a sequence.
        topology: the name of the chips.
        mesh: axes and sizes, or "auto".
        accumulate: microbatches that a batch is split into.

    Raises:
        UserError: if not exactly one is given, or it is no whole number of sequences.
    """
    if (batch is None) == (batch_tokens is None):
        raise UserError("give --batch SEQUENCES or --batch-tokens TOKENS, one of them")
    if batch is not None:
        number = parse_number(batch, "--batch")
        if number != int(number):
            raise UserError(f"--batch is {batch!r}; a whole number of sequences")
        return int(number)
    wanted = parse_number(batch_tokens or "", "--batch-tokens") / config.context_length
    devices = parse_topology(topology).devices
    if mesh == "auto":
        if wanted < devices:
            legal = [n for n in range(1, devices + 1) if devices % n == 0]
            return min(legal, key=lambda n: abs(n - wanted))
        parts = devices * accumulate
    else:
        axes = mesh_axes(mesh, devices)
        parts = axis_parts("batch", abstract_mesh(axes)) * accumulate
    return max(1, round(wanted / parts)) * parts
