"""Answers as is preferred, by direct preference optimization: before and after, side by side.

    python experiments/finetune_preferences.py --data instruction-data-with-preference.json

Both presets tune SmolLM2 by its own chat template, "cpu" by low-rank additions alone. --data is a
list of {"prompt", "chosen", "rejected"}, or {"instruction", "input", "output", "rejected"}, as
.json or .jsonl.
"""

from gptjax.command_line import parse, run_command
from gptjax.finetuning import PreferenceTuning, finetune
from gptjax.optimizer import OptimizerConfig
from gptjax.tasks import preference, read_sides

PRESETS = {
    "cpu": PreferenceTuning(
        preset="cpu",
        out="runs/preferences-cpu",
        data="instruction-data-with-preference.json",
        model="smollm2",
        steps=40,
        batch_size=4,
        context_length=192,
        lora_rank=8,
        few_shot=2,
        eval_items=100,
        validation_items=40,
        optimizer=OptimizerConfig(
            learning_rate=3e-4, warmup_steps=4, final_fraction=0.0, weight_decay=0.0
        ),
    ),
    "gpu": PreferenceTuning(
        preset="gpu",
        out="runs/preferences-gpu",
        data="instruction-data-with-preference.json",
        model="smollm2",
        steps=120,
        batch_size=16,
        context_length=384,
        few_shot=2,
        eval_items=100,
        eval_batch_size=64,
        validation_items=40,
        optimizer=OptimizerConfig(
            learning_rate=5e-6, warmup_steps=12, final_fraction=0.0, weight_decay=0.0
        ),
    ),
}


def main() -> None:
    settings = parse(PRESETS, "cpu", str(__doc__))
    train, test = read_sides(settings.data, settings.test_data)
    finetune(settings, preference(train, test, held_out=settings.eval_items))


if __name__ == "__main__":
    run_command(main)
