"""GPT language models in JAX as pure functions.

The names below are the public face. They are loaded when first used, so that importing gptjax costs
little more than importing jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "__version__": "gptjax.version",
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
    "DPO": "gptjax.preferences",
    "PreferenceLoader": "gptjax.preferences",
    "Preference": "gptjax.preferences",
    "LoRA": "gptjax.adapters",
    "Only": "gptjax.adapters",
    "merge_params": "gptjax.adapters",
    "load_adapter": "gptjax.pretrained.adapter_files",
    "save_adapter": "gptjax.pretrained.adapter_files",
    "tokenize": "gptjax.data.tokenizing",
    "open_token_shards": "gptjax.data.token_shards",
    "verify_token_shards": "gptjax.data.token_shards",
    "evaluate_pairs": "gptjax.evaluation.bias",
    "longest_overlaps": "gptjax.evaluation.memorization",
    "tokens_by_script": "gptjax.data.languages",
    "write_model_card": "gptjax.model_card",
    "Loglikelihood": "gptjax.evaluation.loglikelihood",
    "loglikelihoods": "gptjax.evaluation.loglikelihood",
    "Estimate": "gptjax.evaluation.results",
    "run_suites": "gptjax.evaluation.suites",
    "Inspection": "gptjax.inspection",
    "LogitLens": "gptjax.inspection",
    "inspect": "gptjax.inspection",
    "logit_lens": "gptjax.inspection",
    "token_labels": "gptjax.inspection",
    "plot_attention": "gptjax.plots",
    "plot_logit_lens": "gptjax.plots",
    "plot_losses": "gptjax.plots",
    "plot_memory": "gptjax.plots",
    "plot_norms": "gptjax.plots",
    "plot_plan": "gptjax.plots",
    "plot_reliability": "gptjax.plots",
    "plot_sharding": "gptjax.plots",
    "from_flax_params": "gptjax.pretrained.flax_files",
    "to_flax_params": "gptjax.pretrained.flax_files",
    "load": "gptjax.pretrained.loading",
    "save_pretrained": "gptjax.pretrained.huggingface",
}

if TYPE_CHECKING:
    from gptjax.adapters import LoRA, Only, merge_params
    from gptjax.batching import Completion, generate_queue, generate_texts
    from gptjax.beams import beam_search
    from gptjax.choice import choose
    from gptjax.config import ModelConfig, preset
    from gptjax.constrained import ConstrainedText, JSONSchema, Regex, generate_constrained
    from gptjax.data.languages import tokens_by_script
    from gptjax.data.token_shards import open_token_shards, verify_token_shards
    from gptjax.data.tokenizing import tokenize
    from gptjax.errors import UserError
    from gptjax.evaluation.bias import evaluate_pairs
    from gptjax.evaluation.loglikelihood import Loglikelihood, loglikelihoods
    from gptjax.evaluation.memorization import longest_overlaps
    from gptjax.evaluation.results import Estimate
    from gptjax.evaluation.suites import run_suites
    from gptjax.fitting import FitResult, fit
    from gptjax.generation import Continuation, generate, generate_continuations
    from gptjax.inspection import Inspection, LogitLens, inspect, logit_lens, token_labels
    from gptjax.layouts import decoding_params, quantize
    from gptjax.loss import LossOptions, loss_fn
    from gptjax.model import Model, forward
    from gptjax.model_card import write_model_card
    from gptjax.optimizer import OptimizerConfig, make_optimizer
    from gptjax.params import count_params, init_params, param_specs
    from gptjax.planning import Plan, choose_mesh, plan
    from gptjax.plots import (
        plot_attention,
        plot_logit_lens,
        plot_losses,
        plot_memory,
        plot_norms,
        plot_plan,
        plot_reliability,
        plot_sharding,
    )
    from gptjax.preferences import DPO, Preference, PreferenceLoader
    from gptjax.pretrained.adapter_files import load_adapter, save_adapter
    from gptjax.pretrained.flax_files import from_flax_params, to_flax_params
    from gptjax.pretrained.huggingface import save_pretrained
    from gptjax.pretrained.loading import load
    from gptjax.prompt_files import generate_file
    from gptjax.sampling import Sampling
    from gptjax.scoring import Score, score
    from gptjax.sharding import make_mesh, parse_mesh
    from gptjax.speculation import DraftModel, PromptLookup
    from gptjax.text_generation import generate_chat, generate_text, stream_text
    from gptjax.training import TrainState, init_state, make_train_step
    from gptjax.version import __version__ as __version__

__all__ = [
    "DPO",
    "Completion",
    "ConstrainedText",
    "Continuation",
    "DraftModel",
    "Estimate",
    "FitResult",
    "Inspection",
    "JSONSchema",
    "LoRA",
    "LogitLens",
    "Loglikelihood",
    "LossOptions",
    "Model",
    "ModelConfig",
    "Only",
    "OptimizerConfig",
    "Plan",
    "Preference",
    "PreferenceLoader",
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
    "evaluate_pairs",
    "fit",
    "forward",
    "from_flax_params",
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
    "inspect",
    "load",
    "load_adapter",
    "logit_lens",
    "loglikelihoods",
    "longest_overlaps",
    "loss_fn",
    "make_mesh",
    "make_optimizer",
    "make_train_step",
    "merge_params",
    "open_token_shards",
    "param_specs",
    "parse_mesh",
    "plan",
    "plot_attention",
    "plot_logit_lens",
    "plot_losses",
    "plot_memory",
    "plot_norms",
    "plot_plan",
    "plot_reliability",
    "plot_sharding",
    "preset",
    "quantize",
    "run_suites",
    "save_adapter",
    "save_pretrained",
    "score",
    "stream_text",
    "to_flax_params",
    "token_labels",
    "tokenize",
    "tokens_by_script",
    "verify_token_shards",
    "write_model_card",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gptjax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOMES))
