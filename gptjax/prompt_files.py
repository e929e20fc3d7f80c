"""Files of prompts continued: JSON Lines in, JSON Lines out, and a stopped run goes on."""

import codecs
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax.batching import Completion, Request, complete, text_requests
from gptjax.errors import UserError
from gptjax.model import Model
from gptjax.reporting import Progress, duration
from gptjax.resumable import (
    alone,
    check_settings,
    from_line,
    model_settings,
    to_line,
    whole_lines,
)
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
    """A text, or the messages of a conversation."""
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
    with alone(destination):
        done, end = _read_completions(destination)
        prompts = _check_prompts(source, sampling, done)
        if sampling.seeds is not None and len(sampling.seeds) != prompts:
            raise UserError(f"{len(sampling.seeds)} seeds for {prompts} prompts; one a prompt")
        settings = _settings(model, sampling, key)
        found = complete(
            model, _requests(model, source, sampling, done), sampling, key, slots=slots
        )
        check_settings(destination, settings, is_begun=bool(done))
        total = prompts * sampling.num_samples
        with (
            destination.open("ab") as file,
            Progress(total, show_progress, "generating", "completion") as shown,
        ):
            # A line that a kill cut short.
            file.truncate(end)
            added, tokens, start = 0, 0, time.monotonic()
            for request, completion in found:
                file.write(to_line(_record(request, completion, sampling)))
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
            record = from_line(place, data)
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
    lines, end = whole_lines(destination)
    for place, record in lines:
        index, sample = record.get("index"), record.get("sample", 0)
        if not (isinstance(index, int) and isinstance(sample, int) and "completion" in record):
            raise UserError(f"{place} is no completion; give another file to write")
        done[index, sample] = place, _fingerprint(record)
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


def _settings(model: Model, sampling: Sampling, key: jax.Array | None) -> dict[str, Any]:
    """All that completions depend on beside their prompts, as JSON has it."""
    key = jax.random.key(0) if key is None else key
    settings = {
        **model_settings(model),
        "stop_ids": model.stop_ids,
        "sampling": dataclasses.asdict(sampling),
        "key": np.asarray(jax.random.key_data(key)).tolist(),
    }
    return json.loads(json.dumps(settings))
