"""One function that opens whatever holds a model."""

from pathlib import Path

import optax
from jax.sharding import Mesh

from gptjax.checkpoint import (
    CheckpointManager,
    find_checkpoint,
    read_metadata,
    restore_params,
)
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.model import Model
from gptjax.optimizer import OptimizerConfig, make_optimizer
from gptjax.tokenizer import tokenizer_from_dict
from gptjax.training import abstract_state


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
    try:
        found, step = find_checkpoint(path, "best")
    except UserError:
        found, step = find_checkpoint(path)
    folder = Path(found)
    metadata = read_metadata(folder)
    config = ModelConfig.from_dict(metadata["model"])
    optimizer = metadata.get("optimizer") or {}
    if optimizer.get("ema_decay") is not None:
        transformation = make_optimizer(OptimizerConfig(**optimizer), config, metadata["steps"])
        abstract = abstract_state(config, transformation, mesh, ema=True)
        with CheckpointManager(folder.parent) as manager:
            params = manager.restore(abstract, step).state.ema_params
    else:
        abstract = abstract_state(config, optax.identity(), mesh).params
        params = restore_params(folder, abstract)
    stored = metadata.get("tokenizer")
    return Model(config, params, None if stored is None else tokenizer_from_dict(stored))
