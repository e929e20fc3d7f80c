"""Records of every form, and examples whose weights say what is to be learned."""

import gzip
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import MODERN, random_params
from small_tokenizers import chat_like, fuzzed, llama_like

from gptjax.data.examples import (
    encode_chat_example,
    encode_example,
    encode_pair,
    read_records,
    text_of,
)
from gptjax.data.packing import packed_batches
from gptjax.errors import UserError
from gptjax.evaluation.perplexity import evaluate_loss, make_eval_step
from gptjax.model import forward
from gptjax.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer, encode_prompt

ROWS = [("he said \"no\", 'x'", "0"), ("中文 é", "1"), ("  spaces ", "1")]
RECORDS = [{"text": text, "label": label} for text, label in ROWS]
COLUMNS = ("text", "label")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Only the last answer of a conversation keeps its thoughts, as in Qwen 3.
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{GENERATION}"
    "{{ message['content'] if loop.last else message['content'].split('</think>')[-1] }}<|im_end|>"
    "{ENDGENERATION}{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = [
    ("{% generation %}", "{% endgeneration %}"),
    ("\n   {%- generation -%}\n  ", "\n  {%- endgeneration -%}\n  "),
    ("{% generation %}\n", "\n  {%- endgeneration %}"),
]


def marked(begin: str, end: str) -> str:
    return FORGETFUL.replace("{GENERATION}", begin).replace("{ENDGENERATION}", end)


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def csv_of(rows: list[tuple[str, ...]]) -> str:
    return "".join(",".join('"' + f.replace('"', '""') + '"' for f in row) + "\r\n" for row in rows)


def tsv_of(rows: list[tuple[str, ...]]) -> str:
    return "".join("\t".join(row) + "\n" for row in rows)


# Records


def test_every_form_gives_the_same_records(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    lines = "\n\n".join(map(json.dumps, RECORDS))
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for path in [
        write(tmp_path / "a.tsv", tsv_of(ROWS)),
        write(tmp_path / "a.txt", tsv_of(ROWS).replace("\n", "\r\n").rstrip()),
        write(tmp_path / "headed.tsv", tsv_of([COLUMNS, *ROWS])),
        write(tmp_path / "bom.tsv", "\ufeff" + tsv_of([COLUMNS, *ROWS])),
        write(tmp_path / "a.csv", csv_of(ROWS)),
        write(tmp_path / "headed.csv", csv_of([COLUMNS, *ROWS])),
        write(tmp_path / "a.jsonl", lines),
        write(tmp_path / "a.json", json.dumps(RECORDS)),
        tmp_path / "a.parquet",
        tmp_path / "packed.jsonl.gz",
    ]:
        assert read_records(path, columns=COLUMNS) == RECORDS, path


def test_columns_may_be_more_or_in_another_order(tmp_path: Path):
    three = write(tmp_path / "three.tsv", tsv_of([("a", "b", "from X"), ("c", "d", "from Y")]))
    assert read_records(three, columns=("en", "zh"))[1] == {"en": "c", "zh": "d"}
    turned = write(tmp_path / "turned.tsv", tsv_of([("label", "id", "sentence"), ("1", "7", "x")]))
    found = read_records(turned, columns=COLUMNS)
    assert found == [{"label": "1", "id": "7", "sentence": "x"}]
    assert text_of(found[0], "text", "sentence") == "x"
    # Without names the first line is the header.
    assert read_records(three) == [{"a": "c", "b": "d", "from X": "from Y"}]


def test_squads_form_gives_a_record_a_question(tmp_path: Path):
    def asked(number: int, *answers: str) -> dict[str, Any]:
        texts = [{"text": text, "answer_start": 0} for text in answers]
        return {"id": f"q{number}", "question": f"Who {number}?", "answers": texts}

    paragraphs = [
        {"context": "A and B.", "qas": [asked(1, "A", "a"), asked(2)]},
        {"context": "C.", "qas": [asked(3, "C")]},
    ]
    data = {"version": "1.1", "data": [{"title": "T", "paragraphs": paragraphs}]}
    found = read_records(write(tmp_path / "squad.json", json.dumps(data)))
    assert [record["id"] for record in found] == ["q1", "q2", "q3"]
    assert found[0] == {
        "id": "q1",
        "title": "T",
        "context": "A and B.",
        "question": "Who 1?",
        "answers": ["A", "a"],
    }
    assert found[1]["answers"] == []
    del paragraphs[1]["qas"]
    with pytest.raises(UserError, match=r"squad.json.*SQuAD's form.*qas"):
        read_records(write(tmp_path / "squad.json", json.dumps(data)))


def test_tfds_records_have_all_their_fields(tmp_path: Path):
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")

    class GptjaxQuestions(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            answers = {"text": tfds.features.Text(), "answer_start": np.int32}
            features = {
                "context": tfds.features.Text(),
                "label": tfds.features.ClassLabel(num_classes=2),
                "answers": tfds.features.Sequence(answers),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for n in range(300):
                answers = {"text": [f"é{n}", "b"], "answer_start": [0, 1]}
                yield n, {"context": f"中 {n}", "label": n % 2, "answers": answers}

    found = read_records("tfds:gptjax_questions@train", data_dir=tmp_path)
    assert len(found) == 300
    [record] = [record for record in found if record["context"] == "中 7"]
    assert record["label"] == 1
    assert type(record["label"]) is int
    assert record["answers"]["text"] == ["é7", "b"]


def test_faults_of_records_are_told(tmp_path: Path):
    for name, data, told in [
        ("empty.tsv", b"", "holds no records"),
        ("empty.jsonl", b"\n\n", "holds no records"),
        ("empty.json", b"[]", "holds no records"),
        ("latin.tsv", b"good\t1\nbad \xe9\t0\n", r"latin.tsv.* not UTF-8 at byte 11"),
        ("latin.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', r"latin.jsonl.* not UTF-8 at byte 16"),
        ("short.tsv", b"good\t1\n\nbad\n", r"short.tsv:3: 1 fields.* 2 \(text, label\)"),
        ("a.json", b'{"a": 1}', "a dict: give a list of objects"),
        ("b.json", b"[1]", "b.json, item 0: a int"),
        ("c.json", b"[", "c.json: not JSON"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1"),
        ("a.xlsx", b"x", r"legal are .jsonl, .json"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=told):
            read_records(tmp_path / name, columns=COLUMNS)
    with pytest.raises(UserError, match="is a folder"):
        read_records(tmp_path)
    with pytest.raises(UserError, match=r"did you mean 'short.tsv'"):
        read_records(tmp_path / "shrot.tsv")


def test_a_missing_field_names_those_there_are():
    with pytest.raises(UserError, match=r"no field 'text' or 'sentence'.*'body', 'label'"):
        text_of({"body": "x", "label": 1}, "text", "sentence")
    with pytest.raises(UserError, match="'label' is a int, not text"):
        text_of({"body": "x", "label": 1}, "label")


# Examples


@pytest.mark.parametrize(
    "tokenizer",
    [chat_like(), llama_like(), llama_like(metaspace=True), ByteTokenizer()],
    ids=["bpe", "llama", "metaspace", "bytes"],
)
def test_only_the_completion_is_learned(tokenizer: Tokenizer, rng: np.random.Generator):
    for _ in range(30):
        prompt, completion = fuzzed(rng) + "x", " " + fuzzed(rng) + "."
        example = encode_example(tokenizer, prompt, completion)
        given = encode_prompt(tokenizer, prompt)
        tokens = example.tokens.tolist()
        # What generation begins from, then what it is to write, then the end.
        assert tokens[: len(given)] == given
        assert tokens[-1] == tokenizer.eos_id
        written = tokens[len(given) : -1]
        whole = encode_prompt(tokenizer, prompt + completion)
        assert written in (whole[len(given) :], tokenizer.encode(completion))
        assert tokenizer.decode(given + written) == tokenizer.decode(whole)
        assert example.weights.tolist() == [0.0] * len(given) + [1.0] * (len(written) + 1)


def test_no_token_reaches_over_the_boundary():
    library = BPETokenizer.train(["abab abab cab"] * 9, 270)
    assert len(library.encode("ab")) == 1
    assert encode_pair(library, "a", "b") == (library.encode("a"), library.encode("b"))


def test_prompts_may_count_too_and_ends_may_not():
    tokenizer = CharTokenizer("abc ")
    example = encode_example(tokenizer, "ab", "ca", prompt_weight=0.25)
    # No end-of-text token; and nothing comes before the first.
    assert example.tokens.tolist() == [0, 1, 2, 0]
    assert example.weights.tolist() == [0.0, 0.25, 1.0, 1.0]
    bytes_only = encode_example(ByteTokenizer(), "a", "b", eos=False)
    assert bytes_only.tokens.tolist() == [97, 98]
    # An empty prompt is begun as generation begins it.
    assert encode_example(ByteTokenizer(), "", "b").tokens.tolist() == [256, 98, 256]


def test_nothing_to_learn_is_warned_of_and_weighs_nothing():
    with pytest.warns(UserWarning, match="no token to learn from"):
        example = encode_example(CharTokenizer("abc"), "abc", "")
    assert not example.weights.any()
    with pytest.raises(UserError, match="1 tokens"):
        encode_example(CharTokenizer("abc"), "", "a")


def test_the_loss_is_that_of_the_completions_alone(rng: np.random.Generator):
    params = random_params(MODERN, rng)
    tokenizer = CharTokenizer("".join(map(chr, range(97, 97 + MODERN.vocab_size))))

    def draw(most: int) -> str:
        return "".join(rng.choice(list(tokenizer.alphabet), rng.integers(1, most)))

    pairs = [(draw(8), draw(6)) for _ in range(9)]
    rows = np.zeros((len(pairs), 16), np.int32)
    for row, pair in zip(rows, pairs, strict=True):
        row[: len("".join(pair))] = tokenizer.encode("".join(pair))
    logits = forward(params, jnp.array(rows), MODERN)
    every = np.asarray(jax.nn.log_softmax(logits), np.float64)
    total, count = 0.0, 0
    for (prompt, completion), ids, logprobs in zip(pairs, rows, every, strict=True):
        places = range(len(prompt), len(prompt + completion))
        total -= sum(logprobs[place - 1, ids[place]] for place in places)
        count += len(completion)
    examples = [encode_example(tokenizer, *pair) for pair in pairs]
    batches = packed_batches(examples, batch_size=2, context_length=16)
    found = evaluate_loss(params, batches, make_eval_step(MODERN))
    assert found == pytest.approx(total / count, rel=1e-5)


# Conversations


def with_template(template: str) -> BPETokenizer:
    tokenizer = chat_like()
    tokenizer.chat_template = template
    return tokenizer


def dialogue(rng: np.random.Generator, turns: int) -> list[dict[str, str]]:
    """Turns that may begin with anything but white space, in which tokens could reach over."""
    return [
        {"role": role, "content": "x" + fuzzed(rng, 12) + "."}
        for _ in range(turns)
        for role in ("user", "assistant")
    ]


def learned(tokenizer: BPETokenizer, example: Any) -> list[str]:
    """The stretches that count, as text."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.weights, [0]])))
    tokens = example.tokens.tolist()
    return [tokenizer.decode(tokens[a:b]) for a, b in edges.reshape(-1, 2)]


def test_every_turn_of_the_assistant_is_learned_with_its_end(rng: np.random.Generator):
    tokenizer = with_template(CHATML)
    for turns in (1, 2, 3):
        messages = [{"role": "system", "content": "Be brief."}, *dialogue(rng, turns)]
        example = encode_chat_example(tokenizer, messages)
        ids = tokenizer.encode_chat(messages, add_generation_prompt=False)
        assert example.tokens.tolist() == ids
        answers = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
        assert learned(tokenizer, example) == answers
        assert set(example.weights.tolist()) == {0.0, 1.0}


def test_the_prompt_is_what_generation_reads(rng: np.random.Generator):
    tokenizer = with_template(CHATML)
    messages = dialogue(rng, 2)
    example = encode_chat_example(tokenizer, messages)
    asked = tokenizer.encode_chat(messages[:-1])
    assert example.tokens[: len(asked)].tolist() == asked
    assert example.weights[len(asked) :].tolist().index(0.0) > 1
    assert example.weights[len(asked)] == 1
    assert example.weights[len(asked) - 1] == 0


def test_a_token_over_the_boundary_is_learned():
    tokenizer = with_template(CHATML)
    assert len(tokenizer.encode("\n\n")) == 1
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\n\nHo\n"}]
    [text] = learned(tokenizer, encode_chat_example(tokenizer, messages))
    assert text == "\n\n\nHo\n<|im_end|>"


@pytest.mark.parametrize("marks", MARKS, ids=["plain", "trimmed", "lines"])
def test_marks_tell_where_layouts_do_not(marks: tuple[str, str], rng: np.random.Generator):
    tokenizer = with_template(marked(*marks))
    for _ in range(10):
        messages = dialogue(rng, 2)
        messages[1]["content"] = "éx</think>é" + messages[1]["content"]
        example = encode_chat_example(tokenizer, messages)
        ids = tokenizer.encode_chat(messages, add_generation_prompt=False)
        assert example.tokens.tolist() == ids
        answers = [m["content"].split("</think>")[-1] + "<|im_end|>" for m in messages[1::2]]
        assert learned(tokenizer, example) == answers


def test_transformers_masks_the_same(rng: np.random.Generator):
    transformers = pytest.importorskip("transformers")
    tokenizer = with_template(marked(*MARKS[0]))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._chat_library, chat_template=tokenizer.chat_template
    )
    messages = dialogue(rng, 2)
    for message in messages:
        words = rng.choice(["the", "cat", "中文", "é", "\n", "</think>"], rng.integers(1, 9))
        message["content"] = "é" + " ".join(words)
    found = theirs.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True
    )
    example = encode_chat_example(tokenizer, messages)
    assert found["input_ids"] == example.tokens.tolist()
    assert found["assistant_masks"] == example.weights.tolist()


def test_turns_that_cannot_be_told_are_refused(rng: np.random.Generator):
    unmarked = marked("", "")
    messages = dialogue(rng, 2)
    messages[1]["content"] = "x</think>y"
    with pytest.raises(UserError, match=r"cannot be told from the rest.*generation"):
        encode_chat_example(with_template(unmarked), messages)
    # The last answer alone can be.
    tokenizer = with_template(unmarked)
    assert learned(tokenizer, encode_chat_example(tokenizer, messages[:2])) == [
        "x</think>y<|im_end|>"
    ]
    for tokenizer in (chat_like(), ByteTokenizer(), None):
        with pytest.raises(UserError, match="no chat template"):
            encode_chat_example(tokenizer, messages)


def test_a_conversation_without_answers_is_warned_of():
    with pytest.warns(UserWarning, match="no token to learn from"):
        example = encode_chat_example(with_template(CHATML), [{"role": "user", "content": "Hi"}])
    assert not example.weights.any()
