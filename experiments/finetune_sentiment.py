"""Says of a review whether it is positive or negative.

    python experiments/finetune_sentiment.py --data sst2/

"cpu" trains a small model from scratch on the Stanford Sentiment Treebank, in minutes; "gpu"
fine-tunes SmolLM2. --data is a folder with train.tsv and dev.tsv (text, tab, 0 or 1), a file with
fields "text" or "sentence" and "label", or of TFDS:

    --data tfds:glue/sst2@train --test-data tfds:glue/sst2@validation
    --data tfds:imdb_reviews@train --test-data tfds:imdb_reviews@test
"""

from gptjax.command_line import parse, run_command
from gptjax.config import preset
from gptjax.finetuning import SentimentTuning, finetune
from gptjax.optimizer import OptimizerConfig
from gptjax.tasks import read_sides, sentiment

PRESETS = {
    "cpu": SentimentTuning(
        preset="cpu",
        out="runs/sentiment-cpu",
        data="sst2",
        steps=800,
        batch_size=8,
        context_length=128,
        # Seven thousand labels teach little; the reviews themselves teach the words.
        prompt_weight=0.05,
        dropout=0.3,
        scratch=preset("char-gpt").replace(vocab_size=1, num_layers=2),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50, final_fraction=0.0),
    ),
    "gpu": SentimentTuning(
        preset="gpu",
        out="runs/sentiment-gpu",
        data="sst2",
        model="smollm2",
        steps=720,
        batch_size=4,
        context_length=256,
        eval_batch_size=64,
        optimizer=OptimizerConfig(
            learning_rate=5e-5, warmup_steps=72, final_fraction=0.0, weight_decay=0.01
        ),
    ),
}


def main() -> None:
    settings = parse(PRESETS, "cpu", str(__doc__))
    train, test = read_sides(settings.data, settings.test_data, ("text", "label"))
    finetune(settings, sentiment(train, test, labels=settings.labels, held_out=settings.eval_items))


if __name__ == "__main__":
    run_command(main)
