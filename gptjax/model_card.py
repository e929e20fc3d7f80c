"""A model card: what a run was, what came of it, and what is not known of it.

Mitchell et al. 2019, Model Cards for Model Reporting, in the form that the Hugging Face hub reads.
Every statement is read from the run folder, from results files or from the caller; what none of
them says is said to be unknown.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.params import count_params, flops_per_token
from gptjax.plots import read_metrics
from gptjax.reporting import duration, quantity

UNKNOWN = "unknown"

# What a reader should be told was not measured, and the parts of names that tell that it was.
_MEASURES = {
    "bias": ("bias", "crows", "winogender"),
    "calibration": ("calibration",),
    "memorization of the training text": ("memorization", "overlap"),
    "contamination of the evaluation data": ("contamination",),
}

# Parts of results files that hold figures but name nothing, and those that hold none.
_WRAPPERS = ("suites", "results", "figures")
_NO_FIGURES = ("settings", "dirty_items")


@dataclass(frozen=True)
class Figure:
    """One figure of a results file.

    Attributes:
        part: the suite or check that it belongs to.
        name: of the figure.
        value: a number or a short text.
        stderr: its standard error; None where there is none.
        count: of how many items, of an `Estimate`; None for other numbers.
    """

    part: str
    name: str
    value: float | str
    stderr: float | None = None
    count: int | None = None


def write_model_card(
    run: str | Path,
    destination: str | Path | None = None,
    evaluations: Sequence[str | Path] = (),
    license: str | None = None,
    *,
    name: str | None = None,
    languages: Sequence[str] = (),
    datasets: Sequence[str] = (),
    hardware: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the model card of a run, Markdown with Hugging Face metadata.

    Args:
        run: the run folder; config.json must be there, and summary.json, metrics.jsonl, loss.png
            and samples.txt are read where they are.
        destination: the file, or a folder for README.md; None is the run folder. The loss curve is
            copied beside it.
        evaluations: results files, JSON. Every figure in them is listed, and every entry
            `caveats` is told.
        license: of the weights, as the hub spells it, such as "apache-2.0".
        name: of the model; None is the run folder's.
        languages: of the data, as ISO 639 codes.
        datasets: names on the hub.
        hardware: what it was trained on; None is the devices that the run tells.
        overwrite: whether a card that is there is replaced.

    Returns:
        The path of the card.

    Raises:
        UserError: if the folder is no run, a file is not JSON, or a card is there already.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    run = Path(run).expanduser()
    path = run if destination is None else Path(destination).expanduser()
    path = path if path.suffix == ".md" else path / "README.md"
    config = _read(run / "config.json")
    if "model" not in config:
        raise UserError(f"{run} holds no run of gptjax: config.json has no model; give its folder")
    if path.exists() and not overwrite:
        raise UserError(f"{path} is there already; choose another destination, or overwrite it")
    results = {str(file): _read(Path(file).expanduser()) for file in evaluations}
    figures = {file: list(_figures(found)) for file, found in results.items()}
    title = name or run.resolve().name
    estimates = [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=figure.part or "evaluation",
            dataset_name=figure.part or "evaluation",
            metric_type=figure.name,
            metric_name=figure.name,
            metric_value=figure.value,
        )
        for found in figures.values()
        for figure in found
        # Of a fine-tuning there are the base's own figures and the baseline's beside them.
        if figure.count is not None and figure.part not in ("zero-shot", "few-shot")
        if not figure.part.startswith("always ")
    ]
    base = config.get("run", {}).get("model")
    base = base if isinstance(base, str) and base != "scratch" else None
    metadata = ModelCardData(
        language=list(languages) or None,
        license=license,
        library_name="gptjax",
        pipeline_tag="text-generation",
        tags=["gptjax", "jax", "gpt"],
        datasets=list(datasets) or None,
        model_name=title,
        base_model=None if base is None else _public(base),
        eval_results=estimates or None,
        metrics=sorted({estimate.metric_type for estimate in estimates}) or None,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    curve = run / "loss.png"
    if curve.exists() and curve.resolve() != (path.parent / curve.name).resolve():
        shutil.copyfile(curve, path.parent / curve.name)
    sections = [
        f"# {title}",
        _model(config, license, languages, base),
        _data(config, datasets),
        _training(run, config, hardware),
        _losses(run, config),
        *(_evaluation(file, found, results[file]) for file, found in figures.items()),
        _limits([figure for found in figures.values() for figure in found]),
        _use(run, title),
    ]
    body = "\n\n".join(section for section in sections if section)
    ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n").save(path)
    return path


def _model(
    config: dict[str, Any], license: str | None, languages: Sequence[str], base: str | None
) -> str:
    model = ModelConfig.from_dict(config["model"])
    trainable = config.get("run", {}).get("trainable")
    return "\n".join(
        [
            "A language model of the GPT kind, trained with gptjax.",
            "",
            f"- parameters: {count_params(model):,}",
            f"- layers: {model.num_layers}, width {model.embed_dim}, {model.num_heads} heads of "
            f"{model.head_width}, {model.kv_heads} of them with keys and values",
            f"- context: {model.context_length} tokens; vocabulary: {model.vocab_size}",
            f"- licence: {license or UNKNOWN}",
            f"- languages: {', '.join(languages) or UNKNOWN}",
            *([] if base is None else [f"- trained from: {_code(_public(base))}"]),
            *([f"- trained parameters: {_code(json.dumps(trainable))}"] if trainable else []),
        ]
    )


def _data(config: dict[str, Any], datasets: Sequence[str]) -> str:
    settings = config.get("run", {})
    source = _public(str(settings.get("data", UNKNOWN)))
    told = {
        "source": source if source == UNKNOWN else _code(source),
        "data sets on the hub": ", ".join(datasets) or "none given",
        "tokenizer": settings.get("tokenizer", UNKNOWN),
        "training tokens": _number(settings.get("train_tokens")),
        "held out for validation": settings.get("validation_fraction", UNKNOWN),
        "licence of the data, how it was collected and filtered": "not recorded",
    }
    return "## Data\n\n" + "\n".join(f"- {name}: {value}" for name, value in told.items())


def _training(run: Path, config: dict[str, Any], hardware: str | None) -> str:
    settings = config.get("run", {})
    summary = _read(run / "summary.json") if (run / "summary.json").exists() else {}
    tokens, seconds = summary.get("tokens"), summary.get("train_seconds")
    read = summary.get("tokens_read", tokens)
    flops = None
    if read is not None and "trainable" not in settings:
        flops = read * flops_per_token(ModelConfig.from_dict(config["model"]))
    epochs = None
    if tokens is not None and settings.get("train_tokens"):
        epochs = tokens / settings["train_tokens"]
    rates = [row["mfu"] for row in _metrics(run) if "mfu" in row]
    told = {
        "steps": _number(summary.get("steps")),
        "tokens": _number(tokens) + ("" if epochs is None else f", {epochs:.2g} times the data"),
        **(
            {}
            if read == tokens
            else {"tokens read, with those that are not learned": _number(read)}
        ),
        "batch": _number(settings.get("batch_size")) + " sequences a step",
        "seed": settings.get("seed", UNKNOWN),
        "compute": UNKNOWN
        if flops is None
        else f"{flops:.3g} FLOPs, by 6 for each weight and token and attention over a full context",
        "hardware": hardware or summary.get("devices") or UNKNOWN,
        "time": UNKNOWN
        if seconds is None
        else f"{duration(seconds)} of training, "
        f"{duration(summary.get('compile_seconds', 0))} of compiling",
        "model FLOPs utilization": f"{100 * sum(rates) / len(rates):.0f} %" if rates else UNKNOWN,
        "memory at the peak": UNKNOWN
        if summary.get("peak_bytes") is None
        else f"{quantity(summary['peak_bytes'])}B a device",
        "SHA-256 of the parameters": _code(summary["params_sha256"])
        if "params_sha256" in summary
        else UNKNOWN,
    }
    lines = [f"- {name}: {value}" for name, value in told.items()]
    unfinished = "" if summary else "This run has not been finished, or has left no summary.\n\n"
    optimizer = config.get("optimizer")
    settings = UNKNOWN if optimizer is None else "\n\n" + _fenced(json.dumps(optimizer), "json")
    return f"## Training\n\n{unfinished}" + "\n".join(lines) + f"\n- optimizer: {settings}"


def _losses(run: Path, config: dict[str, Any]) -> str:
    rows = _metrics(run)
    summary = _read(run / "summary.json") if (run / "summary.json").exists() else {}
    trained = [row["loss"] for row in rows if math.isfinite(row.get("loss", math.nan))]
    measured = [row for row in rows if "val_loss" in row]
    loss, best = summary.get("val_loss"), summary.get("best_val_loss")
    perplexity = "" if loss is None else f" (perplexity {math.exp(min(loss, 700)):.4g})"
    unit = "In nats a token of this tokenizer."
    if "objective" in config.get("run", {}):
        perplexity, unit = "", f"Of the objective {_code(config['run']['objective'])}."
    lines = [
        "## Losses",
        "",
        unit,
        "",
        f"- last step's batch: {_loss(trained[-1] if trained else None)}",
        f"- validation, at the end: {_loss(loss)}{perplexity}",
        f"- validation, the best: {_loss(best)}",
    ]
    if len(measured) > 1:
        lines += ["", "| step | validation loss |", "| --- | --- |"]
        lines += [f"| {row['step']} | {_loss(row['val_loss'])} |" for row in measured[-10:]]
    if (run / "loss.png").exists():
        lines += ["", "![Loss over steps](loss.png)"]
    sample = _last_sample(run)
    if sample:
        lines += ["", "A sample, the last of the run, not chosen:", "", _fenced(sample, "text")]
    return "\n".join(lines)


def _evaluation(file: str, figures: list[Figure], results: dict[str, Any]) -> str:
    lines = [
        f"## Evaluation: {Path(file).name}",
        "",
        "| part | figure | value | standard error | items |",
        "| --- | --- | --- | --- | --- |",
    ]
    for figure in figures:
        value = figure.value if isinstance(figure.value, str) else f"{figure.value:.6g}"
        stderr = "" if figure.stderr is None else f"{figure.stderr:.2g}"
        count = "" if figure.count is None else str(figure.count)
        cells = (figure.part, figure.name, value, stderr, count)
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    caveats = list(dict.fromkeys(_caveats(results)))
    if caveats:
        lines += ["", "What goes with these figures:", "", *(f"- {line}" for line in caveats)]
    return "\n".join(lines)


def _limits(figures: list[Figure]) -> str:
    names = [f"{figure.part} {figure.name}".lower() for figure in figures]
    missing = [
        measure
        for measure, parts in _MEASURES.items()
        if not any(part in name for name in names for part in parts)
    ]
    lines = [
        "- The model continues text with what is likely after it. Nothing makes what it says true.",
        "- It may repeat what its data has, prejudice and private matters too.",
        "- Losses and figures are of the data named here, and say nothing of other text.",
        "- Intended use, and uses it is not fit for: not stated.",
    ]
    if missing:
        lines.append(f"- Not measured: {', '.join(missing)}.")
    return "## Limits\n\n" + "\n".join(lines)


def _use(run: Path, title: str) -> str:
    code = (
        "import gptjax\n\n"
        f"model = gptjax.load({run.name!r})  # the run folder\n"
        f'print(gptjax.generate_text(model, "The ", gptjax.Sampling(max_new_tokens=100))[0])'
    )
    return (
        f"## Use\n\n{_fenced(code, 'python')}\n\n`gptjax convert` writes it in Hugging Face's "
        "layout, for transformers."
    )


def _figures(results: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[Figure]:
    """All figures of nested results: estimates with standard errors, and plain numbers."""
    for name, value in results.items():
        inside = path if name in _WRAPPERS else (*path, str(name))
        part, figure = path[0] if path else "", ", ".join(inside[1:]) or str(name)
        if isinstance(value, Mapping):
            if {"value", "stderr"} <= value.keys():
                if value["value"] is not None:
                    yield Figure(part, figure, value["value"], value["stderr"], value.get("count"))
            elif name not in _NO_FIGURES:
                yield from _figures(value, inside)
        elif name == "interval" and isinstance(value, list) and None not in value:
            yield Figure(part, figure, f"{value[0]:.4g} to {value[1]:.4g}")
        elif isinstance(value, int | float) and math.isfinite(value):
            stderr = results.get(f"{name}_stderr")
            if not name.endswith("_stderr"):
                yield Figure(part, figure.replace("_", " "), value, stderr)
        elif isinstance(value, str):
            yield Figure(part, figure.replace("_", " "), _public(value)[:200])


def _caveats(results: Any) -> Iterator[str]:
    if isinstance(results, Mapping):
        for name, value in results.items():
            if name == "caveats" and isinstance(value, list):
                yield from map(str, value)
            else:
                yield from _caveats(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no file {str(path)!r}; give a run folder, and results that exist") from (
            error
        )
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); write it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}; an object is needed")
    return value


def _metrics(run: Path) -> list[dict[str, float]]:
    return read_metrics(run) if (run / "metrics.jsonl").exists() else []


def _last_sample(run: Path) -> str:
    path = run / "samples.txt"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text.rpartition("=== step ")[2].partition("\n")[2].strip("\n")


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def _loss(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4f}"


def _public(text: str) -> str:
    """Of a path its last part alone: the folders of a machine tell others nothing."""
    return Path(text).name if Path(text).is_absolute() else text


def _code(text: str) -> str:
    return f"`{text}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _fenced(text: str, kind: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{kind}\n{text}\n{fence}"
