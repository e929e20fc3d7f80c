"""What every training script shares: its settings as flags, its run, and its errors in one line."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NoReturn, TypeVar

from jax.sharding import Mesh

from gptjax.caching import cache_directory
from gptjax.config import ModelConfig
from gptjax.devices import cores_as_devices
from gptjax.errors import UserError, nearest
from gptjax.fitting import FitResult, fit
from gptjax.loss import LossOptions
from gptjax.optimizer import OptimizerConfig
from gptjax.reporting import print_error
from gptjax.sharding import data_mesh

Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The settings of a training run. Every field is a flag.

    Attributes:
        preset: The named settings to start from; the other flags change them.
        out: The run folder. The same command with the same folder resumes.
        data: A .txt, .jsonl, .parquet or .bin file, a glob or a folder; "tfds:NAME"; or "embedded",
            the documentation inside every Python.
        tokenizer: "characters", "bytes", "bpe" (trained on the data), or a folder with the files of
            one.
        bpe_vocab_size: How many tokens "bpe" learns.
        steps: Updates of the whole run.
        batch_size: Sequences a step, each as long as the model's context.
        accumulate: Microbatches that a batch is split into, to save memory.
        seed: Of the parameters, dropout and the order of the data.
        validation_fraction: Share of the data that is held out.
        isolate_documents: Whether documents in one row see each other not at all.
        eval_every: Steps between evaluations.
        eval_batch_size: Sequences at once in evaluation.
        checkpoint_every: Steps between checkpoints.
        log_every: Steps between lines of metrics.jsonl.
        z_loss: Weight of log²(Σ exp logits) in the loss.
        nonfinite: What to do where the loss is not finite: stop, or skip the step.
        prompt: What samples continue.
        wandb: A Weights & Biases project to log to.
        model: The model. Its vocab_size grows to the tokenizer's.
        optimizer: The optimizer and its schedule.
    """

    preset: str
    out: str
    data: str = "embedded"
    tokenizer: str = "characters"
    bpe_vocab_size: int = 1024
    steps: int = 2000
    batch_size: int = 12
    accumulate: int = 1
    seed: int = 0
    validation_fraction: float = 0.1
    isolate_documents: bool = False
    eval_every: int = 250
    eval_batch_size: int = 64
    checkpoint_every: int = 250
    log_every: int = 1
    z_loss: float = 0.0
    nonfinite: Literal["stop", "skip"] = "stop"
    prompt: str | None = None
    wandb: str | None = None
    model: ModelConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


def train(experiment: Experiment) -> FitResult:
    """Reads the data, and trains or resumes.

    Raises:
        UserError: before anything is compiled or written, if a setting is illegal or the data
            cannot be read; and as `fit` does.
    """
    from gptjax.data import BatchLoader, evaluation_batches, load_corpus

    is_bpe = experiment.tokenizer == "bpe"
    corpus = load_corpus(
        experiment.data,
        tokenizer=experiment.tokenizer,
        vocab_size=experiment.bpe_vocab_size if is_bpe else None,
        validation_fraction=experiment.validation_fraction,
    )
    vocab_size = max(experiment.model.vocab_size, corpus.vocab_size)
    model = experiment.model.replace(vocab_size=vocab_size)
    separator = None
    if experiment.isolate_documents:
        separator = None if corpus.tokenizer is None else corpus.tokenizer.eos_id
        if separator is None:
            raise UserError("isolate_documents needs a tokenizer with an end-of-text token")
    cut = {"context_length": model.context_length, "document_separator": separator}
    same_run = ("data", "tokenizer", "batch_size", "validation_fraction", "isolate_documents")
    return fit(
        model,
        experiment.optimizer,
        BatchLoader(corpus.train, batch_size=experiment.batch_size, seed=experiment.seed, **cut),
        steps=experiment.steps,
        out=experiment.out,
        eval_data=evaluation_batches(
            corpus.validation, batch_size=experiment.eval_batch_size, **cut
        ),
        tokenizer=corpus.tokenizer,
        mesh=replicas(experiment),
        seed=experiment.seed,
        accumulate=experiment.accumulate,
        eval_every=experiment.eval_every,
        checkpoint_every=experiment.checkpoint_every,
        log_every=experiment.log_every,
        loss_options=LossOptions(z_loss=experiment.z_loss),
        nonfinite=experiment.nonfinite,
        sample_prompt=experiment.prompt,
        settings={name: getattr(experiment, name) for name in same_run}
        | {"train_tokens": len(corpus.train)},
        wandb=experiment.wandb,
    )


def replicas(experiment: Experiment) -> Mesh | None:
    """The mesh that an experiment's batches are split over; None is one device."""
    at_once = experiment.batch_size // max(experiment.accumulate, 1)
    rows = math.gcd(at_once, experiment.eval_batch_size)
    return data_mesh(max(rows, 1), at_once * experiment.model.context_length)


def parse(
    presets: Mapping[str, Settings], default: str, description: str, args: list[str] | None = None
) -> Settings:
    """Reads settings from the command line: those of `--preset`, changed by the other flags.

    Args:
        presets: name -> settings, frozen dataclasses of one type with a field `preset`.
        default: the preset without `--preset`.
        description: what `--help` says first.
        args: the arguments; None is `sys.argv`.

    Raises:
        UserError: for an unknown preset or flag, naming the nearest.
    """
    args = sys.argv[1:] if args is None else args
    name = default
    for place, arg in enumerate(args):
        if arg.startswith("--preset="):
            name = arg.partition("=")[2]
        elif arg == "--preset" and place + 1 < len(args):
            name = args[place + 1]
    if name not in presets:
        raise UserError(f"unknown preset {name!r}{nearest(name, presets)}")
    description += f"\n\nPresets: {', '.join(presets)}."
    return parse_flags(type(presets[name]), presets[name], description, args)


def parse_flags(
    kind: type[Settings], default: Settings | None, description: str, args: list[str] | None = None
) -> Settings:
    """Reads a dataclass from the command line.

    Raises:
        UserError: for an unknown flag, naming the nearest, or an illegal value.
    """
    import tyro

    args = sys.argv[1:] if args is None else args
    flags = list(_flags(kind if default is None else default, ""))
    for arg in args:
        flag = arg.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and len(flag) > 2 and flag not in flags:
            close = difflib.get_close_matches(flag, flags, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else "--help lists them"
            raise UserError(f"unknown flag {flag}; {hint}")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                kind,
                default=tyro.MISSING_NONPROP if default is None else default,
                description=description,
                args=args,
                config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(_without_box(complaint.getvalue())) from None


def _without_box(text: str) -> str:
    """What a box, of lines or of ASCII, says between its title and its first rule, in one line."""
    inside = [line.strip("│ ") for line in text.splitlines()[1:]]
    lines = itertools.dropwhile(_is_rule, inside)
    message = " ".join(itertools.takewhile(lambda line: not _is_rule(line), lines))
    return message.rstrip(".") + "; --help lists the flags"


def _is_rule(line: str) -> bool:
    return not line.strip("─-")


def _flags(settings: object, prefix: str) -> Iterator[str]:
    yield from ("--help", "--tyro-print-completion", "--tyro-write-completion")
    for entry in dataclasses.fields(settings):  # pyright: ignore[reportArgumentType]
        name = prefix + entry.name.replace("_", "-")
        value = getattr(settings, entry.name, None)
        if dataclasses.is_dataclass(value):
            yield from _flags(value, name + ".")
        else:
            yield f"--{name}"


def run_command(command: Callable[[], object]) -> NoReturn:
    """Runs a command or script: configures JAX, and ends with a status and errors in one line.

    Status 0 where it went well (also where a signal stopped a run that can be resumed), 2 where
    the user's input was refused, 1 where a run failed.
    """
    from gptjax.fitting import NonFiniteLossError

    configure_jax()
    status = 0
    try:
        command()
    except NonFiniteLossError as error:
        print_error(error)
        status = 1
    except (UserError, OSError) as error:
        print_error(error)
        status = 2
    except KeyboardInterrupt:
        print_error(KeyboardInterrupt("interrupted"))
        status = 130
    sys.stdout.flush()
    sys.exit(status)


def configure_jax() -> None:
    """Uses every core of a CPU, and keeps compiled programs on disk for the next run.

    The disk is the folder of `JAX_COMPILATION_CACHE_DIR`, by default `cache_directory()`. Commands
    and scripts call this; importing gptjax configures nothing.
    """
    import jax

    cores_as_devices()
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(cache_directory()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
