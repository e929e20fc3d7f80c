"""A vocabulary for Chinese, and a small model that translates it into English, both from scratch.

    python experiments/chinese.py --data cmn.txt --compare gpt2/ bytes

First a byte-level BPE is trained on the Chinese sentences of --data, but for every tenth, and the
tokens are counted that these need, and need with other tokenizers. Then a model learns to translate
from the pairs, with a BPE of both languages, and what it says of held-out sentences is measured and
shown. --data is what finetune_translation.py takes, such as the pairs of Tatoeba, which are on
manythings.org/anki: English, a tab, Chinese. With --text FILE the vocabulary is trained, and tokens
are counted, on another text. gptjax generate runs/chinese translates afterwards; a prompt is
"Chinese:", a sentence, and on the next line "English:".
"""

from gptjax.command_line import parse, run_command
from gptjax.config import preset
from gptjax.data.examples import text_of
from gptjax.data.languages import compare_tokenizers, print_scripts
from gptjax.data.sources import read_documents
from gptjax.finetuning import ChineseTuning, finetune
from gptjax.optimizer import OptimizerConfig
from gptjax.tasks import read_sides, translation

PRESETS = {
    "cpu": ChineseTuning(
        preset="cpu",
        out="runs/chinese",
        data="cmn.txt",
        steps=800,
        batch_size=16,
        context_length=128,
        bpe_vocab_size=4096,
        prompt_weight=0.1,
        dropout=0.1,
        eval_items=200,
        show=8,
        scratch=preset("char-gpt-modern").replace(vocab_size=1, embed_dim=128, num_heads=4),
        # As the modern recipe of shakespeare_char.py.
        optimizer=OptimizerConfig(
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
        ),
    ),
}


def main() -> None:
    settings = parse(PRESETS, "cpu", str(__doc__))
    train, test = read_sides(settings.data, settings.test_data, settings.columns)
    if settings.text is None:
        lines = (text_of(record, settings.source) for record in train)
    else:
        lines = (line for text in read_documents(settings.text) for line in text.splitlines())
    # Sentences that come several times would be counted on what was trained on.
    distinct = dict.fromkeys(line.strip() for line in lines)
    tokenizers = ("bpe", *settings.compare)
    print_scripts(compare_tokenizers(distinct, tokenizers, bpe_vocab_size=settings.bpe_vocab_size))
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
