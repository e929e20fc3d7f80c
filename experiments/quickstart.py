"""Trains a small GPT on the documentation that ships inside Python, in about two minutes on a CPU.

    python experiments/quickstart.py

Needs no network and no accelerator. Ends with the loss curve and a sample, and can be stopped and
started again at any time.
"""

from gptjax.command_line import parse, run_command
from gptjax.config import preset
from gptjax.experiment import Experiment, train
from gptjax.hosts import is_main
from gptjax.optimizer import OptimizerConfig

QUICKSTART = Experiment(
    preset="quickstart",
    out="runs/quickstart",
    tokenizer="bpe",
    bpe_vocab_size=1024,
    steps=800,
    batch_size=12,
    eval_every=200,
    prompt="The ",
    model=preset("char-gpt-modern").replace(vocab_size=1),
    optimizer=OptimizerConfig(
        name="muon",
        learning_rate=8e-3,
        matrix_learning_rate=0.02,
        schedule="wsd",
        warmup_steps=20,
        decay_fraction=0.5,
        final_fraction=0.0,
        weight_decay=0.0,
        beta2=0.98,
    ),
)


def main() -> None:
    experiment = parse({"quickstart": QUICKSTART}, "quickstart", str(__doc__))
    result = train(experiment)
    if result.finished and is_main():
        print(f'Sample more: gptjax generate {result.out} "The function "')


if __name__ == "__main__":
    run_command(main)
