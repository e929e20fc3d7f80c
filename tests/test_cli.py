"""The commands about models: generate, batch, chat, convert, verify and doctor."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from commands import Command
from small_models import GPT2, random_params

from gptjax import doctor
from gptjax.model import Model, forward
from gptjax.pretrained.huggingface import save_pretrained
from gptjax.pretrained.loading import load
from gptjax.pretrained.tokenizer_files import read_tokenizer
from gptjax.sampling import Sampling
from gptjax.text_generation import generate_chat, generate_text, prompt_ids, stream_text
from gptjax.tokenizer import BPETokenizer, CharTokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def directory(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A model with a byte-level vocabulary and a chat template."""
    trained = BPETokenizer.train(["to be or not to be, that is the question"], 300)
    values = trained.to_dict() | {"chat_template": TEMPLATE}
    from gptjax.tokenizer import tokenizer_from_dict

    tokenizer = tokenizer_from_dict(values)
    config = GPT2.replace(vocab_size=trained.vocab_size, context_length=128)
    save_pretrained(Model(config, random_params(config, rng), tokenizer), tmp_path / "model")
    return tmp_path / "model"


def test_generate(directory: Path, command: Command) -> None:
    model = load(directory)
    prompt = "to be"
    sampling = Sampling(max_new_tokens=7, temperature=0)
    expected = prompt + generate_text(model, prompt, sampling)[0] + "\n"
    arguments = ("generate", directory, prompt, "--temperature", 0)
    assert command("gptjax", *arguments, "--max-new-tokens", 7) == (0, expected, "")
    length = len(prompt_ids(model, prompt)) + 7
    assert command("gptjax", *arguments, "--max-length", length) == (0, expected, "")
    status, _, error = command("gptjax", *arguments, "--max-length", 1)
    assert status == 2
    assert "the prompt alone has" in error


def test_batch(directory: Path, tmp_path: Path, command: Command) -> None:
    model = load(directory)
    source, destination = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    messages = [{"role": "user", "content": "to be?"}]
    source.write_text('{"prompt": "to be"}\n' + json.dumps({"messages": messages}) + "\n")
    flags = ("--max-new-tokens", 7, "--temperature", 0, "--stop", "zz", "\n", "--slots", 2)
    arguments = ("batch", directory, source, destination, *flags)
    status, out, error = command("gptjax", *arguments)
    assert (status, error) == (0, "")
    assert out.splitlines()[0].startswith("completion 2/2  ")
    assert out.endswith(f"2 completions are added to {destination}\n")
    sampling = Sampling(max_new_tokens=7, temperature=0, stop=("zz", "\n"))
    records = [json.loads(line) for line in destination.read_text().splitlines()]
    assert {record["index"]: record["completion"] for record in records} == {
        0: generate_text(model, "to be", sampling)[0],
        1: generate_chat(model, messages, sampling),
    }
    # Again: nothing is left to do; and with other settings it is refused.
    assert command("gptjax", *arguments)[1] == f"0 completions are added to {destination}\n"
    status, out, error = command("gptjax", *arguments, "--seed", 1)
    assert (status, out) == (2, "")
    assert "another seed" in error
    status, _, error = command("gptjax", "batch", directory, tmp_path / "missing", destination)
    assert status == 2
    assert "No such file" in error


def test_chat(directory: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(directory)
    monkeypatch.setattr("sys.stdin", io.StringIO("to be?\n\nor not?\n"))
    options = ("--temperature", 0, "--max-new-tokens", 8, "--top-p", 1)
    status, out, error = command("gptjax", "chat", directory, "--system", "that", *options)
    assert (status, error) == (0, "")
    sampling = Sampling(max_new_tokens=8, temperature=0)
    messages = [{"role": "system", "content": "that"}, {"role": "user", "content": "to be?"}]
    first = generate_chat(model, messages, sampling)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "or not?"}]
    second = generate_chat(model, messages, sampling)
    assert out == f"{first}\n{second}\n"


def test_a_long_chat_forgets_its_beginning(
    directory: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the question\n" * 12))
    status, _, error = command("gptjax", "chat", directory, "--max-new-tokens", 8)
    assert (status, error) == (0, "")


def test_a_message_that_is_too_long_is_refused_and_the_chat_goes_on(
    directory: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("xyz " * 100 + "\nto be?\n"))
    status, out, error = command("gptjax", "chat", directory, "--max-new-tokens", 500)
    assert status == 0
    assert "leaves 64 beside an answer" in error
    assert out.endswith("\n")


def test_an_interrupted_answer_does_not_end_the_chat(
    directory: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptjax import text_generation

    answers = iter((["to", KeyboardInterrupt()], ["be"]))

    def interrupted(*_: Any, **__: Any) -> Any:
        for piece in next(answers):
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    monkeypatch.setattr(text_generation, "stream_text", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("a?\nb?\n"))
    assert command("gptjax", "chat", directory) == (0, "to\nbe\n", "")


def test_prompts_that_look_like_flags(directory: Path, command: Command) -> None:
    flags = ("--max-new-tokens", 1, "--temperature", 0)
    status, out, error = command("gptjax", "generate", *flags, "--", directory, "--to be")
    assert (status, error) == (0, "")
    assert out.startswith("--to be")
    status, _, error = command("gptjax", "generate", directory, "--to be", *flags)
    assert status == 2
    assert "after --" in error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--seed", "99999999999999999999"), "seed is 99999999999999999999"),
        (("--num-samples", "-1"), "num_samples is -1"),
        (("--max-new-tokens", "-1"), "max_new_tokens is -1"),
    ],
)
def test_numbers_out_of_range(
    directory: Path, command: Command, flags: tuple[str, ...], words: str
) -> None:
    status, out, error = command("gptjax", "generate", directory, "to be", *flags)
    assert (status, out) == (2, "")
    assert words in error


def test_version(command: Command) -> None:
    status, out, _ = command("gptjax", "--version")
    assert status == 0
    assert out.startswith("gptjax ")


def test_a_backend_that_does_not_start(tmp_path: Path) -> None:
    for arguments, words in ((("doctor",), "JAX_PLATFORMS=nonsense"), (("generate", "x"), "error")):
        done = subprocess.run(
            [sys.executable, "-m", "gptjax.cli", *arguments],
            env=os.environ | {"JAX_PLATFORMS": "nonsense", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert words in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_chat_needs_a_template(tmp_path: Path, command: Command, rng: Any) -> None:
    tokenizer = CharTokenizer("abcdefghij")
    save_pretrained(Model(GPT2, random_params(GPT2, rng), tokenizer), tmp_path)
    status, out, error = command("gptjax", "chat", tmp_path)
    assert (status, out) == (2, "")
    assert "chat template" in error


def test_streamed_is_what_comes_at_once(directory: Path) -> None:
    model = load(directory)
    for stop in ((), ("o",), ("t b", "zz")):
        sampling = Sampling(max_new_tokens=40, stop=stop, seeds=(3,))
        whole = generate_text(model, "to be", sampling)[0]
        assert "".join(stream_text(model, "to be", sampling)) == whole
    assert list(stream_text(model, "to be", Sampling(max_new_tokens=0))) == []


def test_convert(directory: Path, tmp_path: Path, command: Command) -> None:
    status, out, error = command("gptjax", "convert", directory, tmp_path / "new")
    assert (status, error) == (0, "")
    assert str(tmp_path / "new") in out
    one, other = load(directory), load(tmp_path / "new")
    tokens = jnp.asarray([[1, 2, 3]])
    np.testing.assert_array_equal(
        forward(one.params, tokens, one.config), forward(other.params, tokens, other.config)
    )
    assert read_tokenizer(tmp_path / "new").encode("to be") == one.tokenizer.encode("to be")
    status, _, error = command("gptjax", "convert", directory, tmp_path / "new")
    assert status == 2
    assert "not empty" in error
    flags = ("--overwrite", "True", "--dtype", "bfloat16")
    assert command("gptjax", "convert", directory, tmp_path / "new", *flags)[0] == 0
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == "bfloat16"


def test_verify(directory: Path, command: Command) -> None:
    status, out, error = command("gptjax", "verify", directory)
    assert (status, error) == (0, "")
    assert [line.split()[0] for line in out.splitlines()][:3] == ["ok"] * 3
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    tensors["transformer.h.0.ln_1.bias"][3] = np.nan
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    status, out, error = command("gptjax", "verify", directory)
    assert status == 2
    assert "numbers: not finite in blocks.attention_norm.bias" in out
    assert "numbers" in error
    (directory / "model.safetensors").write_bytes(b"")
    assert command("gptjax", "verify", directory)[0] == 2


def test_verify_notices_another_function(
    directory: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="transformers, which is compared with, is missing")
    pytest.importorskip("torch", reason="PyTorch, which is compared with, is missing")
    assert "logits: differ" in command("gptjax", "verify", directory)[1]
    from gptjax.pretrained import verification

    def wrong(params: Any, tokens: Any, config: Any) -> Any:
        return forward(params, tokens, config.replace(activation="gelu"))

    monkeypatch.setattr(verification, "forward", wrong)
    status, out, _ = command("gptjax", "verify", directory)
    assert status == 2
    assert "FAILED  logits" in out


def test_doctor(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, error = command("gptjax", "doctor")
    assert (status, error) == (0, "")
    for words in ("python", "jax ", "optax", "device", "cache"):
        assert words in out
    monkeypatch.setattr(doctor, "has_nvidia", lambda: True)
    monkeypatch.setattr(doctor, "has_tpu", lambda: True)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    out = command("gptjax", "doctor")[1]
    assert 'pip install "jax[cuda13]"' in out
    assert 'pip install "jax[tpu]"' in out
    assert "pip install jax jaxlib" in out
    monkeypatch.setattr(doctor, "_version", lambda name: "1.0")
    out = command("gptjax", "doctor")[1]
    assert "driver may be too old" in out
    assert "another process may hold it" in out
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    out = command("gptjax", "doctor")[1]
    assert out.count("JAX_PLATFORMS=cpu leaves it out") == 2


def test_score(
    directory: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptjax.scoring import score, to_html

    text = "to be, or\n\tnot to <b>bé</b>?"
    [result] = score(load(directory), text)
    status, out, error = command("gptjax", "score", directory, text)
    assert (status, error) == (0, "")
    assert out.startswith(text + "\n")
    assert f"{len(result.tokens)} tokens, perplexity {result.perplexity:.4g}" in out
    # The same from a file and from standard input, and with a page.
    page, file = tmp_path / "page.html", tmp_path / "text.txt"
    file.write_bytes(text.encode())
    flags = ("--file", file, "--html", page)
    assert command("gptjax", "score", directory, *flags) == (
        0,
        f"{out}the page is written to {page}\n",
        "",
    )
    assert page.read_bytes().decode() == to_html(result, title=f"Surprise of {directory}")
    for arguments in ((), ("-",)):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert command("gptjax", "score", directory, *arguments) == (0, out, "")
    # Longer than the model's context of 128.
    assert command("gptjax", "score", directory, text * 20, "--batch-size", 2)[0] == 0


def test_score_refuses(
    directory: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object) -> str:
        status, out, error = command("gptjax", "score", directory, *arguments)
        assert (status, out) == (2, "")
        return error

    file = tmp_path / "text.txt"
    file.write_bytes(b"\xff\xfe")
    assert "is not UTF-8" in refused("--file", file)
    assert "give one of them" in refused("to be", "--file", file)
    assert "No such file" in refused("--file", tmp_path / "missing.txt")
    assert "cannot write" in refused("to be", "--html", tmp_path / "missing" / "page.html")
    assert "cannot write" in refused("to be", "--html", tmp_path)
    assert "batch_size is 0" in refused("to be", "--batch-size", 0)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "the text is empty" in refused()
