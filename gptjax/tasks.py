"""Tasks of text: how records become questions with answers, and what a right answer is."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjax.data.examples import RECORD_SUFFIXES, Record, read_records, text_of
from gptjax.errors import UserError
from gptjax.evaluation.metrics import bleu, chrf, exact_match, f1
from gptjax.evaluation.results import Estimate, mean

Message = dict[str, str]
Metrics = Callable[[Sequence[str], Sequence["Item"]], dict[str, Estimate]]

LANGUAGES = {
    "ar": "Arabic",
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "hi": "Hindi",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "pt": "Portuguese",
    "ru": "Russian",
    "zh": "Chinese",
}
# What ends an answer where a conversation is spelled as text.
_NEXT_TURN = "\n\nUser:"
_TEST_STEMS = ("dev", "validation", "val", "test")


@dataclass(frozen=True)
class Item:
    """Something to answer.

    Attributes:
        prompt: a text, without white space at its end; or the messages of a conversation, of which
            the assistant is to say the next.
        answers: what counts as right. The first is what is learned.
        group: items of one group are never on both sides, train and test.
    """

    prompt: str | tuple[Message, ...]
    answers: tuple[str, ...]
    group: str


@dataclass(frozen=True)
class Task:
    """What is to be learned, and how it is measured.

    Attributes:
        name: of the task.
        train: what is learned from.
        test: what is measured; of no group that `train` has.
        metrics: what predictions of all test items are worth. Without it their answers are not
            generated, and the loss alone is measured.
        labels: where an answer is one of these, the likeliest is taken; else it is generated.
        stop: what ends an answer. One whose tokenizer has no end-of-text token learns to write it.
        max_new_tokens: of an answer that is generated.
    """

    name: str
    train: Sequence[Item]
    test: Sequence[Item]
    metrics: Metrics | None = None
    labels: tuple[str, ...] = ()
    stop: str = "\n"
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        for side, items in (("train", self.train), ("test", self.test)):
            if not items:
                raise UserError(f"the task has no {side} items; give more data, or test_data")


def sentiment(
    train: Sequence[Record],
    test: Sequence[Record] | None = None,
    *,
    labels: tuple[str, ...] = ("negative", "positive"),
    held_out: int | None = None,
) -> Task:
    """Texts of one of some kinds.

    Args:
        train: records of "text" (or "sentence") and "label", one of `labels` or its number.
        test: likewise; None holds some out, see `hold_out`.
        labels: the kinds.
        held_out: how many items are held out, or measured of `test`.

    Raises:
        UserError: a field is missing, or a label is none of these.
    """

    def items(records: Sequence[Record]) -> list[Item]:
        return [item(text_of(record, "text", "sentence"), record) for record in records]

    def item(text: str, record: Record) -> Item:
        text = text.strip()
        return Item(f"Review: {text}\nSentiment:", (_label(record, labels),), text)

    def metrics(predictions: Sequence[str], items: Sequence[Item]) -> dict[str, Estimate]:
        pairs = zip(predictions, items, strict=True)
        return {"accuracy": mean([float(text in item.answers) for text, item in pairs])}

    sides = _sides(items, train, test, held_out)
    return Task("sentiment", *sides, metrics, labels)


def translation(
    train: Sequence[Record],
    test: Sequence[Record] | None = None,
    *,
    source: str = "zh",
    target: str = "en",
    held_out: int | None = None,
) -> Task:
    """Sentences and their translations.

    All translations of a sentence that is measured count as references. What is learned from has
    no sentence of either language that is measured.

    Args:
        train: records with a field for each language, by its code; or of TFDS' ted_multi, with
            "translations".
        test: likewise; None holds some out, see `hold_out`.
        source: code of the language to translate from.
        target: of the language to translate into.
        held_out: how many source sentences are held out.

    Raises:
        UserError: a field is missing.
    """

    def items(records: Sequence[Record]) -> list[Item]:
        found: dict[str, dict[str, None]] = {}
        for record in records:
            pair = _translations(record)
            # TED's talks are not all in all languages.
            if pair is record or (source in pair and target in pair):
                first, second = text_of(pair, source).strip(), text_of(pair, target).strip()
                found.setdefault(first, {})[second] = None
        return [
            Item(f"{_language(source)}: {text}\n{_language(target)}:", tuple(answers), text)
            for text, answers in found.items()
        ]

    def metrics(predictions: Sequence[str], items: Sequence[Item]) -> dict[str, Estimate]:
        references = [item.answers for item in items]
        language = target.partition("-")[0]
        return {
            "BLEU": bleu(predictions, references, language=language),
            "chrF": chrf(predictions, references),
        }

    learned, measured = _sides(items, train, test, held_out)
    seen = {item.group for item in measured} | {text for item in measured for text in item.answers}
    learned = [
        Item(item.prompt, (answer,), item.group)
        for item in learned
        for answer in item.answers
        if not seen & {item.group, answer}
    ]
    return Task("translation", learned, measured, metrics)


def question_answering(
    train: Sequence[Record],
    test: Sequence[Record] | None = None,
    *,
    language: str = "en",
    held_out: int | None = None,
) -> Task:
    """Questions about a paragraph, answered by some of its words.

    Args:
        train: records of "context", "question" and "answers", as `read_records` makes them of
            SQuAD's form, or as TFDS has them.
        test: likewise; None holds some out, whole paragraphs, see `hold_out`.
        language: of the answers, by which they are compared.
        held_out: how many questions are held out.

    Raises:
        UserError: a field is missing.
    """

    def items(records: Sequence[Record]) -> list[Item]:
        found = [(record, _answers(record)) for record in records]
        return [
            Item(
                f"{text_of(record, 'context').strip()}\n"
                f"Question: {text_of(record, 'question').strip()}\nAnswer:",
                answers,
                text_of(record, "context").strip(),
            )
            for record, answers in found
            # SQuAD 2.0 has questions without an answer.
            if answers
        ]

    def metrics(predictions: Sequence[str], items: Sequence[Item]) -> dict[str, Estimate]:
        pairs = list(zip(predictions, items, strict=True))

        def scored(measure: Callable[..., float]) -> Estimate:
            return mean([100 * measure(p, i.answers, language=language) for p, i in pairs])

        return {"exact match": scored(exact_match), "F1": scored(f1)}

    return Task("question answering", *_sides(items, train, test, held_out), metrics)


def conversation(
    train: Sequence[Record],
    test: Sequence[Record] | None = None,
    *,
    held_out: int | None = None,
    max_new_tokens: int = 128,
) -> Task:
    """Instructions and answers, or whole dialogues, of which the loss is measured.

    Args:
        train: records of "instruction", "input" (may be empty or missing) and "output"; or of
            "messages", the last of which is the assistant's.
        test: likewise; None holds some out, see `hold_out`.
        held_out: how many items are held out.
        max_new_tokens: of an answer that is shown.

    Raises:
        UserError: a field is missing, or a dialogue does not end with the assistant.
    """

    def items(records: Sequence[Record]) -> list[Item]:
        found = []
        for messages in map(_messages, records):
            *before, last = messages
            if last.get("role") != "assistant" or not before:
                raise UserError(
                    "a dialogue must have a message of the user first and end with one of the "
                    f"assistant; this one has {[m.get('role') for m in messages]}"
                )
            found.append(Item(tuple(before), (last["content"],), _opening(before)))
        return found

    sides = _sides(items, train, test, held_out)
    return Task("chat", *sides, stop=_NEXT_TURN, max_new_tokens=max_new_tokens)


def preference(
    train: Sequence[Record],
    test: Sequence[Record] | None = None,
    *,
    held_out: int | None = None,
    max_new_tokens: int = 128,
) -> Task:
    """Instructions with two answers, of which the first is preferred to the second.

    Args:
        train: records of "prompt" (a text, or messages), "chosen" and "rejected" (texts, or
            messages of which the last is the answer); or of "instruction", "input", "output", the
            preferred answer, and "rejected".
        test: likewise; None holds some out, see `hold_out`.
        held_out: how many items are held out.
        max_new_tokens: of an answer that is shown.

    Raises:
        UserError: a field is missing.
    """

    def items(records: Sequence[Record]) -> list[Item]:
        found = []
        for record in records:
            if "instruction" in record and "prompt" not in record:
                asked = [_instruction(record)]
                chosen = _last_words(record, "chosen" if "chosen" in record else "output")
            else:
                asked, chosen = record.get("prompt"), _last_words(record, "chosen")
                if asked is None and isinstance(record["chosen"], list):
                    # Some data sets repeat the prompt in both conversations.
                    asked = record["chosen"][:-1]
                if not isinstance(asked, list):
                    asked = [{"role": "user", "content": text_of(record, "prompt")}]
            before = _checked(asked)
            answers = (chosen, _last_words(record, "rejected"))
            found.append(Item(tuple(before), answers, _opening(before)))
        return found

    sides = _sides(items, train, test, held_out)
    return Task("preference", *sides, stop=_NEXT_TURN, max_new_tokens=max_new_tokens)


def _last_words(record: Record, name: str) -> str:
    """An answer by itself, or as the last of some messages."""
    value = record.get(name)
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        return text_of(value[-1], "content")
    return text_of(record, name)


def read_sides(
    data: str, test_data: str | None = None, columns: Sequence[str] = ()
) -> tuple[list[Record], list[Record] | None]:
    """Reads what is learned from, and what is measured where that is apart.

    Args:
        data: as in `read_records`, or a folder with one `train.*` file and one named dev,
            validation, val or test (the first of these that is there).
        test_data: as in `read_records`.
        columns: as in `read_records`.

    Raises:
        UserError: as `read_records` does, and if the folder has no such files.
    """
    folder = Path(data)
    if folder.is_dir():
        train = _named_file(folder, ("train",))
        test = test_data or _named_file(folder, _TEST_STEMS)
        return read_records(train, columns=columns), read_records(test, columns=columns)
    test = None if test_data is None else read_records(test_data, columns=columns)
    return read_records(data, columns=columns), test


def hold_out(items: Sequence[Item], count: int | None) -> tuple[list[Item], list[Item]]:
    """Splits items by a hash of their groups, so that neither order nor additions move one.

    Args:
        items: to split.
        count: how many are to be held out, about: whole groups are, those with the smallest
            hashes. None is a tenth.

    Returns:
        The others, and those held out, each in the order given.

    Raises:
        UserError: `count` is not from 1 to less than there are.
    """
    count = max(len(items) // 10, 1) if count is None else count
    if not 1 <= count < len(items):
        raise UserError(f"{count} items of {len(items)} cannot be held out; 1 to {len(items) - 1}")
    sizes: dict[str, int] = {}
    for item in items:
        sizes[item.group] = sizes.get(item.group, 0) + 1
    held, left = set(), count
    for group in sorted(sizes, key=_hash):
        if left <= 0:
            break
        held.add(group)
        left -= sizes[group]
    sides: tuple[list[Item], list[Item]] = ([], [])
    for item in items:
        sides[item.group in held].append(item)
    return sides


def _sides(
    items: Callable[[Sequence[Record]], list[Item]],
    train: Sequence[Record],
    test: Sequence[Record] | None,
    held_out: int | None,
) -> tuple[list[Item], list[Item]]:
    if test is None:
        return hold_out(items(train), held_out)
    measured = items(test)
    if held_out is not None and held_out < len(measured):
        # Not the first ones: files may be sorted.
        measured = hold_out(measured, held_out)[1]
    groups = {item.group for item in measured}
    return [item for item in items(train) if item.group not in groups], measured


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _named_file(folder: Path, stems: Sequence[str]) -> Path:
    names = [stem + suffix for stem in stems for suffix in RECORD_SUFFIXES]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"folder {str(folder)!r} has no file {' or '.join(stems)} with one of the endings "
        f"{', '.join(RECORD_SUFFIXES)}; give a file as data, and one as test_data"
    )


def _label(record: Mapping[str, Any], labels: tuple[str, ...]) -> str:
    value = str(record["label"]) if "label" in record else text_of(record, "label")
    if value in labels:
        return value
    if value.isdecimal() and int(value) < len(labels):
        return labels[int(value)]
    numbered = ", ".join(f"{number} ({label})" for number, label in enumerate(labels))
    raise UserError(f"label {value!r} is none of {numbered}; name others with labels")


def _translations(record: Record) -> Record:
    """Of one record the texts by language."""
    value = record.get("translations")
    if not isinstance(value, dict):
        return record
    return dict(zip(value["language"], value["translation"], strict=True))


def _language(code: str) -> str:
    return LANGUAGES.get(code.partition("-")[0], code)


def _answers(record: Record) -> tuple[str, ...]:
    answers = record.get("answers")
    if isinstance(answers, dict):
        answers = answers.get("text")
    if not isinstance(answers, list) or not all(isinstance(text, str) for text in answers):
        raise UserError(
            "'answers' of a question must be a list of texts; the fields of its record are "
            f"{', '.join(map(repr, record))}"
        )
    return tuple(dict.fromkeys(answers))


def _messages(record: Record) -> list[Message]:
    if "messages" in record:
        return _checked(record["messages"])
    asked = _instruction(record)
    return [asked, {"role": "assistant", "content": text_of(record, "output")}]


def _instruction(record: Record) -> Message:
    asked = text_of(record, "instruction").strip()
    more = record.get("input") or ""
    return {"role": "user", "content": f"{asked}\n{more}" if more else asked}


def _checked(messages: Any) -> list[Message]:
    """Messages as they must be."""
    if not isinstance(messages, list) or not messages:
        raise UserError("the messages of a record must be a list with at least one")
    for message in messages:
        if not isinstance(message, dict):
            raise UserError(f"a message is a {type(message).__name__}: give objects with fields")
        for field in ("role", "content"):
            text_of(message, field)
    return messages


def _opening(messages: Sequence[Message]) -> str:
    """What a conversation begins with, by which it is known when it goes on elsewhere."""
    said = [message["content"] for message in messages if message["role"] != "system"]
    return (said or [messages[0]["content"]])[0].strip()
