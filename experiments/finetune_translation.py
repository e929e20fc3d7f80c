"""Translates sentences.

    python experiments/finetune_translation.py --preset gpu --data cmn.txt

"cpu" trains a small model from scratch, "gpu" fine-tunes SmolLM2 to translate Chinese. --data is a
file with a sentence in one language, a tab and its translation a line (as manythings.org/anki has
them of Tatoeba; --columns names the languages), or of TFDS:

    --data tfds:para_crawl/ende@train[:100000] --source en --target de
    --data tfds:ted_multi_translate@train --source zh-cn --target en
"""

from gptjax.command_line import parse, run_command
from gptjax.config import preset
from gptjax.finetuning import TranslationTuning, finetune
from gptjax.optimizer import OptimizerConfig
from gptjax.tasks import read_sides, translation

PRESETS = {
    "cpu": TranslationTuning(
        preset="cpu",
        out="runs/translation-cpu",
        data="cmn.txt",
        steps=2000,
        batch_size=8,
        context_length=128,
        bpe_vocab_size=8192,
        prompt_weight=0.1,
        dropout=0.1,
        eval_items=200,
        scratch=preset("char-gpt").replace(vocab_size=1, embed_dim=256, num_heads=8),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100, final_fraction=0.0),
    ),
    "gpu": TranslationTuning(
        preset="gpu",
        out="runs/translation-gpu",
        data="cmn.txt",
        model="smollm2",
        steps=600,
        batch_size=32,
        context_length=256,
        # SmolLM2 has hardly seen Chinese, and learns to read it here.
        prompt_weight=0.2,
        eval_items=1000,
        eval_batch_size=128,
        optimizer=OptimizerConfig(
            learning_rate=2e-4, warmup_steps=60, final_fraction=0.0, weight_decay=0.1
        ),
    ),
}


def main() -> None:
    settings = parse(PRESETS, "cpu", str(__doc__))
    train, test = read_sides(settings.data, settings.test_data, settings.columns)
    task = translation(
        train,
        test,
        source=settings.source,
        target=settings.target,
        held_out=settings.eval_items,
    )
    finetune(settings, task)


if __name__ == "__main__":
    run_command(main)
