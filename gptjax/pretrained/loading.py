"""One function that opens whatever holds a model."""

from pathlib import Path

from jax.sharding import Mesh

from gptjax.checkpoint import find_checkpoint, read_metadata, restore_params
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.model import Model
from gptjax.params import abstract_params
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
    try:
        found, _ = find_checkpoint(path, "best")
    except UserError:
        found, _ = find_checkpoint(path)
    folder = Path(found)
    metadata = read_metadata(folder)
    config = ModelConfig.from_dict(metadata["model"])
    optimizer = metadata.get("optimizer") or {}
    averaged = optimizer.get("ema_decay") is not None
    params = restore_params(
        folder, abstract_params(config, mesh), name="ema_params" if averaged else "params"
    )
    stored = metadata.get("tokenizer")
    return Model(config, params, None if stored is None else tokenizer_from_dict(stored))
