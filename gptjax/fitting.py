"""The training loop: data, progress, evaluation, samples, checkpoints, and stopping well."""

import contextlib
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax import devices, hosts, sharding
from gptjax.adapters import (
    LoRA,
    Trainable,
    frozen_params,
    join_params,
    merge_params,
    trainable_specs,
    trainable_to_dict,
)
from gptjax.checkpoint import CheckpointManager, diff_configs, lock_run, read_metadata
from gptjax.config import EXECUTION_FIELDS, ModelConfig
from gptjax.data.position import DataPosition
from gptjax.errors import NonFiniteLossError, UserError
from gptjax.evaluation.perplexity import evaluate_loss, make_eval_step
from gptjax.loss import LossOptions, Objective, loss_sums
from gptjax.model import Model
from gptjax.optimizer import OptimizerConfig, make_optimizer, make_schedule
from gptjax.params import Params, count_params, count_specs, flops_per_token, params_sha256
from gptjax.plots import plot_losses
from gptjax.reporting import MetricsLog, NoLog, Progress, duration, quantity, require_wandb
from gptjax.sampling import Sampling
from gptjax.signals import Stop, stop_on_signals
from gptjax.text_generation import generate_text
from gptjax.training import TrainState, abstract_state, init_state, make_train_step, split_batch

if TYPE_CHECKING:
    import optax

    from gptjax.tokenizer import Tokenizer


# The loop's counters that a checkpoint carries on.
_PROGRESS = (
    "tokens",
    "train_seconds",
    "compile_seconds",
    "val_loss",
    "best_val_loss",
    "peak_bytes",
    "devices",
)


@dataclass(frozen=True)
class FitResult:
    """What `fit` returns.

    Attributes:
        state: the last state.
        params: the parameters to use, whole: the averaged ones where the optimizer keeps an
            average, and merged with those that were frozen.
        val_loss: loss of `params` over the whole evaluation data, or None without such data.
        best_val_loss: the lowest of all evaluations.
        finished: False where a signal stopped the run before its last step.
        summary: what `summary.json` holds; empty where the run is not finished.
        out: the run folder.
    """

    state: TrainState
    params: Params
    val_loss: float | None
    best_val_loss: float | None
    finished: bool
    summary: dict[str, Any]
    out: Path


def fit(
    config: ModelConfig,
    optimizer: "OptimizerConfig | optax.GradientTransformation",
    train_data: Any,
    *,
    steps: int,
    out: str | Path,
    eval_data: Iterable[dict[str, np.ndarray]] | None = None,
    tokenizer: "Tokenizer | None" = None,
    mesh: Mesh | Literal["auto"] | None = None,
    seed: int = 0,
    params: Params | None = None,
    trainable: Trainable | None = None,
    base: str | Path | None = None,
    objective: Objective = loss_sums,
    accumulate: int = 1,
    eval_every: int | None = None,
    checkpoint_every: int | None = None,
    log_every: int = 1,
    loss_options: LossOptions = LossOptions(),
    nonfinite: Literal["stop", "skip"] = "stop",
    sample_prompt: str | None = None,
    sampling: Sampling = Sampling(max_new_tokens=400, temperature=0.8, overflow="slide"),
    settings: dict[str, Any] | None = None,
    wandb: str | None = None,
    progress: bool = True,
) -> FitResult:
    """Trains a model to its last step, or resumes the run that `out` holds.

    The sequence of batches, and with it the final parameters, do not depend on where the run was
    stopped in between: on one machine they are bit for bit those of a run never stopped. Ctrl-C
    and SIGTERM save a checkpoint after the step at hand and return; SIGKILL costs the steps since
    the last checkpoint.

    With several processes (`gptjax.hosts`) all of them call this, with the same arguments. The
    batches are the same with any number of processes, which may change between a stop and a
    restart; each process reads its own rows of them. Process 0 alone prints and writes, but
    checkpoints, which all write: `out` must be a folder that all of them see. A signal to any one
    stops all after the same step.

    Args:
        config: the model. Where its `remat` is "auto", what fits into the devices' memory is chosen
            (`gptjax.planning.choose_remat`), and recorded in config.json.
        optimizer: a config, or any optax transformation (whose settings a resumed run then cannot
            compare).
        train_data: batches by position, `train_data[n]` being what step n trains on, such as a
            `gptjax.data.BatchLoader` or a batched `grain.MapDataset`; or an iterator with
            `get_state` and `set_state`, such as Grain's. See `loss.Batch` for what a batch holds.
        steps: updates of the whole run.
        out: the run folder; made where it is not there. Holds config.json, metrics.jsonl,
            summary.json, loss.png, samples.txt, tensorboard/ and checkpoints/.
        eval_data: batches to evaluate on, all of them each time.
        tokenizer: saved with every checkpoint, and used for samples.
        mesh: where the state and batches lie; None is the default device, and "auto" all devices,
            arranged by what the model needs (`gptjax.planning.choose_mesh`).
        seed: of the parameters and dropout. The order of the data is `train_data`'s own.
        params: start from these instead of drawing them.
        trainable: train only this: `adapters.LoRA` or `adapters.Only`; needs `params`. Checkpoints
            hold what is trained alone, so that a resumed run must come with the same `params`.
        base: where `params` came from, as `load` takes it: with `trainable` `load(out)` finds the
            frozen parameters there.
        objective: what is minimized, and what the evaluation tells: the cross-entropy, or
            `preferences.DPO`.
        accumulate: microbatches a batch is split into.
        eval_every: steps between evaluations, each with a sample; None is a tenth of the run.
        checkpoint_every: steps between checkpoints; None is a tenth of the run. The best
            evaluation so far and the last step are saved as well.
        log_every: steps between lines of metrics.jsonl. Every step's metrics are checked.
        loss_options: additions to the loss and how its gradient is computed.
        nonfinite: "stop" ends the run with `NonFiniteLossError`; "skip" leaves out the update.
        sample_prompt: what samples continue; None is a line break, or the start of the data where
            the tokenizer has none.
        sampling: how samples are drawn.
        settings: anything JSON-serializable that says what the run is, such as the data's name.
            Saved with it, and a resumed run must come with the same.
        wandb: a Weights & Biases project to log to.
        progress: whether to print.

    Returns:
        The result; for a run that was finished before, what it had.

    Raises:
        UserError: before anything is compiled or written, if `out` holds another run or is in use,
            if the data does not fit the model, or an argument is illegal.
        NonFiniteLossError: see `nonfinite`; `nonfinite.json` in the run folder says where.
    """
    out = Path(out)
    for name, value in (
        ("steps", steps),
        ("accumulate", accumulate),
        ("eval_every", eval_every),
        ("checkpoint_every", checkpoint_every),
        ("log_every", log_every),
    ):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; at least 1")
    if wandb is not None:
        require_wandb()
    if trainable is not None and params is None:
        raise UserError(f"trainable is {trainable}, but there are no params to start from")
    transformation, schedule, ema_decay = _resolve(optimizer, config, steps, trainable)
    eval_data = list(eval_data) if isinstance(eval_data, Iterator) else eval_data
    data = DataPosition(train_data)
    if mesh == "auto" or config.remat == "auto":
        rows = data.check(config, steps)["tokens"].shape[0]
        # Of AdamW for the whole model where only some is trained, which then needs less.
        optimized = transformation if trainable is None else None
        config, mesh = _chosen(config, mesh, optimized, rows, eval_data, accumulate)
    identity = {
        "model": config.to_dict(),
        "optimizer": optimizer.to_dict() if isinstance(optimizer, OptimizerConfig) else None,
        "run": {"seed": seed, "accumulate": accumulate, "loss": loss_options._asdict()}
        | (settings or {}),
    }
    if trainable is not None:
        frozen = frozen_params(params or {}, trainable, config)
        identity["run"] |= {
            "trainable": trainable_to_dict(trainable),
            "frozen_sha256": params_sha256(frozen or {}),
            "frozen_dtype": str(jax.tree.leaves(frozen)[0].dtype) if frozen else None,
        }
    if objective is not loss_sums:
        identity["run"]["objective"] = _named(objective)
    identity = json.loads(json.dumps(identity))
    _refuse_unequal_processes(
        mesh,
        identity,
        {
            "mesh": None if mesh is None else dict(mesh.shape),
            "steps": steps,
            "eval_every": eval_every,
            "checkpoint_every": checkpoint_every,
            "eval_data": eval_data is not None,
            "samples": [tokenizer is not None, sample_prompt, repr(sampling)],
            "nonfinite": nonfinite,
            "out": str(out),
        },
    )
    with contextlib.ExitStack() as stack:
        hosts.on_main(lambda: stack.enter_context(lock_run(out)))
        # Saving is cheap beside a step that people wait for; a tenth of a long run is not.
        manager = stack.enter_context(CheckpointManager(out / "checkpoints"))
        hosts.on_main(lambda: _refuse_other_run(out, manager, identity, tokenizer))
        run = _Run(
            config=config,
            mesh=mesh,
            steps=steps,
            out=out,
            manager=manager,
            identity=identity,
            tokenizer=tokenizer,
            data=data,
            eval_data=eval_data,
            eval_step=make_eval_step(config, mesh, loss_options, objective),
            schedule=schedule,
            sampling=sampling,
            nonfinite=nonfinite,
            log_every=log_every,
            eval_every=eval_every or max(1, steps // 10),
            checkpoint_every=checkpoint_every or max(1, steps // 10),
            use_ema=ema_decay is not None,
            trainable=trainable,
            base=None if base is None else str(base),
        )
        first = run.data.check(config, steps)
        if accumulate > 1:
            jax.eval_shape(partial(split_batch, parts=accumulate), first)
        if mesh is not None:
            rows, length = first["tokens"].shape
            sharding.check_batch(rows, length, mesh, accumulate)
        # Of preferences both answers; whether or not a token counts as a target, it is read.
        run.tokens_per_step = sum(x.size for name, x in first.items() if name.endswith("tokens"))
        run.sample_prompt = run.choose_prompt(sample_prompt, first)
        kept: dict[str, Any] = {"ema": run.use_ema, "trainable": trainable}
        state = run.restore(abstract_state(config, transformation, mesh, **kept))
        if state is None:
            # Of a run that left no checkpoint.
            for name in ("samples.txt", "nonfinite.json") if hosts.is_main() else ():
                (out / name).unlink(missing_ok=True)
        if state is None or trainable is not None:
            new = init_state(
                config, transformation, jax.random.key(seed), mesh, params=params, **kept
            )
            state = new if state is None else _with_frozen(state, new.frozen)
        shown = stack.enter_context(Progress(steps, progress and hosts.is_main()))
        if run.step >= steps:
            return run.already_finished(state, shown)
        if hosts.is_main():
            _write_json(out / "config.json", identity | {"steps": steps})
        step_function = make_train_step(
            config,
            transformation,
            mesh,
            accumulate=accumulate,
            loss_options=loss_options,
            ema_decay=ema_decay,
            nonfinite="skip" if nonfinite == "skip" else "keep",
            trainable=trainable,
            objective=objective,
        )
        log = NoLog()
        if hosts.is_main():
            log = MetricsLog(out, run.step, identity, wandb_project=wandb)
        stack.enter_context(contextlib.closing(log))
        stop = stack.enter_context(stop_on_signals())
        return run.train(state, step_function, log, shown, stop)


@dataclass
class _Run:
    """The loop's own state, and the few things it does, in the order in which it does them."""

    config: ModelConfig
    mesh: Mesh | None
    steps: int
    out: Path
    manager: CheckpointManager
    identity: dict[str, Any]
    tokenizer: "Tokenizer | None"
    data: DataPosition
    eval_data: Iterable[dict[str, np.ndarray]] | None
    eval_step: Any
    schedule: Any
    sampling: Sampling
    nonfinite: str
    log_every: int
    eval_every: int
    checkpoint_every: int
    use_ema: bool
    trainable: Trainable | None
    base: str | None
    sample_prompt: str | None = None
    tokens_per_step: int = 0
    step: int = 0
    tokens: float = 0.0
    train_seconds: float = 0.0
    compile_seconds: float = 0.0
    val_loss: float | None = None
    best_val_loss: float | None = None
    saved_step: int | None = None
    peak_bytes: int | None = None
    devices: str | None = None
    last_sample: str = ""

    def restore(self, abstract: TrainState) -> TrainState | None:
        """The newest good checkpoint's state, with the loop's own counters set; None if none."""
        if hosts.on_main(self.manager.latest_step) is None:
            return None
        restored = self.manager.restore(_with_frozen(abstract, None))
        self.step = self.saved_step = restored.step
        for name, value in restored.metadata["progress"].items():
            setattr(self, name, value)
        self.data.restore(restored.metadata["data"])
        return restored.state

    def train(
        self,
        state: TrainState,
        step_function: Any,
        log: MetricsLog | NoLog,
        shown: Progress,
        stop: Stop,
    ) -> FitResult:
        """Runs the steps that are left."""
        start_step = self.step
        self.devices = devices.describe(sharding.mesh_devices(self.mesh))
        trained = ""
        if self.trainable is not None:
            count = count_specs(trainable_specs(self.config, self.trainable))
            trained = f" ({quantity(count)} trained)"
        shown.message(
            f"{quantity(count_params(self.config))} parameters{trained} on {self.devices}, "
            f"{self.steps - start_step} steps"
            + (f" (resuming at step {start_step})" if start_step else "")
        )
        batch = self.place(self.data.next())
        with shown.waiting("compiling the train step"):
            begin = time.perf_counter()
            compiled = step_function.lower(state, batch).compile()
            self.compile_seconds += time.perf_counter() - begin
        self.peak_bytes = devices.peak_bytes(compiled)
        meter = _Meter(self.config, self.mesh, self.trainable, self.tokens_per_step)
        pending: dict[str, jax.Array] | None = None
        stopped = hosts.StopVote()
        while self.step < self.steps and not stopped(stop.asked):
            begin = time.perf_counter()
            state, metrics = compiled(state, batch)
            # While the device works: the next batch, and the metrics of the step before.
            self.step += 1
            last = self.step == self.steps
            data_after = self.data.save()
            if not last:
                batch = self.place(self.data.next())
            if pending is not None:
                self.record(self.step - 1, pending, log, shown, meter)
            pending = metrics
            evaluate = self.step % self.eval_every == 0 or last
            save = self.step % self.checkpoint_every == 0 or last
            if evaluate or save:
                self.record(self.step, metrics, log, shown, meter)
                pending = None
                self.train_seconds += time.perf_counter() - begin
                improved = evaluate and self.evaluate(state, log, shown)
                log.flush()
                if save or improved:
                    self.checkpoint(state, data_after, self.val_loss if evaluate else None)
                meter.restart()
            else:
                self.train_seconds += time.perf_counter() - begin
        if self.step < self.steps:
            if pending is not None:
                self.record(self.step, pending, log, shown, meter)
                log.flush()
            if self.saved_step != self.step:
                self.checkpoint(state, self.data.save_before(), None)
            self.manager.wait()
            shown.message(
                f"stopped by {stop.name or 'a signal to another process'} after step {self.step} "
                f"and saved in {self.out}; run the same command again to continue"
            )
            return self.result(state, finished=False, summary={})
        self.manager.wait()
        return self.finish(state, shown)

    def record(
        self,
        step: int,
        metrics: dict[str, jax.Array],
        log: MetricsLog | NoLog,
        shown: Progress,
        meter: "_Meter",
    ) -> None:
        """Fetches one step's metrics, waits for them, checks and writes them."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.tokens += values["tokens"]
        rate = meter.count()
        row = {name: value for name, value in values.items() if name != "skipped"}
        if self.schedule is not None:
            row["learning_rate"] = float(self.schedule(step - 1))
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            self.on_nonfinite(step, row, log, shown)
        if rate is not None:
            row["tokens_per_second"], row["mfu"] = rate, meter.mfu(rate)
        if step % self.log_every == 0 or step == self.steps:
            log.write(step, row)
        text = f"loss {row['loss']:.4f}"
        if rate is not None:
            left = (self.steps - step) * meter.tokens_per_step / rate if rate else 0
            text += f"  {quantity(rate)} tok/s  MFU {100 * row['mfu']:.0f} %  {duration(left)} left"
        shown.update(step, text)

    def on_nonfinite(
        self, step: int, row: dict[str, float], log: MetricsLog | NoLog, shown: Progress
    ) -> None:
        """Stops, with what is needed to look into it; or says that the step was skipped."""
        if self.nonfinite == "skip":
            shown.message(
                f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}: update skipped"
            )
            return
        self.manager.wait()
        good = hosts.on_main(self.manager.latest_step)
        if hosts.is_main():
            _write_json(
                self.out / "nonfinite.json",
                {"step": step}
                | {
                    name: str(value) if not math.isfinite(value) else value
                    for name, value in row.items()
                }
                | {"batch_position": step - 1, "last_good_checkpoint": good},
            )
        log.flush()
        rate = f", learning rate {row['learning_rate']:.3g}" if "learning_rate" in row else ""
        raise NonFiniteLossError(
            f"loss {row['loss']} and gradient norm {row['grad_norm']} at step {step} (batch "
            f"{step - 1}{rate}); the last good checkpoint is "
            f"{'none' if good is None else f'step {good}'}, details in "
            f"{self.out / 'nonfinite.json'}; lower the learning rate, or pass nonfinite=skip"
        )

    def evaluate(self, state: TrainState, log: MetricsLog | NoLog, shown: Progress) -> bool:
        """Evaluates and samples; whether the loss is the best so far."""
        self.sample(state, shown)
        if self.eval_data is None:
            return False
        begin = time.perf_counter()
        params = self.joined_params(state)
        self.val_loss = evaluate_loss(params, self.eval_data, self.eval_step)
        improved = self.best_val_loss is None or self.val_loss < self.best_val_loss
        if improved:
            self.best_val_loss = self.val_loss
        log.write(self.step, {"val_loss": self.val_loss})
        shown.message(
            f"step {self.step}: validation loss {self.val_loss:.4f}"
            f"{' (best)' if improved else ''}, {time.perf_counter() - begin:.1f} s"
        )
        return improved

    def sample(self, state: TrainState, shown: Progress) -> None:
        """Appends a continuation of the prompt to samples.txt."""
        if self.tokenizer is None or self.sample_prompt is None:
            return
        model = Model(self.config, self.joined_params(state), self.tokenizer)
        key = jax.random.fold_in(jax.random.key(0), self.step)
        self.last_sample = (
            self.sample_prompt + generate_text(model, self.sample_prompt, self.sampling, key)[0]
        )
        if not hosts.is_main():
            return
        path = self.out / "samples.txt"
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        # A resumed run goes through steps again; a sample of theirs replaces the one there.
        blocks = re.split(r"(?m)^(?==== step \d+ ===$)", before)
        kept = [b for b in blocks if b and int(b.split()[2]) < self.step]
        _write_text(path, "".join(kept) + f"=== step {self.step} ===\n{self.last_sample}\n\n")

    def checkpoint(self, state: TrainState, data: Any, metric: float | None) -> None:
        """Starts saving; the arrays are copied before this returns."""
        metadata = self.identity | {
            "data": data,
            "tokenizer": None if self.tokenizer is None else self.tokenizer.to_dict(),
            "progress": {name: getattr(self, name) for name in _PROGRESS},
            "steps": self.steps,
            "base": self.base,
        }
        self.manager.save(self.step, _with_frozen(state, None), metadata, metric=metric)
        self.saved_step = self.step

    def finish(self, state: TrainState, shown: Progress) -> FitResult:
        """Writes picture and summary, and prints how it went."""
        if hosts.is_main():
            plot_losses({self.out.name: self.out}, self.out / "loss.png")
        summary = {
            "val_loss": self.val_loss,
            "best_val_loss": self.best_val_loss,
            "steps": self.step,
            "tokens": int(self.tokens),
            "tokens_read": self.tokens_per_step * self.step,
            "params": count_params(self.config),
            "params_sha256": params_sha256(state.params),
            "compile_seconds": round(self.compile_seconds, 3),
            "train_seconds": round(self.train_seconds, 3),
            "peak_bytes": self.peak_bytes,
            "devices": self.devices,
        }
        if hosts.is_main():
            _write_json(self.out / "summary.json", summary)
        if self.last_sample:
            shown.message(f"sample:\n{self.last_sample}\n")
        loss = "" if self.val_loss is None else f"validation loss {self.val_loss:.4f}, "
        shown.message(
            f"{loss}{quantity(self.tokens)} tokens in {duration(self.train_seconds)} (and "
            f"{duration(self.compile_seconds)} of compiling); loss curve: {self.out / 'loss.png'}"
        )
        return self.result(state, finished=True, summary=summary)

    def already_finished(self, state: TrainState, shown: Progress) -> FitResult:
        """Says that there is nothing to do, once the summary, which is written last, is there."""
        path = self.out / "summary.json"
        summary = hosts.on_main(
            lambda: json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        )
        if summary.get("steps") != self.step:
            return self.finish(state, shown)
        loss = "" if self.val_loss is None else f", validation loss {self.val_loss:.4f}"
        shown.message(
            f"{self.out} is finished: {self.step} steps{loss}; raise steps to train it further, or "
            "choose another out folder"
        )
        return self.result(state, finished=True, summary=summary)

    def result(self, state: TrainState, finished: bool, summary: dict[str, Any]) -> FitResult:
        return FitResult(
            state=state,
            params=merge_params(self.joined_params(state)),
            val_loss=self.val_loss,
            best_val_loss=self.best_val_loss,
            finished=finished,
            summary=summary,
            out=self.out,
        )

    def joined_params(self, state: TrainState) -> Params:
        """The parameters to use, whole; additions of LoRA as they are, which takes no memory."""
        trained = state.params if state.ema_params is None else state.ema_params
        return join_params(trained, state.frozen, self.trainable)

    def place(self, batch: dict[str, Any] | sharding.UnreadBatch) -> dict[str, jax.Array]:
        """Starts the batch's way to the device."""
        return sharding.place_batch(batch, self.mesh)

    def choose_prompt(self, given: str | None, first: dict[str, np.ndarray]) -> str | None:
        """What samples continue."""
        if self.tokenizer is None:
            return None
        if given is not None:
            self.tokenizer.encode(given)
            return given
        try:
            if self.tokenizer.encode("\n"):
                return "\n"
        except UserError:
            pass
        return self.tokenizer.decode([int(first["tokens"][0, 0])])


class _Meter:
    """Tokens a second since the last pause, and what share of the chips' matrix rate that is."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh | None,
        trainable: Trainable | None,
        tokens_per_step: int,
    ):
        self.tokens_per_step = tokens_per_step
        self._flops = flops_per_token(config)
        if isinstance(trainable, LoRA):
            # Of three products with each kernel, its gradient is not computed.
            self._flops *= 2 / 3
        processes = jax.process_count()
        local = [
            device
            for device in sharding.mesh_devices(mesh)
            if device.process_index == jax.process_index()
        ]
        self._peak = processes * devices.peak_flops(local)
        self.restart()

    def restart(self) -> None:
        self._tokens, self._start = 0, time.perf_counter()

    def count(self) -> float | None:
        """Counts a step that is done; the rate, once it means something."""
        self._tokens += self.tokens_per_step
        seconds = time.perf_counter() - self._start
        return self._tokens / seconds if seconds > 0 else None

    def mfu(self, rate: float) -> float:
        """Model FLOPs utilization, 0 to 1."""
        return rate * self._flops / self._peak


def _named(objective: Objective) -> str:
    """The same in another process, which a function's own text is not."""
    if isinstance(objective, partial):
        return f"{_named(objective.func)}, {objective.args}, {objective.keywords}"
    name = getattr(objective, "__qualname__", None)
    return repr(objective) if name is None else f"{objective.__module__}.{name}"


def _with_frozen(state: TrainState, frozen: Params | None) -> TrainState:
    return state.replace(frozen=frozen)  # pyright: ignore[reportAttributeAccessIssue]


def _resolve(
    optimizer: Any, config: ModelConfig, steps: int, trainable: Trainable | None = None
) -> tuple[Any, Any, float | None]:
    """The transformation, its learning-rate schedule and EMA rate where known."""
    if not isinstance(optimizer, OptimizerConfig):
        return optimizer, None, None
    schedule = make_schedule(optimizer, optimizer.learning_rate, steps)
    made = make_optimizer(optimizer, config, steps, trainable)
    return made, schedule, optimizer.ema_decay


def _chosen(
    config: ModelConfig,
    mesh: Mesh | Literal["auto"] | None,
    optimizer: "optax.GradientTransformation | None",
    rows: int,
    eval_data: Iterable[dict[str, np.ndarray]] | None,
    accumulate: int,
) -> tuple[ModelConfig, Mesh | None]:
    """The model and the mesh with what "auto" stands for in them, by the plan.

    A mesh is of all devices, and the training and the evaluation batches divide over it.
    """
    from gptjax.planning.meshes import choices

    eval_batch = next((len(batch["tokens"]) for batch in eval_data or ()), None)
    given = dict(mesh.shape) if isinstance(mesh, Mesh) else mesh
    only = None if config.remat == "auto" else config.remat

    def choose() -> tuple[Any, Any]:
        found = choices(
            config, "local", rows, given, optimizer, accumulate, eval_batch=eval_batch, only=only
        )
        choice = next(found)
        return choice.remat, choice.candidates[0].layout.axes

    # Processes may find unlike amounts of memory, but need one mesh and one program.
    remat, axes = hosts.on_main(choose)
    chosen = sharding.make_mesh(**axes) if mesh == "auto" else mesh
    return config.replace(remat=remat), chosen


def _refuse_other_run(
    out: Path,
    manager: CheckpointManager,
    identity: dict[str, Any],
    tokenizer: "Tokenizer | None",
) -> None:
    """Compares with the run that the folder holds.

    Raises:
        UserError: if it is another, field by field.
    """
    # A run that ended before its first checkpoint left nothing to resume and nothing to lose.
    if manager.latest_step() is None:
        return
    path = out / "config.json"
    if not path.exists():
        raise UserError(f"{out} holds checkpoints but no config.json; choose another out folder")
    stored = json.loads(path.read_text(encoding="utf-8"))
    for name, defaults in (("model", ModelConfig()), ("optimizer", OptimizerConfig())):
        if isinstance(stored.get(name), dict):
            # A field that came to gptjax after the run was begun had its default then.
            stored[name] = defaults.to_dict() | stored[name]
    run = stored.get("run")
    if isinstance(run, dict) and isinstance(run.get("loss"), dict):
        run["loss"] = LossOptions()._asdict() | run["loss"]
    differences = diff_configs(
        {name: _comparable(stored.get(name)) for name in identity},
        {name: _comparable(identity[name]) for name in identity},
    )
    # Of a damaged checkpoint the one before it is restored, and that is told then.
    with contextlib.suppress(UserError):
        stored = read_metadata(os.fspath(manager.directory)).get("tokenizer")
        if stored is not None and tokenizer is not None:
            given = tokenizer.to_dict()
            differences += diff_configs(*({"tokenizer": _shortened(x)} for x in (stored, given)))
    if differences:
        raise UserError(
            f"{out} holds another run: {'; '.join(differences)}; use its settings to resume it, or "
            "choose another out folder"
        )


def _refuse_unequal_processes(
    mesh: Mesh | None, identity: dict[str, Any], loop: dict[str, Any]
) -> None:
    """Checks what all processes must have alike, or they would wait for each other for ever.

    Raises:
        UserError: if they differ, or the mesh leaves one out.
    """
    count = jax.process_count()
    if count == 1:
        return
    used = {device.process_index for device in sharding.mesh_devices(mesh)}
    if mesh is None or len(used) < count:
        raise UserError(
            f"there are {count} processes, but the mesh has devices of {len(used)}; give a mesh of "
            "all devices (jax.devices())"
        )
    given = [
        {name: part or {} for name, part in theirs.items()}
        for theirs in hosts.gather(identity | {"loop": loop})
    ]
    for process, theirs in enumerate(given):
        if differences := diff_configs(given[0], theirs):
            names = ", ".join(line.partition(":")[0] for line in differences)
            raise UserError(
                f"process {process} was started with other settings than process 0 ({names}); "
                "start all with the same command"
            )


def _shortened(values: dict[str, Any]) -> dict[str, Any]:
    """With hashes for texts too long to be read in a message."""
    return {
        name: f"sha256 {hashlib.sha256(value.encode()).hexdigest()[:8]}"
        if isinstance(value, str) and len(value) > 100
        else value
        for name, value in values.items()
    }


def _comparable(part: Any) -> Any:
    """Without the fields that say only how things are computed."""
    if not isinstance(part, dict):
        return {}
    part = {name: value for name, value in part.items() if name not in EXECUTION_FIELDS}
    if isinstance(part.get("loss"), dict):
        part["loss"] = part["loss"] | {"logits_at_once": None}
    return part


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _write_text(path, json.dumps(value, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Replaces a file at once, so that a kill leaves the old one or the new one."""
    replacement = path.with_name(path.name + ".new")
    replacement.write_text(text, encoding="utf-8")
    os.replace(replacement, path)


__all__ = ["FitResult", "NonFiniteLossError", "fit", "params_sha256"]
