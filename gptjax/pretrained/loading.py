"""One function that opens whatever holds a model."""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax.checkpoint import read_metadata, restore_params
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.model import Model
from gptjax.params import init_params, param_shardings
from gptjax.tokenizer import tokenizer_from_dict


def load(name: str | Path, mesh: Mesh | None = None) -> Model:
    """Loads a model with its tokenizer.

    Args:
        name: a run folder of gptjax, its `checkpoints` folder, or one step's folder. Of a run the
            best checkpoint is taken, or the newest where the run had no evaluation data.
        mesh: where the parameters shall lie; None is the default device.

    Returns:
        The model; its tokenizer is None where the run had none. Where the run kept an average of
        the weights, these are the parameters.

    Raises:
        UserError: if there is nothing of that name, or it holds no complete checkpoint.
    """
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(f"{name} does not exist; give a run folder, such as runs/quickstart")
    return _load_checkpoint(path, mesh)


def _load_checkpoint(path: Path, mesh: Mesh | None) -> Model:
    step = "best"
    metadata = read_metadata(path, step)
    config = ModelConfig.from_dict(metadata["model"])
    abstract: Any = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    if mesh is not None:
        abstract = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            abstract,
            param_shardings(config, mesh),
        )
    averaged = bool((metadata.get("optimizer") or {}).get("ema_decay"))
    params = restore_params(path, abstract, step, part="ema_params" if averaged else "params")
    stored = metadata.get("tokenizer")
    return Model(config, params, None if stored is None else tokenizer_from_dict(stored))
