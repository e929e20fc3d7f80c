"""Character-level Shakespeare: nanoGPT's two recipes, and a modern one at the same token budget.

python experiments/shakespeare_char.py --preset cpu --data input.txt

"cpu" and "gpu" are nanoGPT's recipes in the GPT-2 architecture; "cpu-modern" and "gpu-modern" train
on as many tokens. Without --data the text (1.1 MB) is downloaded once.
"""

import hashlib
import os
import socket
import urllib.error
import urllib.request
from pathlib import Path

from gptjax.command_line import parse, run_command
from gptjax.config import ModelConfig, preset
from gptjax.errors import UserError
from gptjax.experiment import Experiment, train
from gptjax.hosts import is_main
from gptjax.optimizer import OptimizerConfig

URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/"
    "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt"
)
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DOWNLOADED = Path("data/tinyshakespeare.txt")

NANOGPT = OptimizerConfig(
    name="adamw",
    learning_rate=1e-3,
    schedule="cosine",
    warmup_steps=100,
    final_fraction=0.1,
    beta2=0.99,
    weight_decay=0.1,
    clip_norm=1.0,
)
MODERN = OptimizerConfig(
    name="muon",
    learning_rate=8e-3,
    matrix_learning_rate=0.02,
    schedule="wsd",
    warmup_steps=0,
    decay_fraction=0.5,
    final_fraction=0.0,
    beta2=0.98,
    weight_decay=0.0,
    clip_norm=None,
)


def _experiment(name: str, model: ModelConfig, optimizer: OptimizerConfig) -> Experiment:
    large = name.startswith("gpu")
    return Experiment(
        preset=name,
        out=f"runs/shakespeare-{name}",
        data=str(DOWNLOADED),
        tokenizer="characters",
        steps=5000 if large else 2000,
        batch_size=64 if large else 12,
        model=model.replace(vocab_size=1),
        optimizer=optimizer,
    )


PRESETS = {
    "cpu": _experiment("cpu", preset("char-gpt"), NANOGPT),
    "gpu": _experiment("gpu", preset("char-gpt-large").replace(dropout=0.2), NANOGPT),
    "cpu-modern": _experiment("cpu-modern", preset("char-gpt-modern"), MODERN),
    "gpu-modern": _experiment(
        "gpu-modern", preset("char-gpt-large-modern").replace(dropout=0.2), MODERN
    ),
}


def download() -> None:
    """Fetches the text, unless it is there.

    Raises:
        UserError: if it cannot be had or is not what it was.
    """
    if DOWNLOADED.exists():
        return
    try:
        with urllib.request.urlopen(URL, timeout=30) as answer:
            text = answer.read()
    except (urllib.error.URLError, OSError) as error:
        raise UserError(
            f"cannot download tiny Shakespeare ({error}); pass --data with a text file"
        ) from error
    if hashlib.sha256(text).hexdigest() != SHA256:
        raise UserError(f"what {URL} sends has changed; pass --data with a text file")
    DOWNLOADED.parent.mkdir(parents=True, exist_ok=True)
    # Other processes of a run may be doing the same.
    part = DOWNLOADED.with_name(f"{DOWNLOADED.name}.{socket.gethostname()}.{os.getpid()}")
    part.write_bytes(text)
    os.replace(part, DOWNLOADED)


def main() -> None:
    experiment = parse(PRESETS, "cpu", str(__doc__))
    if experiment.data == str(DOWNLOADED):
        download()
    result = train(experiment)
    if result.finished and is_main():
        print(f'Sample more: gptjax generate {result.out} "KING RICHARD:"')


if __name__ == "__main__":
    run_command(main)
