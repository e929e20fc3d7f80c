"""Fine-tuning for a task: measured without examples, with some in the prompt, and fine-tuned."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from gptjax.adapters import LoRA, trainable_specs
from gptjax.batching import generate_texts
from gptjax.config import ModelConfig, preset
from gptjax.data.examples import encode_chat_example, encode_example
from gptjax.data.loader import Batch, Loader
from gptjax.data.packing import Example, PackedLoader, packed_batches
from gptjax.doctor import require_platform
from gptjax.errors import UserError
from gptjax.evaluation.loglikelihood import loglikelihoods
from gptjax.evaluation.results import Estimate, accuracy_interval, mean, ratio, to_json
from gptjax.fitting import fit
from gptjax.loss import Objective, loss_sums
from gptjax.model import Model
from gptjax.optimizer import OptimizerConfig
from gptjax.params import Params, count_specs, init_params
from gptjax.preferences import DPO, Preference, PreferenceLoader
from gptjax.pretrained.loading import load
from gptjax.reporting import Progress
from gptjax.sampling import Sampling
from gptjax.sharding import data_mesh, parse_mesh
from gptjax.tasks import Item, Message, Task, hold_out
from gptjax.text_generation import chat_ids, prompt_ids, tokenizer_of
from gptjax.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    encode_pair,
)

SCRATCH = "scratch"
_SMALL = preset("char-gpt").replace(vocab_size=1)
WAYS = ("zero-shot", "few-shot", "fine-tuned")


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """The settings of a run that fine-tunes a model for a task. Every field is a flag.

    Attributes:
        preset: The named settings to start from; the other flags change them.
        out: The run folder. The same command with the same folder resumes.
        data: A .jsonl, .json, .tsv, .txt, .csv or .parquet file, a folder with one named train and
            one named dev, validation or test, or "tfds:NAME@SPLIT".
        test_data: What is measured, likewise; without it some of the data is held out.
        model: What `gptjax generate` takes; or "scratch" for one that knows nothing yet.
        tokenizer: Of a model from scratch: "bpe" (trained on the data), "characters" or "bytes".
        bpe_vocab_size: How many tokens "bpe" learns.
        steps: Updates of the whole run.
        batch_size: Rows a step, each packed with as many examples as fit.
        context_length: Tokens a row; longer examples are left out. The context of a model from
            scratch.
        accumulate: Microbatches that a batch is split into, to save memory.
        prompt_weight: How much tokens of the prompt count in the loss, where those of the answer
            count 1.
        dropout: Rate of dropout in training. Most published models were trained without, and do
            badly with it.
        lora_rank: Of low-rank additions, which alone are trained; 0 trains everything.
        lora_alpha: Scales them, by lora_alpha / lora_rank.
        lora_targets: Patterns of the paths of matrices that get one.
        few_shot: How many examples of the training data the few-shot prompt has.
        eval_items: How many items are measured; None is all, or a tenth where they are held out.
        eval_batch_size: How many prompts are read or continued at once.
        validation_items: How many of the training items are kept for the validation loss.
        show: How many answers are printed.
        seed: Of the parameters, dropout, the order of the data and the few-shot examples.
        eval_every: Steps between evaluations of the validation loss; None is a quarter of the run.
        checkpoint_every: Steps between checkpoints; None is a quarter of the run.
        mesh: How devices share the training: sizes such as "fsdp=4,tensor=2"; without it each
            batch is split over all that divide it; not over a CPU's cores where what is trained is
            large for it.
        require: What must be there to train on: gpu, tpu or cpu.
        scratch: The shape of a model from scratch. Its vocabulary is the tokenizer's.
        optimizer: The optimizer and its schedule.
    """

    preset: str
    out: str
    data: str
    test_data: str | None = None
    model: str = SCRATCH
    tokenizer: Literal["bpe", "characters", "bytes"] = "bpe"
    bpe_vocab_size: int = 4096
    steps: int = 500
    batch_size: int = 16
    context_length: int = 128
    accumulate: int = 1
    prompt_weight: float = 0.0
    dropout: float = 0.0
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = (
        "blocks.attention.query",
        "blocks.attention.key",
        "blocks.attention.value",
        "blocks.attention.out",
        "blocks.mlp.up",
        "blocks.mlp.down",
    )
    few_shot: int = 4
    eval_items: int | None = None
    eval_batch_size: int = 16
    validation_items: int = 200
    show: int = 3
    seed: int = 0
    eval_every: int | None = None
    checkpoint_every: int | None = None
    mesh: str | None = None
    require: Literal["gpu", "tpu", "cpu"] | None = None
    scratch: ModelConfig = _SMALL
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


_DEFAULTS = FineTuning(preset="", out="", data="")


@dataclass(frozen=True, kw_only=True)
class SentimentTuning(FineTuning):
    """Likewise, to tell kinds of texts apart.

    Attributes:
        labels: What the label's numbers mean, from 0.
    """

    labels: tuple[str, ...] = ("negative", "positive")


@dataclass(frozen=True, kw_only=True)
class TranslationTuning(FineTuning):
    """Likewise, to translate.

    Attributes:
        columns: The languages of a file's first columns.
        source: The language to translate from.
        target: The language to translate into.
    """

    columns: tuple[str, ...] = ("en", "zh")
    source: str = "zh"
    target: str = "en"


@dataclass(frozen=True, kw_only=True)
class ChineseTuning(TranslationTuning):
    """Likewise, after a table of the tokens that Chinese needs.

    Attributes:
        text: What the table's vocabulary is trained and counted on, as the data of quickstart.py;
            without it the source sentences of the data.
        compare: What the table tells beside it: "bytes", folders with the files of a tokenizer, or
            run folders.
    """

    text: str | None = None
    compare: tuple[str, ...] = ("bytes",)


@dataclass(frozen=True, kw_only=True)
class QuestionTuning(FineTuning):
    """Likewise, to answer questions.

    Attributes:
        language: Of the answers, which are compared by its rules.
    """

    language: str = "en"


@dataclass(frozen=True, kw_only=True)
class PreferenceTuning(FineTuning):
    """Likewise, to answer as is preferred: by `preferences.DPO`.

    Attributes:
        beta: How hard the model is held to what it was.
    """

    beta: float = 0.1


@dataclass(frozen=True)
class Measured:
    """What a model makes of a task's test items in one way.

    Attributes:
        estimates: figures by name. "loss" is that of the right answers, in nats a token; of
            preferences "accuracy" is the share of items whose first answer is likelier than the
            second.
        losses: of each item, in nats a token.
        answers: of each item; None where it was not asked.
        shots: how many examples each prompt had: all that fit the model's context.
    """

    estimates: dict[str, Estimate]
    losses: list[float]
    answers: list[str | None]
    shots: list[int]


def finetune(settings: FineTuning, task: Task) -> dict[str, Measured]:
    """Fine-tunes a model for a task, and measures it before, by examples in the prompt, and after.

    Prints a table, and some answers side by side. The run folder holds, beside what `fit` writes,
    `results.json` and `items.jsonl`, a line for each item with its answers. Nothing that is
    measured is trained on, chosen by, or shown as an example.

    Returns:
        What was measured, by its name of `WAYS`; empty where a signal stopped the training.

    Raises:
        UserError: a setting is illegal, no item fits the model's context, and as `load` and `fit`
            do.
    """
    if settings.require is not None:
        require_platform(settings.require)
    for name in ("few_shot", "lora_rank", "show", "validation_items"):
        if getattr(settings, name) < 0:
            raise UserError(f"{name} is {getattr(settings, name)}; at least 0")
    model = from_scratch(settings, task) if settings.model == SCRATCH else load(settings.model)
    items = [item for item in task.test if _fits(model, task, item, ())]
    if not items:
        raise UserError(
            f"no test item and its answer fit the context of {model.config.context_length} tokens; "
            "take a model with a longer one (from scratch: raise context_length)"
        )
    learned, validation = hold_out(
        task.train, max(min(settings.validation_items, len(task.train) // 10), 1)
    )
    params = _train(model, task, learned, validation, settings)
    if params is None:
        return {}
    rng = np.random.default_rng(settings.seed)
    drawn = rng.permutation(len(learned))[: settings.few_shot]
    shots = [learned[place] for place in drawn]
    tuned = dataclasses.replace(model, params=params)
    ways = zip(WAYS, ((model, ()), (model, shots), (tuned, ())), strict=True)
    measured = {
        way: measure(given, task, items, examples, settings) for way, (given, examples) in ways
    }
    _report(measured, task, items, settings)
    return measured


def from_scratch(settings: FineTuning, task: Task) -> Model:
    """A model with random parameters, and a tokenizer for the task's texts."""

    def texts(items: Sequence[Item]) -> list[str]:
        return [
            "\n\n".join([_spelled(item, ()), *(f" {text}{task.stop}" for text in item.answers)])
            for item in items
        ]

    tokenizer: Tokenizer = ByteTokenizer()
    if settings.tokenizer == "bpe":
        tokenizer = BPETokenizer.train(texts(task.train), settings.bpe_vocab_size)
    elif settings.tokenizer == "characters":
        # Those of the test as well: a character without an id could not even be read.
        tokenizer = CharTokenizer.from_text([*texts(task.train), *texts(task.test)])
    config = settings.scratch.replace(
        vocab_size=tokenizer.vocab_size, context_length=settings.context_length
    )
    return Model(config, init_params(config, jax.random.key(settings.seed)), tokenizer)


def encode_item(
    tokenizer: Tokenizer,
    task: Task,
    item: Item,
    shots: Sequence[Item] = (),
    *,
    prompt_weight: float = 0.0,
) -> Example:
    """An item and its first answer as token ids, of which the answer's are to be learned.

    Args:
        tokenizer: of the model.
        task: of the item.
        item: to encode.
        shots: items with their answers that come before it, and are not learned.
        prompt_weight: as in `encode_example`.
    """
    prompt = ask(tokenizer, item, shots)
    if isinstance(prompt, str):
        completion = _completion(tokenizer, task, item.answers[0])
        return encode_example(tokenizer, prompt, completion, prompt_weight=prompt_weight)
    example = encode_chat_example(tokenizer, [*prompt, _answered(item)])
    if not shots:
        return example
    # The assistant's own turns are the last ones.
    before = [message for message in item.prompt if isinstance(message, dict)]
    turns = 1 + sum(message["role"] == "assistant" for message in before)
    first = _spans(example)[-turns][0]
    return Example(
        example.tokens, np.where(np.arange(len(example.tokens)) < first, 0, example.weights)
    )


def ask(tokenizer: Tokenizer, item: Item, shots: Sequence[Item] = ()) -> "str | list[Message]":
    """What a model is asked: a text, or messages where the item has some and the tokenizer can."""
    has_template = isinstance(tokenizer, BPETokenizer) and tokenizer.chat_template is not None
    if isinstance(item.prompt, str) or not has_template:
        return _spelled(item, shots)
    before = [
        message
        for shot in shots
        for message in (*shot.prompt, _answered(shot))
        if isinstance(message, dict) and message["role"] != "system"
    ]
    # A system message comes first, also before examples.
    system = [message for message in item.prompt if message["role"] == "system"]
    rest = [message for message in item.prompt if message["role"] != "system"]
    return [*system, *before, *rest]


def measure(
    model: Model,
    task: Task,
    items: Sequence[Item],
    shots: Sequence[Item] = (),
    settings: FineTuning = _DEFAULTS,
) -> Measured:
    """Answers items, and takes the likelihood of their right answers.

    Args:
        model: to measure.
        task: of the items.
        items: that fit the model's context.
        shots: examples of the prompt. Where they and an item do not fit, the last are left out.
        settings: of the run, of which this takes `eval_batch_size` and `show`.
    """
    tokenizer = tokenizer_of(model)
    given = []
    for item in items:
        fitting = len(shots)
        while fitting and not _fits(model, task, item, shots[:fitting]):
            fitting -= 1
        given.append(shots[:fitting])
    pairs = list(zip(items, given, strict=True))
    losses = _losses(model, [encode_item(tokenizer, task, *pair) for pair in pairs], settings)
    estimates = {}
    prompts = [ask(tokenizer, *pair) for pair in pairs]
    answers: list[str | None] = [None] * len(items)
    if task.labels:
        answers = [*_likeliest(model, task, prompts, settings)]
    else:
        asked = len(items) if task.metrics else settings.show
        answers[:asked] = _generated(model, task, prompts[:asked], settings)
    if task.metrics is not None:
        estimates |= task.metrics([str(answer) for answer in answers], items)
    if isinstance(settings, PreferenceTuning):
        others = [(_rejected(item), shots) for item, shots in pairs]
        against = _losses(model, [encode_item(tokenizer, task, *pair) for pair in others], settings)
        right = [mine[0] < other[0] for mine, other in zip(losses, against, strict=True)]
        estimates["accuracy"] = mean([float(one) for one in right])
    estimates["loss"] = ratio([nll for nll, _ in losses], [count for _, count in losses])
    shots_used = [len(examples) for examples in given]
    return Measured(estimates, [nll / count for nll, count in losses], answers, shots_used)


def _train(
    model: Model,
    task: Task,
    learned: Sequence[Item],
    validation: Sequence[Item],
    settings: FineTuning,
) -> Params | None:
    """The parameters after training; None where a signal stopped it."""
    tokenizer = tokenizer_of(model)
    if isinstance(settings, PreferenceTuning):
        prepared = _preferred(model, task, learned, validation, settings)
    else:
        prepared = _packed(model, task, learned, validation, settings)
    loader, eval_data, objective = prepared
    mesh = None if settings.mesh is None else parse_mesh(settings.mesh)
    if mesh is None:
        at_once = settings.batch_size // max(settings.accumulate, 1)
        trained = count_specs(trainable_specs(model.config, _lora(settings)))
        mesh = data_mesh(max(at_once, 1), at_once * settings.context_length, trained)
    quarter = max(settings.steps // 4, 1)
    result = fit(
        model.config.replace(dropout=settings.dropout),
        settings.optimizer,
        loader,
        steps=settings.steps,
        out=settings.out,
        eval_data=eval_data,
        tokenizer=tokenizer,
        mesh=mesh,
        seed=settings.seed,
        params=model.params,
        trainable=_lora(settings),
        base=None if settings.model == SCRATCH else settings.model,
        objective=objective,
        accumulate=settings.accumulate,
        eval_every=settings.eval_every or quarter,
        checkpoint_every=settings.checkpoint_every or quarter,
        sample_prompt=_spelled(validation[0], ()),
        sampling=Sampling(max_new_tokens=task.max_new_tokens, temperature=0.0, overflow="slide"),
        settings={name: getattr(settings, name) for name in _SAME_RUN}
        | {"task": task.name, "task_sha256": _task_hash(task)},
    )
    if not result.finished:
        return None
    # Each device of a mesh of replicas would do all of the measuring.
    return result.params if settings.mesh else jax.device_put(result.params, jax.devices()[0])


def _packed(
    model: Model,
    task: Task,
    learned: Sequence[Item],
    validation: Sequence[Item],
    settings: FineTuning,
) -> tuple[Loader, Iterator[Batch], Objective]:
    """What `fit` learns from, is evaluated on, and minimizes: answers' tokens in packed rows."""
    tokenizer = tokenizer_of(model)
    rows = {
        "batch_size": settings.batch_size,
        "context_length": settings.context_length,
        "long": "drop",
    }
    weight = settings.prompt_weight
    examples = [encode_item(tokenizer, task, item, prompt_weight=weight) for item in learned]
    loader = PackedLoader(examples, seed=settings.seed, **rows)
    print(
        f"{len(learned)} training items in rows of {settings.context_length} tokens, "
        f"{loader.fill_rate:.1%} full: {settings.steps / loader.batches_per_epoch:.1f} epochs"
    )
    held_out = [encode_item(tokenizer, task, item) for item in validation]
    return loader, packed_batches(held_out, **rows), loss_sums


def _preferred(
    model: Model,
    task: Task,
    learned: Sequence[Item],
    validation: Sequence[Item],
    settings: PreferenceTuning,
) -> tuple[Loader, Iterator[Batch], Objective]:
    """Likewise: pairs of answers."""
    tokenizer, longest = tokenizer_of(model), settings.context_length + 1

    def load(items: Sequence[Item]) -> PreferenceLoader:
        pairs = [
            Preference(*(encode_item(tokenizer, task, one) for one in (item, _rejected(item))))
            for item in items
        ]
        fitting = [pair for pair in pairs if max(len(one.tokens) for one in pair) <= longest]
        if len(fitting) < len(pairs):
            print(f"{len(pairs) - len(fitting)} of {len(pairs)} pairs are longer than a row")
        loader = PreferenceLoader(
            fitting,
            batch_size=settings.batch_size,
            context_length=settings.context_length,
            seed=settings.seed,
        )
        return loader.with_reference(model.params, model.config)

    loader = load(learned)
    epochs = settings.steps / loader.batches_per_epoch
    print(f"{len(loader.pairs)} pairs of answers: {epochs:.1f} epochs")
    return loader, load(validation).in_order(), DPO(settings.beta)


def _rejected(item: Item) -> Item:
    """The item with the answer that is not preferred."""
    return dataclasses.replace(item, answers=item.answers[1:])


def _task_hash(task: Task) -> str:
    """Of what is learned and measured: a run that goes on must not have learned anything else."""
    items = [
        [item.prompt, item.answers, item.group] for side in (task.train, task.test) for item in side
    ]
    text = json.dumps([items, len(task.train), task.labels, task.stop])
    return hashlib.sha256(text.encode()).hexdigest()


def _lora(settings: FineTuning) -> LoRA | None:
    if not settings.lora_rank:
        return None
    return LoRA(settings.lora_rank, settings.lora_alpha, settings.lora_targets)


_SAME_RUN = (
    *("data", "test_data", "eval_items", "validation_items", "model", "tokenizer"),
    *("batch_size", "context_length", "prompt_weight"),
)


def _fits(model: Model, task: Task, item: Item, shots: Sequence[Item]) -> bool:
    """Whether a question fits the model's context, with the right answer and with any other."""
    tokenizer = tokenizer_of(model)
    # Where answers are generated and compared, the first is read alone.
    read = task.labels or (item.answers[:1] if task.metrics else item.answers)
    answered = [dataclasses.replace(item, answers=(text,)) for text in read]
    tokens = max(len(encode_item(tokenizer, task, one, shots).tokens) for one in answered)
    if not task.labels:
        prompt = ask(tokenizer, item, shots)
        read = prompt_ids(model, prompt) if isinstance(prompt, str) else chat_ids(model, prompt)
        tokens = max(tokens, len(read) + task.max_new_tokens)
    return tokens <= model.config.context_length


def _losses(
    model: Model, examples: Sequence[Example], settings: FineTuning
) -> list[tuple[float, int]]:
    """Of each example what its answers cost in nats, and how many tokens they have."""
    requests, owners = [], []
    for number, example in enumerate(examples):
        ids = example.tokens.tolist()
        for start, end in _spans(example):
            requests.append((ids[:start], ids[start:end]))
            owners.append(number)
    found = loglikelihoods(model, requests, batch_size=settings.eval_batch_size, progress=True)
    sums = [[0.0, 0] for _ in examples]
    for number, one in zip(owners, found, strict=True):
        sums[number][0] -= one.logprob
        sums[number][1] += one.tokens
    return [(nll, int(count)) for nll, count in sums]


def _spans(example: Example) -> list[tuple[int, int]]:
    """Where the tokens that count begin and end."""
    counts = np.concatenate([[False], example.weights[1:] > 0, [False]])
    edges = np.flatnonzero(np.diff(counts.astype(np.int8))) + 1
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _likeliest(model: Model, task: Task, prompts: Sequence[Any], settings: FineTuning) -> list[str]:
    tokenizer = tokenizer_of(model)
    requests = [
        encode_pair(tokenizer, prompt, f" {label}") for prompt in prompts for label in task.labels
    ]
    found = loglikelihoods(model, requests, batch_size=settings.eval_batch_size, progress=True)
    logprobs = np.array([one.logprob for one in found]).reshape(len(prompts), len(task.labels))
    return [task.labels[place] for place in logprobs.argmax(axis=1)]


def _generated(model: Model, task: Task, prompts: Sequence[Any], settings: FineTuning) -> list[str]:
    greedy = Sampling(max_new_tokens=task.max_new_tokens, temperature=0.0, stop=(task.stop,))
    answers = [""] * len(prompts)
    with Progress(len(prompts), task="answering", unit="item") as shown:
        found = generate_texts(model, prompts, greedy, slots=settings.eval_batch_size)
        for done, (index, completion) in enumerate(found, 1):
            answers[index] = completion.text.strip()
            shown.update(done, "")
    return answers


def _spelled(item: Item, shots: Sequence[Item]) -> str:
    """An item as text, after examples with their answers."""
    before = [f"{_spelled(shot, ())} {shot.answers[0]}" for shot in shots]
    if isinstance(item.prompt, str):
        return "\n\n".join([*before, item.prompt])
    turns = [f"{message['role'].capitalize()}: {message['content']}" for message in item.prompt]
    return "\n\n".join([*before, *turns, "Assistant:"])


def _completion(tokenizer: Tokenizer, task: Task, answer: str) -> str:
    return f" {answer}" if tokenizer.eos_id is not None else f" {answer}{task.stop}"


def _answered(item: Item) -> Message:
    return {"role": "assistant", "content": item.answers[0]}


def print_measured(
    measured: Mapping[str, Measured], task: Task, items: Sequence[Item], *, show: int = 3
) -> None:
    """Prints a table of what was measured, and some answers side by side.

    An accuracy comes with its 95 % interval (Wilson), any other figure with its standard error.
    Where the task has labels, a first line tells what the commonest of the training items would
    get.

    Args:
        measured: way -> what `measure` found of all the items.
        task: of the items.
        items: that were measured.
        show: how many answers are printed.
    """
    from rich.console import Console
    from rich.table import Table

    estimates = _with_baseline(measured, task, items)
    names = list(next(iter(measured.values())).estimates)
    table = Table(task.name, *names, box=None)
    for way, figures in estimates.items():
        table.add_row(
            way, *(_cell(name, figures[name]) if name in figures else "" for name in names)
        )
    Console(highlight=False).print(table)
    left_out = len(task.test) - len(items)
    few_shot = measured.get("few-shot")
    print(
        f"{len(items)} test items"
        + (f" ({left_out} more are longer than the model's context)" if left_out else "")
        + (f", {_told_shots(few_shot.shots)} few-shot" if few_shot else "")
        + "; ± is the standard error"
        + (", brackets are 95 % intervals (Wilson)" if "accuracy" in names else "")
    )
    width = max(map(len, ("right", *measured)))
    for place, item in enumerate(items[:show]):
        print(f"\n{_spelled(item, ())[-500:]}\n  {'right':{width}}  {item.answers[0]}")
        for way, found in measured.items():
            print(f"  {way:{width}}  {found.answers[place]}")


def _report(
    measured: Mapping[str, Measured], task: Task, items: Sequence[Item], settings: FineTuning
) -> None:
    """Prints and writes what was measured."""
    print_measured(measured, task, items, show=settings.show)
    out = Path(settings.out)
    results = {
        "task": task.name,
        "settings": dataclasses.asdict(settings),
        "items": len(items),
        "left_out": len(task.test) - len(items),
        "few_shot_examples": float(np.mean(measured["few-shot"].shots)),
        "results": to_json(_with_baseline(measured, task, items)),
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    with (out / "items.jsonl").open("w", encoding="utf-8") as file:
        for place, item in enumerate(items):
            line: dict[str, Any] = {"prompt": item.prompt, "answers": item.answers}
            for way, found in measured.items():
                line[way] = {"answer": found.answers[place], "loss": found.losses[place]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(f"\nfigures: {out / 'results.json'}, answers: {out / 'items.jsonl'}")


def _with_baseline(
    measured: Mapping[str, Measured], task: Task, items: Sequence[Item]
) -> dict[str, dict[str, Estimate]]:
    """The figures, after those of one who always says the commonest label."""
    estimates = {way: found.estimates for way, found in measured.items()}
    if not task.labels:
        return estimates
    common = Counter(item.answers[0] for item in task.train).most_common(1)[0][0]
    right = [float(common in item.answers) for item in items]
    return {f"always {common!r}": {"accuracy": mean(right)}, **estimates}


def _told_shots(counts: Sequence[int]) -> str:
    """How many examples few-shot prompts had."""
    least, most = min(counts), max(counts)
    if least == most:
        return f"{most} examples"
    return f"{least} to {most} examples ({np.mean(counts):.1f} on average, as many as fit)"


def _cell(name: str, estimate: Estimate) -> str:
    value, stderr, count = estimate
    if name == "accuracy":
        low, high = accuracy_interval(round(value * count), count)
        return f"{value:.1%} [{low:.1%}, {high:.1%}]"
    digits = 3 if name == "loss" else 1
    return f"{value:.{digits}f} ± {stderr:.{digits}f}"
