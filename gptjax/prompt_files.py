"""Files of prompts continued: JSON Lines in, JSON Lines out, and a stopped run goes on."""

import codecs
import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.batching import Completion, Request, complete, text_requests
from gptjax.config import EXECUTION_FIELDS
from gptjax.errors import UserError
from gptjax.model import Model
from gptjax.params import Params
from gptjax.reporting import Progress, duration
from gptjax.sampling import Sampling
from gptjax.text_generation import tokenizer_of

ADDED = ("index", "sample", "completion", "finish", "tokens", "logprobs", "top_logprobs")
"""What a line of completions may have beside what the prompt's line has."""

Done = dict[tuple[int, int], tuple[str, str]]
"""For the index of a prompt and of a sample of it: its line of completions, told as a place, and
the prompt's line as it was."""


class Line(NamedTuple):
    """A line of a file of prompts."""

    place: str
    """The file and the number of the line."""
    index: int
    """Of the prompt among those of the file, from 0."""
    record: dict[str, Any]
    """All that the line has."""
    prompt: str | list[dict[str, Any]]
    limit: int
    """The most tokens to add."""


def generate_file(
    model: Model,
    source: str | Path,
    destination: str | Path,
    sampling: Sampling = Sampling(),
    key: jax.Array | None = None,
    *,
    slots: int = 16,
    show_progress: bool = True,
) -> int:
    """Continues every prompt of a file and writes the completions to another.

    Both are JSON Lines in UTF-8. A line of `source` is an object with `prompt`, a text, or
    `messages`, a conversation as `chat_ids` takes it. It may have its own `max_new_tokens`. Blank
    lines are passed over. For each the destination gets the same object, all its fields kept, with

    - `index`: of the prompt among those of the file, from 0. Lines are written as completions end,
      so that they are not in this order;
    - `sample`: from 0, where `sampling.num_samples` is more than 1; each is a line;
    - `completion`: the text, as `generate_text` or `generate_chat` gives it;
    - `finish` ("stop" or "length") and, where they are asked for, `logprobs` and `top_logprobs`, as
      in `Continuation`;
    - `tokens`: how many the completion has, a stop token not counted.

    Called again after it was stopped, or killed at any point, it goes on where it was, and ends
    with the completions of a run never stopped: the random key of a prompt depends on nothing but
    `key` and its index. Prompts that are done must be the same then; others may be changed and
    added. What completions were made with stands in a file of the destination's name with
    `.settings.json` behind it, and must be the same too.

    Args:
        model: with a tokenizer.
        source: a local file.
        destination: a local file, to be made or gone on with.
        sampling: as in `generate_texts`.
        key: as in `generate`.
        slots: as in `generate_queue`; the completions do not depend on it.
        show_progress: a bar on a terminal, elsewhere a line now and then; False prints nothing.

    Returns:
        How many completions were added.

    Raises:
        UserError: before anything is generated, if a line of `source` is not as said above, or none
            has a prompt; if `destination` holds other lines than completions of these prompts made
            with these settings, or is in use by another run. When it is reached, if a prompt is
            longer than the model's context leaves room for. Lines are told by file and number.
        OSError: if a file cannot be read or written.
    """
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    tokenizer_of(model)
    if destination.exists() and source.exists() and destination.samefile(source):
        raise UserError(f"{destination} is the file of the prompts; give another one to write")
    with _alone(destination):
        done, end = _read_completions(destination)
        prompts = _check_prompts(source, sampling, done)
        if sampling.seeds is not None and len(sampling.seeds) != prompts:
            raise UserError(f"{len(sampling.seeds)} seeds for {prompts} prompts; one a prompt")
        settings = _settings(model, sampling, key)
        found = complete(
            model, _requests(model, source, sampling, done), sampling, key, slots=slots
        )
        _check_settings(destination, settings, is_begun=bool(done))
        total = prompts * sampling.num_samples
        with (
            destination.open("ab") as file,
            Progress(total, show_progress, "generating", "completion") as shown,
        ):
            # A line that a kill cut short.
            file.truncate(end)
            added, tokens, start = 0, 0, time.monotonic()
            for request, completion in found:
                file.write(_to_line(_record(request, completion, sampling)))
                file.flush()
                added, tokens = added + 1, tokens + len(completion.continuation.tokens)
                seconds = time.monotonic() - start
                rest = total - len(done) - added
                text = f"{tokens / seconds:.1f} tokens/s"
                text += f", {duration(seconds / added * rest)} left" if rest else ""
                shown.update(len(done) + added, text)
        return added


def _requests(model: Model, source: Path, sampling: Sampling, done: Done) -> Iterator[Request]:
    """What is left to do."""
    for line in _read_prompts(source, sampling):
        samples = [s for s in range(sampling.num_samples) if (line.index, s) not in done]
        if samples:
            name = f"{line.place}: the prompt"
            every = text_requests(name, line.index, line.prompt, line.limit, model, sampling)
            yield from (r._replace(origin=line) for r in every if r.sample in samples)


def _read_prompts(source: Path, sampling: Sampling) -> Iterator[Line]:
    index = 0
    with source.open("rb") as file:
        for number, data in enumerate(file, 1):
            data = data.removeprefix(codecs.BOM_UTF8) if number == 1 else data
            if not data.strip():
                continue
            place = f"{source}:{number}"
            record = _from_line(place, data)
            taken = [name for name in ADDED if name in record]
            if taken:
                raise UserError(
                    f"{place}: the field {taken[0]!r} is one that completions add; rename it"
                )
            limit = record.get("max_new_tokens", sampling.max_new_tokens)
            if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
                raise UserError(f"{place}: max_new_tokens is {limit!r}; a whole number from 0 on")
            yield Line(place, index, record, _prompt_of(place, record), limit)
            index += 1


def _prompt_of(place: str, record: dict[str, Any]) -> str | list[dict[str, Any]]:
    given = [name for name in ("prompt", "messages") if name in record]
    if len(given) != 1:
        raise UserError(
            f"{place}: {' and '.join(given) or 'no prompt'} given; give either prompt, a text, or "
            "messages, a list of objects"
        )
    prompt = record[given[0]]
    if given == ["prompt"]:
        if not isinstance(prompt, str):
            raise UserError(f"{place}: prompt is a {type(prompt).__name__}; give a text")
        return prompt
    if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
        raise UserError(f"{place}: messages is no list of objects with role and content")
    return prompt


def _read_completions(destination: Path) -> tuple[Done, int]:
    """What is done, and the length of its lines, after which there may be a part of one."""
    done: Done = {}
    end = 0
    if not destination.exists():
        return done, end
    with destination.open("rb") as file:
        for number, data in enumerate(file, 1):
            if not data.endswith(b"\n"):
                break
            place = f"{destination}:{number}"
            record = _from_line(place, data)
            index, sample = record.get("index"), record.get("sample", 0)
            if not (isinstance(index, int) and isinstance(sample, int) and "completion" in record):
                raise UserError(f"{place} is no completion; give another file to write")
            done[index, sample] = place, _fingerprint(record)
            end += len(data)
    return done, end


def _check_prompts(source: Path, sampling: Sampling, done: Done) -> int:
    """The number of prompts, all of them read, and compared with what is done."""
    prompts, matched = 0, 0
    for line in _read_prompts(source, sampling):
        prompts += 1
        for sample in range(sampling.num_samples):
            place, prompt = done.get((line.index, sample), ("", ""))
            matched += bool(place)
            if place and prompt != _fingerprint(line.record):
                raise UserError(
                    f"{place} completes another prompt than {line.place}; give the file that it "
                    "was made from, or another one to write"
                )
    if not prompts:
        raise UserError(f'{source} has no prompts; give one a line, such as {{"prompt": "Once"}}')
    if matched != len(done):
        place = next(
            place
            for (index, sample), (place, _) in done.items()
            if not (0 <= index < prompts and 0 <= sample < sampling.num_samples)
        )
        raise UserError(
            f"{place} completes a prompt or sample that {source} has not; give the file that it "
            "was made from, or another one to write"
        )
    return prompts


def _fingerprint(record: dict[str, Any]) -> str:
    """A hash of a prompt's line, whether or not a completion has been added to it."""
    kept = {name: value for name, value in record.items() if name not in ADDED}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _record(request: Request, completion: Completion, sampling: Sampling) -> dict[str, Any]:
    continuation = completion.continuation
    record = {"index": request.index, **request.origin.record}
    if sampling.num_samples > 1:
        record["sample"] = request.sample
    record |= {
        "completion": completion.text,
        "finish": continuation.finish,
        "tokens": len(continuation.tokens),
    }
    if sampling.logprobs is not None:
        record["logprobs"] = continuation.logprobs
        record["top_logprobs"] = continuation.top_logprobs
    return record


def _from_line(place: str, data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 ({error.reason}); convert the file first") from error
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error}); give one object a line") from error
    except RecursionError as error:
        raise UserError(f"{place}: nested too deeply; give one object a line") from error
    if not isinstance(record, dict):
        raise UserError(f"{place}: a {type(record).__name__}; give one object a line")
    return record


def _to_line(record: dict[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"
    except UnicodeEncodeError:
        # Half a surrogate pair, which JSON can spell and UTF-8 cannot.
        return json.dumps(record).encode("ascii") + b"\n"


def _settings(model: Model, sampling: Sampling, key: jax.Array | None) -> dict[str, Any]:
    """All that completions depend on beside their prompts, as JSON has it."""
    config = model.config.to_dict()
    key = jax.random.key(0) if key is None else key
    settings = {
        "model": {name: config[name] for name in config if name not in EXECUTION_FIELDS},
        "params": _params_fingerprint(model.params),
        "stop_ids": model.stop_ids,
        "sampling": dataclasses.asdict(sampling),
        "key": np.asarray(jax.random.key_data(key)).tolist(),
    }
    return json.loads(json.dumps(settings))


def _params_fingerprint(params: Params) -> str:
    """A hash of some values of every parameter: enough to tell models apart, and soon computed."""
    digest = hashlib.sha256()
    for path, values in jax.tree_util.tree_leaves_with_path(_some_values(params)):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(values).tobytes())
    return digest.hexdigest()


@jax.jit
def _some_values(params: Params) -> Params:
    def some(x: jax.Array) -> jax.Array:
        places = np.unravel_index(np.linspace(0, x.size - 1, num=64, dtype=np.int64), x.shape)
        return x[places].astype(jnp.float32)

    return jax.tree.map(some, params)


def _check_settings(destination: Path, settings: dict[str, Any], *, is_begun: bool) -> None:
    """Compares settings with those of a run that goes on, or writes those of a new one."""
    path = destination.with_name(destination.name + ".settings.json")
    if not is_begun:
        # Replaced at once, so that a kill leaves a whole file.
        unfinished = path.with_name(path.name + ".new")
        unfinished.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
        return
    way_out = "go on with the same settings, or give another file to write"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{destination} has completions, but {path.name}, which tells what they were made "
            "with, is missing; give another file to write"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); give another file to write") from error
    for name, value in {**settings, **settings["sampling"]}.items():
        old = before.get(name, before.get("sampling", {}).get(name))
        if old == value or name == "sampling":
            continue
        if name in settings["sampling"]:
            raise UserError(f"{destination} was made with {name} {old}, not {value}; {way_out}")
        what = {"params": "another model", "model": "another model", "key": "another seed or key"}
        raise UserError(f"{destination} was made with {what.get(name, name)}; {way_out}")


@contextlib.contextmanager
def _alone(destination: Path) -> Iterator[None]:
    """Holds a lock beside the file, so that no two runs write to it."""
    import filelock

    lock = filelock.FileLock(destination.with_name(destination.name + ".lock"), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"{destination} is in use by another run; wait for it to end, or give another file"
        ) from None
    try:
        yield
    finally:
        lock.release()
