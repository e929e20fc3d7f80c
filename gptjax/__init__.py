"""GPT language models in JAX as pure functions.

The names below are the public face. They are loaded when first used, so that importing gptjax costs
little more than importing jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "ModelConfig": "gptjax.config",
    "preset": "gptjax.config",
    "UserError": "gptjax.errors",
    "make_mesh": "gptjax.sharding",
    "parse_mesh": "gptjax.sharding",
    "count_params": "gptjax.params",
    "init_params": "gptjax.params",
    "param_specs": "gptjax.params",
    "Model": "gptjax.model",
    "forward": "gptjax.model",
    "LossOptions": "gptjax.loss",
    "loss_fn": "gptjax.loss",
    "OptimizerConfig": "gptjax.optimizer",
    "make_optimizer": "gptjax.optimizer",
    "TrainState": "gptjax.training",
    "init_state": "gptjax.training",
    "make_train_step": "gptjax.training",
    "Sampling": "gptjax.sampling",
    "Continuation": "gptjax.generation",
    "generate": "gptjax.generation",
    "generate_continuations": "gptjax.generation",
    "generate_text": "gptjax.text_generation",
    "generate_chat": "gptjax.text_generation",
    "stream_text": "gptjax.text_generation",
    "Plan": "gptjax.planning",
    "choose_mesh": "gptjax.planning",
    "plan": "gptjax.planning",
    "FitResult": "gptjax.fitting",
    "fit": "gptjax.fitting",
    "decoding_params": "gptjax.layouts",
    "quantize": "gptjax.layouts",
    "DraftModel": "gptjax.speculation",
    "PromptLookup": "gptjax.speculation",
    "Completion": "gptjax.batching",
    "generate_queue": "gptjax.batching",
    "generate_texts": "gptjax.batching",
    "generate_file": "gptjax.prompt_files",
    "Regex": "gptjax.constrained",
    "JSONSchema": "gptjax.constrained",
    "ConstrainedText": "gptjax.constrained",
    "generate_constrained": "gptjax.constrained",
    "beam_search": "gptjax.beams",
    "choose": "gptjax.choice",
    "Score": "gptjax.scoring",
    "score": "gptjax.scoring",
    "load": "gptjax.pretrained.loading",
    "save_pretrained": "gptjax.pretrained.huggingface",
}

if TYPE_CHECKING:
    from gptjax.batching import Completion, generate_queue, generate_texts
    from gptjax.beams import beam_search
    from gptjax.choice import choose
    from gptjax.config import ModelConfig, preset
    from gptjax.constrained import ConstrainedText, JSONSchema, Regex, generate_constrained
    from gptjax.errors import UserError
    from gptjax.fitting import FitResult, fit
    from gptjax.generation import Continuation, generate, generate_continuations
    from gptjax.layouts import decoding_params, quantize
    from gptjax.loss import LossOptions, loss_fn
    from gptjax.model import Model, forward
    from gptjax.optimizer import OptimizerConfig, make_optimizer
    from gptjax.params import count_params, init_params, param_specs
    from gptjax.planning import Plan, choose_mesh, plan
    from gptjax.pretrained.huggingface import save_pretrained
    from gptjax.pretrained.loading import load
    from gptjax.prompt_files import generate_file
    from gptjax.sampling import Sampling
    from gptjax.scoring import Score, score
    from gptjax.sharding import make_mesh, parse_mesh
    from gptjax.speculation import DraftModel, PromptLookup
    from gptjax.text_generation import generate_chat, generate_text, stream_text
    from gptjax.training import TrainState, init_state, make_train_step

__all__ = [
    "Completion",
    "ConstrainedText",
    "Continuation",
    "DraftModel",
    "FitResult",
    "JSONSchema",
    "LossOptions",
    "Model",
    "ModelConfig",
    "OptimizerConfig",
    "Plan",
    "PromptLookup",
    "Regex",
    "Sampling",
    "Score",
    "TrainState",
    "UserError",
    "beam_search",
    "choose",
    "choose_mesh",
    "count_params",
    "decoding_params",
    "fit",
    "forward",
    "generate",
    "generate_chat",
    "generate_constrained",
    "generate_continuations",
    "generate_file",
    "generate_queue",
    "generate_text",
    "generate_texts",
    "init_params",
    "init_state",
    "load",
    "loss_fn",
    "make_mesh",
    "make_optimizer",
    "make_train_step",
    "param_specs",
    "parse_mesh",
    "plan",
    "preset",
    "quantize",
    "save_pretrained",
    "score",
    "stream_text",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gptjax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOMES))
