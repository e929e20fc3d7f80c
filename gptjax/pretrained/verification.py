"""Whether a model on disk is whole, and computes what transformers computes."""

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.model import Model, forward
from gptjax.params import count_params, flat

TOLERANCE = 1e-4
"""The largest difference of logits that passes, as a share of the largest logit."""


class Check(NamedTuple):
    """One thing that was looked at."""

    name: str
    """Of what was looked at."""
    passed: bool | None
    """None where it could not be looked at."""
    detail: str
    """What was found."""


def verify_model(name: str | Path, *, seed: int = 0) -> Iterator[Check]:
    """Loads a model and checks it, step by step.

    Args:
        name: as in `load`.
        seed: of the random tokens that logits are compared on.

    Yields:
        Checks: that the files are whole and are the model's (by loading them), that every number
        is finite, that the tokenizer belongs to the model and gives a text back, and that logits
        are those of transformers in float32 where it and PyTorch are installed.

    Raises:
        UserError: if the model cannot be loaded; see `load`.
    """
    from gptjax.pretrained.hub import find
    from gptjax.pretrained.loading import load

    model = load(name)
    config = model.config
    yield Check("files", True, f"{count_params(config):,} parameters, all there")
    bad = [path for path, leaf in flat(model.params).items() if not bool(jnp.isfinite(leaf).all())]
    yield Check("numbers", not bad, f"not finite in {', '.join(bad)}" if bad else "all finite")
    yield _tokenizer_check(model)
    yield _logits_check(model, find(name), seed)


def _tokenizer_check(model: Model) -> Check:
    tokenizer = model.tokenizer
    if tokenizer is None:
        return Check("tokenizer", None, "none came with the model")
    text = "I love programming"
    try:
        ids = tokenizer.encode(text)
    except ValueError as error:  # A character tokenizer may not know these letters.
        return Check("tokenizer", None, str(error))
    back = tokenizer.decode(ids)
    fits = max(ids, default=0) < model.config.vocab_size
    detail = f"{tokenizer.vocab_size} tokens; {text!r} is {ids}"
    if not fits:
        detail += f", beyond the model's vocabulary of {model.config.vocab_size}"
    if back.strip() != text:
        detail += f", which come back as {back!r}"
    return Check("tokenizer", fits and back.strip() == text, detail)


def _logits_check(model: Model, path: Path, seed: int) -> Check:
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return Check("logits", None, "transformers and PyTorch are not installed")
    from gptjax.errors import UserError
    from gptjax.pretrained.huggingface import is_directory, save_pretrained

    config = model.config.replace(compute_dtype="float32")
    generator = np.random.default_rng(seed)
    length = min(config.context_length, 64)
    tokens = generator.integers(0, config.vocab_size, (2, length))
    with jax.default_matmul_precision("highest"), tempfile.TemporaryDirectory() as folder:
        if path.is_dir() and is_directory(path):
            opened: Any = path
        else:
            # What is in no layout of transformers is compared through our own export.
            opened = folder
            try:
                save_pretrained(model, folder)
            except UserError as error:
                return Check("logits", None, str(error))
        try:
            expected = _transformers_logits(opened, tokens)
        except Exception as error:  # Whatever transformers raises about a model.
            reason = (str(error).splitlines() or [""])[0]
            text = f"transformers does not open it: {type(error).__name__}: {reason}"
            return Check("logits", False, text)
        got = np.asarray(forward(model.params, jnp.asarray(tokens, jnp.int32), config))
    scale = float(np.abs(expected).max())
    difference = float(np.abs(got - expected).max()) / scale
    return Check(
        "logits",
        difference <= TOLERANCE,
        f"differ from transformers' by at most {difference:.1e} of the largest "
        f"(allowed: {TOLERANCE:.0e})",
    )


def _transformers_logits(path: Any, tokens: np.ndarray) -> np.ndarray:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(path), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.float().numpy()
