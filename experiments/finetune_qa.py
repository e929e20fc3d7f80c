"""Answers questions about a paragraph by its words.

    python experiments/finetune_qa.py --preset gpu --data xquad.en.json

Both presets fine-tune SmolLM2, "cpu" by low-rank additions alone. --data is a file in SQuAD's form
(such as XQuAD's; --language tells how answers are compared), of which whole paragraphs are held
out, or of TFDS:

    --data tfds:squad@train --test-data tfds:squad@validation
"""

from gptjax.command_line import parse, run_command
from gptjax.finetuning import QuestionTuning, finetune
from gptjax.optimizer import OptimizerConfig
from gptjax.tasks import question_answering, read_sides

PRESETS = {
    "cpu": QuestionTuning(
        preset="cpu",
        out="runs/qa-cpu",
        data="xquad.en.json",
        model="smollm2",
        steps=100,
        batch_size=2,
        context_length=512,
        lora_rank=8,
        few_shot=2,
        eval_items=50,
        eval_batch_size=8,
        validation_items=50,
        optimizer=OptimizerConfig(
            learning_rate=5e-4, warmup_steps=10, final_fraction=0.0, weight_decay=0.0
        ),
    ),
    "gpu": QuestionTuning(
        preset="gpu",
        out="runs/qa-gpu",
        data="xquad.en.json",
        model="smollm2",
        steps=300,
        batch_size=4,
        context_length=1024,
        eval_items=200,
        eval_batch_size=64,
        validation_items=50,
        optimizer=OptimizerConfig(
            learning_rate=1e-4, warmup_steps=30, final_fraction=0.0, weight_decay=0.01
        ),
    ),
}


def main() -> None:
    settings = parse(PRESETS, "cpu", str(__doc__))
    train, test = read_sides(settings.data, settings.test_data)
    task = question_answering(train, test, language=settings.language, held_out=settings.eval_items)
    finetune(settings, task)


if __name__ == "__main__":
    run_command(main)
