"""What every training script shares: the settings of a run, and the run."""

import math
from dataclasses import dataclass, field
from typing import Literal

import jax
from jax.sharding import Mesh

from gptjax import hosts
from gptjax.config import ModelConfig
from gptjax.doctor import require_platform
from gptjax.errors import UserError
from gptjax.fitting import FitResult, fit
from gptjax.loss import LossOptions
from gptjax.optimizer import OptimizerConfig
from gptjax.params import count_params
from gptjax.sharding import check_batch, data_mesh, make_mesh, parse_mesh


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
        mesh: How devices share the work: sizes such as "fsdp=4,tensor=2", or "dp", "fsdp", "tp",
            "fsdp+tp", "context", "expert" or "stage"; "auto" chooses by what the model needs.
            Without it each batch is split over all that divide it; not over a CPU's cores where the
            model is large for it.
        require: What must be there to train on: gpu, tpu or cpu.
        coordinator: HOST:PORT of process 0, where a run has several. Not needed, nor are the next
            two, under Slurm, Open MPI and on Cloud TPU.
        num_processes: How many processes the run has.
        process_id: The number of this one, from 0.
        start_timeout: Seconds to wait for all processes.
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
    mesh: str | None = None
    require: Literal["gpu", "tpu", "cpu"] | None = None
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    start_timeout: float = 300.0
    model: ModelConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


def train(experiment: Experiment) -> FitResult:
    """Reads the data, and trains or resumes.

    Raises:
        UserError: before anything is compiled or written, if a setting is illegal or the data
            cannot be read; and as `fit` does.
    """
    from gptjax.data import BatchLoader, evaluation_batches, load_corpus

    hosts.initialize(
        experiment.coordinator,
        experiment.num_processes,
        experiment.process_id,
        start_timeout=experiment.start_timeout,
    )
    if experiment.require is not None:
        require_platform(experiment.require)
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
        mesh="auto" if experiment.mesh == "auto" else replicas(experiment),
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
    """The mesh that an experiment's batches are split over; None is one device.

    Raises:
        UserError: if there are several processes, and a device of theirs would have no rows; or
            if the evaluation's batches do not divide over the mesh asked for.
    """
    if experiment.mesh is not None:
        mesh = parse_mesh(experiment.mesh)
        check_batch(experiment.eval_batch_size, experiment.model.context_length, mesh)
        return mesh
    at_once = experiment.batch_size // max(experiment.accumulate, 1)
    rows = math.gcd(at_once, experiment.eval_batch_size)
    if jax.process_count() > 1:
        if rows % jax.device_count():
            raise UserError(
                f"batch_size / accumulate ({at_once}) and eval_batch_size "
                f"({experiment.eval_batch_size}) must be multiples of the {jax.device_count()} "
                f"devices of {jax.process_count()} processes"
            )
        return make_mesh(data=-1)
    model = experiment.model
    return data_mesh(max(rows, 1), at_once * model.context_length, count_params(model))
