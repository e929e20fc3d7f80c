"""Follows instructions: the loss of answers before and after, and some answers side by side.

    python experiments/finetune_chat.py --data instruction-data.json

Both presets fine-tune SmolLM2 by its own chat template, "cpu" by low-rank additions alone. --data
is a list of {"instruction", "input", "output"} as .json or .jsonl, or dialogues as "messages".
"""

from gptjax.command_line import parse, run_command
from gptjax.finetuning import FineTuning, finetune
from gptjax.optimizer import OptimizerConfig
from gptjax.tasks import conversation, read_sides

PRESETS = {
    "cpu": FineTuning(
        preset="cpu",
        out="runs/chat-cpu",
        data="instruction-data.json",
        model="smollm2",
        steps=40,
        batch_size=4,
        context_length=256,
        lora_rank=8,
        eval_items=100,
        validation_items=40,
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_steps=4, final_fraction=0.0, weight_decay=0.0
        ),
    ),
    "gpu": FineTuning(
        preset="gpu",
        out="runs/chat-gpu",
        data="instruction-data.json",
        model="smollm2",
        steps=150,
        batch_size=8,
        context_length=512,
        eval_items=100,
        eval_batch_size=64,
        validation_items=40,
        optimizer=OptimizerConfig(
            learning_rate=5e-5, warmup_steps=15, final_fraction=0.0, weight_decay=0.01
        ),
    ),
}


def main() -> None:
    settings = parse(PRESETS, "cpu", str(__doc__))
    train, test = read_sides(settings.data, settings.test_data)
    finetune(settings, conversation(train, test, held_out=settings.eval_items))


if __name__ == "__main__":
    run_command(main)
