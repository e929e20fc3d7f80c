"""Files of prompts: what is written, and runs that are stopped at any byte."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
import pytest
from small_models import GPT2, random_params
from small_tokenizers import chat_like

from gptjax import prompt_files
from gptjax.batching import generate_texts
from gptjax.errors import UserError
from gptjax.model import Model
from gptjax.params import init_params
from gptjax.prompt_files import generate_file
from gptjax.sampling import Sampling
from gptjax.tokenizer import ByteTokenizer, tokenizer_from_dict

SAMPLING = Sampling(max_new_tokens=7, temperature=2.0)
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

# A process that continues a file, slowly: a pause after each line.
SLOWLY = """
import sys, time
from test_prompt_files import SAMPLING, fixed_model
from gptjax import prompt_files

to_line = prompt_files.to_line
prompt_files.to_line = lambda record: time.sleep(0.2) or to_line(record)
prompt_files.generate_file(fixed_model(), sys.argv[1], sys.argv[2], SAMPLING, slots=2)
"""


def fixed_model(seed: int = 0) -> Model:
    """The same in every process."""
    config = GPT2.replace(vocab_size=ByteTokenizer().vocab_size, context_length=32)
    return Model(config, init_params(config, jax.random.key(seed)), ByteTokenizer())


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """The lines in the order of the prompts."""
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    return sorted(records, key=lambda record: (record["index"], record.get("sample", 0)))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    prompts = ["a", "to be", "or not to be", "é\u2028", "", "that is", "q", "the"]
    records = [{"prompt": prompt, "id": f"n{place}"} for place, prompt in enumerate(prompts)]
    return write(tmp_path / "in.jsonl", records)


def test_lines_are_completed_and_keep_what_they_hold(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tokenizer = tokenizer_from_dict(chat_like().to_dict() | {"chat_template": TEMPLATE})
    config = GPT2.replace(vocab_size=tokenizer.vocab_size, context_length=96)
    model = Model(config, random_params(config, rng), tokenizer)
    messages = [{"role": "user", "content": "hello"}]
    records = [
        {"prompt": "the cat", "id": 7, "nested": {"é": [1, None, 0.1]}, "half": "\ud800"},
        {"messages": messages, "max_new_tokens": 3},
        {"prompt": "", "max_new_tokens": 0},
    ]
    lines = ["", *map(json.dumps, records), "  "]
    source, destination = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    key = jax.random.key(4)
    sampling = SAMPLING.replace(num_samples=2, logprobs=1, stop=("e",), max_new_tokens=12)
    assert generate_file(model, source, destination, sampling, key, slots=2) == 6
    prompts = ["the cat", messages, ""]
    found = dict(generate_texts(model, prompts, sampling, key, max_new_tokens=[12, 3, 0]))
    for place, record in enumerate(read(destination)):
        continuation = found[place].continuation
        logprobs = record.pop("logprobs")
        assert continuation.logprobs is not None
        np.testing.assert_allclose(logprobs, continuation.logprobs, atol=1e-4)
        assert [len(top) for top in record.pop("top_logprobs")] == [1] * len(logprobs)
        assert record == {
            **records[place // 2],
            "index": place // 2,
            "sample": place % 2,
            "completion": found[place].text,
            "finish": continuation.finish,
            "tokens": len(continuation.tokens),
        }
    assert generate_file(model, source, destination, sampling, key) == 0


def test_a_run_stopped_at_any_byte_goes_on(
    tmp_path: Path, source: Path, rng: np.random.Generator
) -> None:
    model = fixed_model()
    whole = tmp_path / "whole.jsonl"
    assert generate_file(model, source, whole, SAMPLING, slots=3, show_progress=False) == 8
    expected, data = read(whole), whole.read_bytes()
    ends = [place + 1 for place, byte in enumerate(data) if byte == ord("\n")]
    stopped = tmp_path / "stopped.jsonl"
    settings = (tmp_path / "whole.jsonl.settings.json").read_bytes()
    (tmp_path / "stopped.jsonl.settings.json").write_bytes(settings)
    # The end of a line, its newline lacking, its first byte, and anywhere.
    for size in (0, ends[2], ends[2] - 1, ends[2] + 1, *rng.integers(0, len(data), 4)):
        stopped.write_bytes(data[:size])
        left = 8 - sum(end <= size for end in ends)
        assert generate_file(model, source, stopped, SAMPLING, slots=2) == left
        assert read(stopped) == expected


def test_a_run_that_is_killed_goes_on(tmp_path: Path, source: Path) -> None:
    destination = tmp_path / "out.jsonl"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
    }
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, source, destination], env=environment)
    try:
        deadline = time.monotonic() + 240
        while not destination.exists() or destination.read_bytes().count(b"\n") < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    done = destination.read_bytes().count(b"\n")
    assert 2 <= done < 8
    with destination.open("ab") as file:
        # What a kill in the middle of a write leaves.
        file.write(b'{"index": 7, "prompt": "th')
    model = fixed_model()
    assert generate_file(model, source, destination, SAMPLING, slots=3) == 8 - done
    whole = tmp_path / "whole.jsonl"
    generate_file(model, source, whole, SAMPLING)
    assert read(destination) == read(whole)


def test_each_line_is_there_as_soon_as_it_is_complete(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = tmp_path / "out.jsonl"
    sizes = []
    to_line: Callable[[dict[str, Any]], bytes] = prompt_files.to_line

    def watched(record: dict[str, Any]) -> bytes:
        sizes.append(destination.read_bytes().count(b"\n"))
        return to_line(record)

    monkeypatch.setattr(prompt_files, "to_line", watched)
    generate_file(fixed_model(), source, destination, SAMPLING)
    assert sizes == list(range(8))


def test_prompts_may_be_added_and_changed_that_are_not_done(tmp_path: Path, source: Path) -> None:
    model, destination = fixed_model(), tmp_path / "out.jsonl"
    records = [json.loads(line) for line in source.read_bytes().splitlines()]
    too_long = {"prompt": "far too long " * 3}
    write(source, [*records[:5], too_long, *records[6:]])
    place = r"in\.jsonl:6: the prompt of 39 tokens and 7 new ones.*context of 32"
    with pytest.raises(UserError, match=place):
        generate_file(model, source, destination, SAMPLING, slots=1)
    assert [record["index"] for record in read(destination)] == [0, 1, 2, 3, 4]
    write(source, [*records, {"prompt": "more"}])
    assert generate_file(model, source, destination, SAMPLING) == 4
    assert [record["index"] for record in read(destination)] == list(range(9))


def test_what_does_not_agree_is_refused(tmp_path: Path, source: Path) -> None:
    model, destination = fixed_model(), tmp_path / "out.jsonl"
    generate_file(model, source, destination, SAMPLING, jax.random.key(1))
    before = destination.read_bytes()
    records = [json.loads(line) for line in source.read_bytes().splitlines()]

    def refused(words: str, **changes: Any) -> None:
        arguments: dict[str, Any] = {
            "model": model,
            "source": source,
            "destination": destination,
            "sampling": SAMPLING,
            "key": jax.random.key(1),
        }
        with pytest.raises(UserError, match=words):
            generate_file(**arguments | changes)
        assert destination.read_bytes() == before

    refused("made with temperature 2.0, not 1.0", sampling=SAMPLING.replace(temperature=1.0))
    refused("max_new_tokens 7, not 8", sampling=SAMPLING.replace(max_new_tokens=8))
    refused("another seed or key", key=jax.random.key(2))
    refused("another model", model=fixed_model(1))
    refused("8 seeds|7 seeds", sampling=SAMPLING.replace(seeds=tuple(range(7))))
    changed = write(tmp_path / "changed.jsonl", [*records[:3], {"prompt": "x"}, *records[4:]])
    refused(r"out\.jsonl:\d completes another prompt than .*changed\.jsonl:4", source=changed)
    refused("has not", source=write(tmp_path / "fewer.jsonl", records[:5]))
    refused("is the file of the prompts", source=destination)
    with filelock.FileLock(tmp_path / "out.jsonl.lock"):
        refused("in use by another run")
    settings = tmp_path / "out.jsonl.settings.json"
    text = settings.read_text()
    settings.write_text("{")
    refused("is damaged")
    settings.unlink()
    refused("settings.json.*is missing")
    settings.write_text(text)
    assert generate_file(model, source, destination, SAMPLING, jax.random.key(1)) == 0
    destination.write_text('{"text": "something else"}\n')
    before = destination.read_bytes()
    refused(r"out\.jsonl:1 is no completion")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a"', "not JSON"),
        ('["a"]', "a list; give one object"),
        ("\xff", "not UTF-8"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": "a"}', "no prompt given"),
        ('{"prompt": "a", "messages": []}', "prompt and messages given"),
        ('{"prompt": ["a"]}', "prompt is a list"),
        ('{"messages": "a"}', "messages is no list"),
        ('{"prompt": "a", "max_new_tokens": "3"}', "max_new_tokens is '3'"),
        ('{"prompt": "a", "max_new_tokens": -1}', "max_new_tokens is -1"),
        ('{"prompt": "a", "max_new_tokens": true}', "max_new_tokens is True"),
        ('{"prompt": "a", "completion": "b"}', "'completion' is one that completions add"),
    ],
)
def test_bad_lines_are_told_by_their_number(tmp_path: Path, line: str, words: str) -> None:
    source, destination = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b'\n{"prompt": "a"}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match=rf"in\.jsonl:3: .*{words}") as error:
        generate_file(fixed_model(), source, destination, SAMPLING)
    assert "\n" not in str(error.value)
    assert not destination.exists()


def test_no_prompts(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    for text in ("", "\n \n"):
        source.write_text(text)
        with pytest.raises(UserError, match=r"in\.jsonl has no prompts"):
            generate_file(fixed_model(), source, tmp_path / "out.jsonl", SAMPLING)
    with pytest.raises(FileNotFoundError):
        generate_file(fixed_model(), tmp_path / "missing", tmp_path / "out.jsonl", SAMPLING)


def test_progress_is_told_where_there_is_no_terminal(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate_file(fixed_model(), source, tmp_path / "a.jsonl", SAMPLING, show_progress=False)
    assert capsys.readouterr().out == ""
    generate_file(fixed_model(), source, tmp_path / "b.jsonl", SAMPLING)
    assert "completion 8/8  " in capsys.readouterr().out
