"""Every block of code in docs/pages is run, with small models; the site builds without a warning.

A block is fenced with the name of its language. What this file does with it:

- `python`: run, after the blocks of the page before it and with their names.
- `bash`: `gptjax ...` and `python experiments/...` are run in this process, with the small settings
  of `SMALL`. Of `pip install`, `git`, `srun` and others of `OTHERS` it is checked that the commands
  and extras of this project in them exist, with all their flags.
- `text`: not run; what it shows of a command's refusal is compared with what the command says.

A comment before a block says otherwise: `<!-- test: parse -->` for commands that need a machine or
data that is not here (each flag is checked against the command's own), `<!-- test: refused -->` for
what ends with an error, which the text block after it shows, `<!-- test: needs MODULE -->` for what
is run where MODULE is installed, and `<!-- test: process -->` for what needs a fresh Python.
"""

import dataclasses
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from commands import Command, script
from hub_cache import lay_out_cache
from jax.experimental.compilation_cache import compilation_cache
from small_models import random_params
from small_tokenizers import chat_like

import gptjax
from gptjax import cli, command_line
from gptjax.config import ModelConfig, preset
from gptjax.errors import UserError
from gptjax.model import Model
from gptjax.pretrained import hub
from gptjax.pretrained.huggingface import save_pretrained
from gptjax.sampling import Sampling
from gptjax.tokenizer import BPETokenizer

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "pages"
NAMES = sorted(str(path.relative_to(PAGES)) for path in PAGES.rglob("*.md"))

SLOW = (
    "how-to/evaluate.md",
    "how-to/export.md",
    "how-to/fine-tune.md",
    "how-to/generate.md",
    "how-to/index.md",
    "how-to/own-data.md",
)

_EVERY = {"--eval-every": "2", "--checkpoint-every": "2", "--steps": "2"}
_TRAINING = _EVERY | {
    "--batch-size": "2",
    "--eval-batch-size": "2",
    "--model.num-layers": "1",
    "--model.embed-dim": "16",
    "--model.num-heads": "2",
    "--model.context-length": "32",
    "--bpe-vocab-size": "270",
}
_FINE_TUNING = _EVERY | {
    "--batch-size": "2",
    "--context-length": "64",
    "--eval-items": "2",
    "--validation-items": "1",
    "--few-shot": "1",
    "--bpe-vocab-size": "270",
    "--scratch.embed-dim": "16",
    "--scratch.num-layers": "1",
    "--scratch.num-heads": "2",
}
SMALL: dict[str, dict[str, str]] = {
    "quickstart": _TRAINING,
    "shakespeare_char": _TRAINING,
    "finetune_sentiment": _FINE_TUNING,
    "finetune_chat": _FINE_TUNING,
    "gptjax generate": {"--max-new-tokens": "3"},
    "gptjax batch": {"--max-new-tokens": "3", "--slots": "2"},
    "gptjax chat": {"--max-new-tokens": "3"},
    "gptjax evaluate": {"--limit": "2", "--max-new-tokens": "3"},
    "gptjax memorization": {"--samples": "2", "--max-new-tokens": "8", "--passages": "2"},
    "gptjax plan": {"--compile": "False"},
}
"""Flags of scripts and commands here, whatever a page gives."""

OTHERS = ("pip", "git", "srun", "gcloud", "xpk", "python -m venv", ".", "export", "hf", "mkdocs")
"""What else may stand in a block of bash; it is not run."""

TEXT = (
    "The quick brown fox jumps over the lazy dog. I love programming, and programming loves me.\n"
)


@dataclass(frozen=True)
class Block:
    line: int
    how: str
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    pattern = r"^(?:<!-- test: (.*?) -->\n+)?```([^\n]*)\n(.*?)^```$"
    found = [
        Block(text.count("\n", 0, match.start()) + 1, match[1] or "", match[2], match[3])
        for match in re.finditer(pattern, text, re.M | re.S)
    ]
    # What is fenced otherwise, or indented, would not be run.
    assert len(re.findall(r"^\s*(?:```|~~~)", text, re.M)) == 2 * len(found), page
    return found


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Pages train models of one small shape again and again."""
    folder = tmp_path_factory.mktemp("compiled")
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that pages name: models, texts, data and runs."""
    folder = tmp_path_factory.mktemp("workspace")
    rng = np.random.default_rng(7)
    text = BPETokenizer.train([TEXT], 290)
    config = ModelConfig(vocab_size=290, num_layers=2, embed_dim=16, num_heads=2)
    save_pretrained(Model(config, random_params(config, rng), text), folder / "gpt2")
    lay_out_cache("openai-community/gpt2", folder / "gpt2", folder / "home")
    chat = chat_like()
    chat.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = preset("llama2-7b").replace(
        **{"vocab_size": chat.vocab_size, "num_layers": 1, "embed_dim": 16, "num_heads": 2},
        **{"mlp_dim": 32, "context_length": 512},
    )
    save_pretrained(Model(config, random_params(config, rng), chat), folder / "smollm2")

    documents = [TEXT * n for n in range(1, 30)]
    (folder / "book.txt").write_text("".join(documents), encoding="utf-8")
    (folder / "corpus").mkdir()
    write_lines(folder / "corpus" / "a.jsonl", [{"text": text} for text in documents])
    write_lines(folder / "prompts.jsonl", [{"prompt": "The quick"}, {"prompt": "I love"}])
    exchanges = [
        {"instruction": f"Say {n}.", "input": "", "output": f"It is {n}, a number."}
        for n in range(20)
    ]
    (folder / "instructions.json").write_text(json.dumps(exchanges), encoding="utf-8")
    (folder / "sst2").mkdir()
    for side in ("train", "dev"):
        rows = [f"{word} {side} film {n}\t{n % 2}" for n, word in enumerate(["bad", "good"] * 30)]
        (folder / "sst2" / f"{side}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    questions = [
        {"context": f"{TEXT}So {n} and two are", "choices": [" four", " five"], "label": 0}
        for n in range(3)
    ]
    write_lines(folder / "questions.jsonl", questions)
    return folder


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_blocks_can_be_read(name: str, monkeypatch: pytest.MonkeyPatch):
    for block in blocks(PAGES / name):
        where = f"{name}:{block.line}"
        assert block.language in ("python", "bash", "text"), where
        if block.language == "python":
            compile(block.code, where, "exec")
        for line in lines(block) if block.language == "bash" else ():
            for command, args in commands_in(line, where):
                if block.how != "refused":
                    check_flags(command, args, monkeypatch)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in NAMES]
)
def test_blocks(
    name: str,
    workspace: Path,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    found = blocks(PAGES / name)
    here = tmp_path / "here"
    shutil.copytree(workspace, here, symlinks=True)
    # Scripts are named from the repository's root.
    (here / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HF_HOME", str(here / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "home" / "hub"))
    monkeypatch.setenv("GPTJAX_CACHE", str(here / "cache"))
    monkeypatch.setattr(hub, "_smollm2", lambda: here / "smollm2")
    # The samples of a run, which are long.
    short = Sampling(max_new_tokens=4, overflow="slide")
    defaults: Any = gptjax.fit.__kwdefaults__
    monkeypatch.setitem(defaults, "sampling", short)
    page = Page(name, command, monkeypatch)
    for place, block in enumerate(found):
        after = found[place + 1].code if found[place + 1 :] else ""
        page.run(block, after)


class Page:
    """One page's blocks, run in turn."""

    def __init__(self, name: str, command: Command, monkeypatch: pytest.MonkeyPatch):
        self.name = name
        self.command = command
        self.monkeypatch = monkeypatch
        self.names: dict[str, Any] = {"__name__": "__main__"}

    def run(self, block: Block, after: str) -> None:
        where = f"{self.name}:{block.line}"
        if block.language == "text":
            return
        if block.language == "python":
            self.run_python(block, after, where)
        elif block.language == "bash":
            for line in lines(block):
                self.run_bash(line, block.how, after, where)
        else:
            raise AssertionError(f"{where}: a block of {block.language!r} has no way to be run")

    def run_python(self, block: Block, after: str, where: str) -> None:
        code = compile(block.code, where, "exec")
        if block.how.startswith("needs "):
            if any(importlib.util.find_spec(name) is None for name in block.how.split()[1:]):
                return
        elif block.how == "process":
            subprocess.run([sys.executable, "-c", block.code], check=True, timeout=300)
            return
        elif block.how == "refused":
            with pytest.raises(UserError) as refusal:
                exec(code, self.names)
            assert same(f"{refusal.value}") == same(after.partition(": ")[2]), where
            return
        else:
            assert not block.how, where
        exec(code, self.names)

    def run_bash(self, line: str, how: str, after: str, where: str) -> None:
        for name, args in commands_in(line, where):
            if how == "parse" or line.partition(" ")[0] in OTHERS:
                check_flags(name, args, self.monkeypatch)
                continue
            self.monkeypatch.setattr(sys, "stdin", io.StringIO("Say 1.\n"))
            status, out, err = self.command(name, *small(name, args))
            if how == "refused":
                assert (status, same(err)) == (2, same(after)), where
            else:
                assert not how, where
                assert status == 0, f"{where}: {line}\n{out}\n{err}"


def lines(block: Block) -> list[str]:
    return block.code.replace("\\\n", " ").splitlines()


def commands_in(line: str, where: str) -> list[tuple[str, list[str]]]:
    """The scripts and commands of this project in a line, also behind those of other tools."""
    line = line.strip()
    if not line or line.startswith("#"):
        return []
    known = "|".join(cli.COMMANDS)
    start = [*map(re.escape, OTHERS), rf"gptjax (?:{known})\b", r"python experiments/\w"]
    assert re.match(rf"({'|'.join(start)})", line), f"{where}: {line}"
    for extra in re.findall(r"pip install .*\[([\w,]+)\]", line):
        assert set(extra.split(",")) <= extras(), f"{where}: {line}"
    found = []
    inside = rf"(?:^|[\s'])((?:[^\s']*python experiments/|gptjax (?:{known})\b)[^&']*)"
    for text in re.findall(inside, line.replace(">", " > ")):
        name, *args = shlex.split(text.partition(" > ")[0])
        if name.endswith("python"):
            assert (ROOT / args[0]).is_file(), f"{where}: {line}"
            name, args = Path(args[0]).stem, args[1:]
        found.append((name, args))
    return found


def same(text: str) -> str:
    """A message without how it is broken into lines."""
    return " ".join(text.split())


def extras() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return set(project["project"]["optional-dependencies"])


def small(name: str, args: list[str]) -> list[str]:
    """A command's arguments with those of `SMALL`."""
    key = f"gptjax {args[0]}" if name == "gptjax" else name
    flags = dict(SMALL.get(key, {}))
    if name in ("quickstart", "shakespeare_char") and "--data" not in args:
        # In place of the documentation inside Python, and of a download.
        flags["--data"] = "book.txt"
    if "--max-length" in args:
        flags = {"--max-length": "40"}
    args = list(args)
    for flag, value in flags.items():
        if flag in args:
            args[args.index(flag) + 1] = value
        else:
            args += [flag, value]
    return args


def check_flags(name: str, args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parses a command's flags, and stops before its work."""
    if name == "gptjax":
        kind, _, summary = cli.COMMANDS[args[0]]
        command_line.parse_flags(kind, None, summary, cli._switched_on(kind, args[1:]))
        return

    class Parsed(Exception):  # noqa: N818
        pass

    module = script(name)

    def parse(*given: Any) -> None:
        command_line.parse(*given)
        raise Parsed

    def parse_flags(*given: Any) -> None:
        command_line.parse_flags(*given)
        raise Parsed

    for wrapped in (parse, parse_flags):
        if hasattr(module, wrapped.__name__):
            monkeypatch.setattr(module, wrapped.__name__, wrapped)
    monkeypatch.setattr(sys, "argv", [name, *args])
    with pytest.raises(Parsed):
        module.main()


def test_a_wrong_flag_of_a_parsed_block_is_found(monkeypatch: pytest.MonkeyPatch):
    for name, args in {
        "quickstart": ["--stepz", "3"],
        "sample": ["run", "--topk", "3"],
        "gptjax": ["plan", "gpt2", "--batches", "3"],
    }.items():
        with pytest.raises(UserError, match="unknown flag"):
            check_flags(name, args, monkeypatch)


def test_every_public_name_is_in_the_reference_once():
    text = "\n".join(path.read_text("utf-8") for path in sorted((PAGES / "reference").glob("*.md")))
    entries = re.findall(r"^::: (\S+)$", text, re.M)
    assert len(entries) == len(set(entries))
    for name in gptjax.__all__:
        home = importlib.import_module(gptjax._HOMES[name])
        value = getattr(home, name)
        assert entries.count(f"{value.__module__}.{name}") == 1, name
    for entry in entries:
        module, _, name = entry.rpartition(".")
        if module.endswith(".harness") and importlib.util.find_spec("lm_eval") is None:
            # Its class is one of lm_eval's, an extra.
            assert f"class {name}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text("utf-8")
            continue
        assert hasattr(importlib.import_module(module), name), entry


def test_every_command_is_in_the_reference():
    text = (PAGES / "reference" / "commands.md").read_text("utf-8")
    assert re.findall(r"^## gptjax (\w+)$", text, re.M) == list(cli.COMMANDS)
    for name, (kind, _, _) in cli.COMMANDS.items():
        assert f"::: gptjax.cli.{kind.__name__}\n" in text
        [usage] = re.findall(rf"^gptjax {name}\b(.*)$", text, re.M)
        fields = dataclasses.fields(kind)
        positional = [field.name for field in fields if "Positional" in str(field.type)]
        assert [word.strip("[]").lower() for word in usage.split()] == positional


def test_what_pages_name_exists():
    for name in NAMES:
        text = (PAGES / name).read_text("utf-8")
        for path in re.findall(r"`((?:experiments|gptjax|tests|notebooks)/[\w/.]+\.\w+)", text):
            assert "NAME" in path or (ROOT / path).exists(), f"{name}: {path}"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path):
    for module in ("latex2mathml", "mkdocs", "mkdocstrings", "nbconvert"):
        pytest.importorskip(module)
    site = tmp_path / "site"
    found = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/mkdocs.yml", "-d", site],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    assert "WARNING" not in found.stderr
    pages = [
        *NAMES,
        *(f"tutorials/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")),
    ]
    for name in pages:
        folder = Path(name).with_suffix("")
        folder = folder.parent if folder.name == "index" else folder
        text = (site / folder / "index.html").read_text("utf-8")
        # Nothing is loaded from elsewhere when a page is read.
        loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?:[^\s\">]+)", text)
        assert not [address for address in loaded if "canonical" not in address], name
