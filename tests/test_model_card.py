"""The card of a run: metadata that the hub's own reader takes, every figure, no invented one."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import Command
from huggingface_hub import ModelCard
from small_models import MODERN

from gptjax.data import BatchLoader, evaluation_batches
from gptjax.errors import UserError
from gptjax.evaluation.bias import Pair, pairs_result
from gptjax.evaluation.calibration import calibration
from gptjax.evaluation.contamination import contamination
from gptjax.evaluation.memorization import MEMORIZATION_CAVEATS, Memorization, overlap_report
from gptjax.evaluation.results import Estimate
from gptjax.evaluation.suites import SuiteResult, write_results
from gptjax.fitting import fit
from gptjax.model_card import write_model_card
from gptjax.optimizer import OptimizerConfig
from gptjax.params import count_params, flops_per_token
from gptjax.plots import plot_losses
from gptjax.sampling import Sampling
from gptjax.tokenizer import ByteTokenizer

CONFIG = MODERN.replace(vocab_size=257, num_layers=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `fit` wrote."""
    out = tmp_path_factory.mktemp("runs") / "small"
    tokens = np.random.default_rng(0).integers(0, 256, 2000).astype(np.uint16)
    fit(
        CONFIG,
        OptimizerConfig(learning_rate=1e-3, warmup_steps=1),
        BatchLoader(tokens, batch_size=4, context_length=16),
        steps=3,
        out=out,
        eval_data=evaluation_batches(tokens[:500], batch_size=4, context_length=16),
        tokenizer=ByteTokenizer(),
        eval_every=1,
        sampling=Sampling(max_new_tokens=5),
        settings={"data": "/a/secret/book.txt", "batch_size": 4, "train_tokens": 2000},
        progress=False,
    )
    return out


def by_hand(folder: Path, **files: object) -> Path:
    folder.mkdir()
    config = {"model": CONFIG.to_dict(), "optimizer": None, "run": {}}
    for name, value in ({"config": config} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def front_matter(path: Path) -> dict[str, object]:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def bullet(text: str, name: str) -> str:
    [line] = [line for line in text.splitlines() if line.startswith(f"- {name}: ")]
    return line.removeprefix(f"- {name}: ")


def test_what_a_run_left(trained: Path, tmp_path: Path) -> None:
    path = write_model_card(
        trained,
        tmp_path / "card" / "README.md",
        license="apache-2.0",
        languages=["en", "zh"],
        datasets=["someone/books"],
        hardware="two cores",
        name="A small model",
    )
    assert path == tmp_path / "card" / "README.md"
    card = ModelCard.load(path)
    values = card.data.to_dict()
    assert values == front_matter(path)
    assert values["license"] == "apache-2.0"
    assert values["language"] == ["en", "zh"]
    assert values["datasets"] == ["someone/books"]
    assert values["library_name"] == "gptjax"
    assert values["pipeline_tag"] == "text-generation"
    assert "gptjax" in values["tags"]
    assert "model-index" not in values
    text = card.text
    summary = json.loads((trained / "summary.json").read_text())
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert "# A small model" in text
    assert bullet(text, "parameters") == f"{count_params(CONFIG):,}"
    assert bullet(text, "source") == "`book.txt`"
    assert "secret" not in text
    assert bullet(text, "steps") == "3"
    # 3 steps of 4 rows of 16, of 2000 tokens.
    assert bullet(text, "tokens") == "192, 0.096 times the data"
    assert bullet(text, "batch") == "4 sequences a step"
    flops = 192 * flops_per_token(CONFIG)
    assert bullet(text, "compute").startswith(f"{flops:.3g} FLOPs")
    assert bullet(text, "hardware") == "two cores"
    assert bullet(text, "seed") == "0"
    assert bullet(text, "SHA-256 of the parameters") == f"`{summary['params_sha256']}`"
    assert bullet(text, "last step's batch") == f"{metrics[-1]['loss']:.4f}"
    loss = summary["val_loss"]
    told = f"{loss:.4f} (perplexity {math.exp(loss):.4g})"
    assert bullet(text, "validation, at the end") == told
    assert bullet(text, "validation, the best") == f"{summary['best_val_loss']:.4f}"
    for row in metrics:
        assert f"| {row['step']} | {row['val_loss']:.4f} |" in text
    assert '"learning_rate": 0.001' in text
    assert "![Loss over steps](loss.png)" in text
    assert (path.parent / "loss.png").read_bytes() == (trained / "loss.png").read_bytes()
    sample = (trained / "samples.txt").read_text().split("=== step 3 ===\n")[1].strip("\n")
    assert sample in text
    measures = "bias, calibration, memorization of the training text, contamination"
    assert f"Not measured: {measures}" in text
    # The card lists each of its sections once.
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## Data", "## Training", "## Losses", "## Limits", "## Use"]


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    run = by_hand(tmp_path / "bare")
    path = write_model_card(run)
    assert path == run / "README.md"
    text = path.read_text()
    told = ("licence", "languages", "source", "tokenizer", "training tokens", "steps", "tokens")
    told += ("seed", "compute", "hardware", "time", "model FLOPs utilization", "optimizer")
    told += ("memory at the peak", "SHA-256 of the parameters", "last step's batch")
    for name in (*told, "validation, at the end", "validation, the best"):
        assert bullet(text, name) == "unknown", name
    assert "This run has not been finished" in text
    assert "loss.png" not in text
    assert "A sample" not in text
    values = front_matter(path)
    assert not {"license", "language", "datasets", "metrics"} & values.keys()
    ModelCard.load(path)


def test_parts_that_were_frozen_leave_compute_unknown(tmp_path: Path) -> None:
    config = {
        "model": CONFIG.to_dict(),
        "optimizer": None,
        "run": {"trainable": {"kind": "lora", "rank": 8}},
    }
    run = by_hand(tmp_path / "lora", config=config, summary={"tokens": 100, "train_seconds": 3})
    text = write_model_card(run).read_text()
    assert bullet(text, "compute") == "unknown"
    assert '"rank": 8' in bullet(text, "trained parameters")


def test_figures_with_their_caveats(
    trained: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    pairs = [Pair("a", "b", "age", source="CrowS-Pairs")] * 3
    bias = pairs_result(pairs, rng.normal(size=3))
    calibrated = calibration(np.array([[0.7, 0.3], [0.2, 0.8]]), np.array([0, 0]), resamples=5)
    figures = {"accuracy": Estimate(0.25, 0.0625, 48), "perplexity": Estimate(3.5, math.nan, 1)}
    suites = [
        SuiteResult("hellaswag", figures, [], {"calibration": {"accuracy": calibrated.to_dict()}}),
        SuiteResult(
            "crows-pairs", {"share": Estimate(bias.overall.share, 0.1, 3)}, [], bias.to_dict()
        ),
    ]
    write_results(suites, tmp_path, model="/a/secret/model", data={"hellaswag": "h | s.txt"})
    memorized = Memorization(5, 6, (6, 0, 1))
    overlap = overlap_report([[1, 2]], np.array([1, 2, 3], np.uint16), ByteTokenizer())
    shared = contamination(["a b c d"], ["b c d", "x y z"], n=3)
    trust = tmp_path / "trust.json"
    trust.write_text(
        json.dumps(
            {
                "memorization, training text": memorized.to_dict(),
                "overlap of generations": overlap.to_dict(),
                "contamination": shared.to_dict(),
            }
        )
    )
    path = write_model_card(trained, tmp_path / "out", [tmp_path / "results.json", trust])
    assert path == tmp_path / "out" / "README.md"
    card = ModelCard.load(path)
    text = card.text
    assert "| hellaswag | accuracy | 0.25 | 0.062 | 48 |" in text
    assert "| hellaswag | perplexity | 3.5 |  | 1 |" in text
    ece, stderr, _ = calibrated.ece
    assert f"| hellaswag | calibration, accuracy, ece | {ece:.6g} | {stderr:.2g} |  |" in text
    share = bias.overall.share
    assert f"| crows-pairs | categories, age, share | {share:.6g} |  |  |" in text
    low, high = bias.overall.low, bias.overall.high
    assert f"| crows-pairs | overall, interval | {low:.4g} to {high:.4g} |  |  |" in text
    assert "| memorization, training text | share | 0.333333 |  |  |" in text
    assert "| overlap of generations | longest overlap tokens, longest | 2 |  |  |" in text
    assert "| contamination | dirty share | 0.5 |  |  |" in text
    assert "| data | hellaswag | h \\| s.txt |  |  |" in text
    assert "secret" not in text
    for result in (bias, calibrated, memorized, overlap, shared):
        for caveat in result.to_dict()["caveats"]:
            assert text.count(f"- {caveat}") == 1, caveat
    assert MEMORIZATION_CAVEATS[0] in text
    assert "Not measured" not in text
    index = card.data.to_dict()["model-index"]
    assert index == front_matter(path)["model-index"]
    measured = {
        (result["dataset"]["name"], metric["type"]): metric["value"]
        for result in index[0]["results"]
        for metric in result["metrics"]
    }
    assert measured["hellaswag", "accuracy"] == 0.25
    assert measured["hellaswag", "perplexity"] == 3.5
    assert measured["crows-pairs", "share"] == pytest.approx(share)
    assert index[0]["name"] == "small"


def test_command_and_what_is_refused(trained: Path, tmp_path: Path, command: Command) -> None:
    target = tmp_path / "CARD.md"
    flags = ("--destination", target, "--license", "mit", "--languages", "en")
    status, printed, error = command("gptjax", "card", trained, *flags)
    assert (status, error) == (0, "")
    assert printed == f"the card is written to {target}\n"
    assert front_matter(target)["license"] == "mit"
    status, _, error = command("gptjax", "card", trained, *flags)
    assert status == 2
    assert "is there already" in error
    assert command("gptjax", "card", trained, *flags, "--overwrite")[0] == 0
    with pytest.raises(UserError, match="no file"):
        write_model_card(tmp_path / "none")
    with pytest.raises(UserError, match="no file"):
        write_model_card(trained, tmp_path / "x.md", [tmp_path / "none.json"])
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        write_model_card(trained, tmp_path / "x.md", [tmp_path / "bad.json"])
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="no run of gptjax"):
        write_model_card(tmp_path)
    assert not (tmp_path / "x.md").exists()


def test_text_that_looks_like_markdown(tmp_path: Path) -> None:
    run = by_hand(tmp_path / "odd", summary={"val_loss": 1.0})
    sample = "a ``` b\n---\n# no heading"
    (run / "samples.txt").write_text(
        f"=== step 1 ===\nsampled before\n\n=== step 2 ===\n{sample}\n\n"
    )
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    plot_losses({"odd": run}, run / "loss.png")
    path = write_model_card(run)
    text = ModelCard.load(path).text
    assert f"````text\n{sample}\n````" in text
    assert "sampled before" not in text
    assert bullet(text, "last step's batch") == "2.5000"
