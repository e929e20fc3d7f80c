"""lm-evaluation-harness on gptjax, against its own adapter for transformers on the same weights."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import GPT2, random_params
from small_tokenizers import TEXTS, chat_like, llama_like

from gptjax.errors import UserError
from gptjax.model import Model
from gptjax.pretrained.huggingface import save_pretrained
from gptjax.tokenizer import BPETokenizer

pytest.importorskip("torch", reason="PyTorch is missing")
pytest.importorskip("transformers", reason="transformers is missing")
pytest.importorskip("lm_eval", reason="lm_eval is missing (pip install 'gptjax[harness]')")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from gptjax.evaluation.harness import HarnessModel

CONTEXT = 32
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GPT-2 with a tokenizer of GPT-2's kind, in Hugging Face's layout."""
    rng = np.random.default_rng(4)
    tokenizer = BPETokenizer.train(TEXTS * 3, 320)
    config = GPT2.replace(vocab_size=tokenizer.vocab_size, context_length=CONTEXT)
    folder = tmp_path_factory.mktemp("model")
    save_pretrained(Model(config, random_params(config, rng), tokenizer), folder)
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> HFLM:
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)


@pytest.fixture(scope="module")
def ours(folder: Path) -> HarnessModel:
    return HarnessModel(pretrained=str(folder), batch_size=4, progress=False)


def instances(kind: str, *arguments: Any) -> list[Any]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]  # type: ignore[arg-type]


def test_loglikelihoods(ours: HarnessModel, theirs: HFLM) -> None:
    asked = instances(
        "loglikelihood",
        ("the cat", " sat on the mat."),
        ("", "the hat"),
        ("the cat ", "sat"),
        ("user<|endoftext|>", " it's 12"),
        # Longer than the context: the end counts.
        ("the bat, the zebra! " * 6, "système 日本"),
        ("a", "b"),
    )
    for own, (logprob, is_greedy) in zip(
        ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True), strict=True
    ):
        assert own[0] == pytest.approx(logprob, rel=2e-5, abs=2e-4)
        assert own[1] == is_greedy


def test_rolling_loglikelihoods(ours: HarnessModel, theirs: HFLM) -> None:
    asked = instances("loglikelihood_rolling", ("the cat",), (TEXTS[1],), (TEXTS[1] * 12,))
    own = ours.loglikelihood_rolling(asked)
    assert own == pytest.approx(theirs.loglikelihood_rolling(asked, disable_tqdm=True), rel=2e-5)
    assert ours.loglikelihood_rolling(instances("loglikelihood_rolling", ("",))) == [0.0]


def test_generated_texts(ours: HarnessModel, theirs: HFLM) -> None:
    greedy = {"until": ["\n\n"], "max_gen_toks": 12}
    prompts = ["the cat", "user said: don't", "a", "the bat, the zebra! " * 6]
    [first] = theirs.generate_until(instances("generate_until", (prompts[0], greedy)))
    # A stop that comes up.
    stops = {"until": [first[3:5], "nowhere"], "max_gen_toks": 12, "do_sample": False}
    asked = instances(
        "generate_until", *((prompt, greedy) for prompt in prompts), (prompts[0], stops)
    )
    own = ours.generate_until(asked)
    assert own == theirs.generate_until(asked, disable_tqdm=True)
    assert own[4] == first[: first.index(first[3:5])]


def test_sampling_is_what_a_task_asks_for(ours: HarnessModel) -> None:
    def sampling(**options: Any) -> Any:
        return ours._sampling(options)

    assert sampling().temperature == 0
    assert sampling().max_new_tokens == 256
    assert sampling(do_sample=False, temperature=0.7).temperature == 0
    assert sampling(do_sample=True, temperature=0.7).temperature == 0.7
    assert sampling(do_sample=True).temperature == 1
    assert sampling(temperature=0.5).temperature == 0.5
    drawn = sampling(until="x", max_new_tokens=3, do_sample=True, top_k=5, top_p=0.9)
    assert (drawn.stop, drawn.max_new_tokens, drawn.top_k, drawn.top_p) == (("x",), 3, 5, 0.9)
    with pytest.raises(UserError, match="num_beams, which gptjax does not know"):
        sampling(num_beams=4)
    with pytest.raises(UserError, match="max_gen_toks is 32, which leaves nothing"):
        ours.generate_until(instances("generate_until", ("a", {"max_gen_toks": 32})))
    draws = {
        text
        for seed in range(6)
        for text in HarnessModel(ours.model, seed=seed, progress=False).generate_until(
            instances("generate_until", ("a", {"do_sample": True, "max_gen_toks": 4}))
        )
    }
    assert len(draws) > 1


def task(folder: Path, name: str, lines: list[dict[str, Any]], **config: Any) -> dict[str, Any]:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        **config,
    }


def test_tasks_give_the_same_results(
    ours: HarnessModel, theirs: HFLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    questions = [
        {"q": f"the {word} sat on", "choices": ["the mat.", "a hat", "12 cats"], "label": n % 3}
        for n, word in enumerate(["cat", "bat", "hat", "zebra", "mat"])
    ]
    metrics = [{"metric": "acc"}, {"metric": "acc_norm"}]
    tasks = [
        task(
            tmp_path,
            "choosing",
            questions,
            output_type="multiple_choice",
            doc_to_text="{{q}}",
            doc_to_choice="choices",
            doc_to_target="label",
            metric_list=metrics,
        ),
        task(
            tmp_path,
            "reading",
            [{"text": TEXTS[0]}, {"text": TEXTS[1]}],
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{text}}",
            metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        ),
        task(
            tmp_path,
            "writing",
            [{"prompt": "the cat", "answer": "no"}, {"prompt": "user said:", "answer": "no"}],
            output_type="generate_until",
            doc_to_text="{{prompt}}",
            doc_to_target="{{answer}}",
            generation_kwargs={"until": ["\n"], "max_gen_toks": 8},
            metric_list=[{"metric": "exact_match"}],
        ),
    ]
    found = []
    for model in (ours, theirs):
        results = simple_evaluate(model=model, tasks=tasks, bootstrap_iters=0)
        assert results is not None
        found.append(results)
    for name in ("choosing", "reading", "writing"):
        own, other = (results["results"][name] for results in found)
        numbers = {key: value for key, value in other.items() if isinstance(value, float)}
        assert len(numbers) >= 1
        for key, value in numbers.items():
            assert own[key] == pytest.approx(value, rel=1e-4)
        for one, two in zip(*(results["samples"][name] for results in found), strict=True):
            assert one["doc_id"] == two["doc_id"]
            if name == "writing":
                assert one["resps"] == two["resps"]


def test_a_tokenizer_that_begins_texts(rng: np.random.Generator) -> None:
    """Llama's token before every text is there, and once."""
    tokenizer = llama_like()
    config = GPT2.replace(vocab_size=tokenizer.vocab_size, context_length=CONTEXT)
    model = HarnessModel(Model(config, random_params(config, rng), tokenizer), progress=False)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert (model.prefix_token_id, model.eot_token_id) == (bos, eos)
    plain = tokenizer.encode("the cat")
    assert model.tok_encode("the cat") == [bos, *plain]
    assert model.tok_encode("the cat", add_special_tokens=False) == plain
    assert model.tok_encode("<s>the cat").count(bos) == 1


def test_conversations(rng: np.random.Generator) -> None:
    tokenizer = chat_like()
    tokenizer.chat_template = TEMPLATE
    config = GPT2.replace(vocab_size=tokenizer.vocab_size, context_length=CONTEXT)
    model = HarnessModel(Model(config, random_params(config, rng), tokenizer), progress=False)
    messages = [{"role": "user", "content": "the cat"}]
    text = model.apply_chat_template(messages)
    assert text == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    # The template's tokens are tokens.
    assert model.tok_encode(text) == tokenizer.encode_chat(messages)
    messages.append({"role": "assistant", "content": "sat on"})
    text = model.apply_chat_template(messages, add_generation_prompt=False)
    assert text.endswith("<|im_start|>assistant\nsat on")
    assert model.chat_template(True) == TEMPLATE
    other = HarnessModel(Model(config, model.model.params, BPETokenizer.train(TEXTS, 300)))
    assert other.tokenizer_name != model.tokenizer_name
    with pytest.raises(UserError, match="no chat template"):
        other.apply_chat_template(messages)


def test_illegal_arguments_are_refused(ours: HarnessModel, folder: Path) -> None:
    with pytest.raises(UserError, match="give a model or pretrained=PATH, one of them"):
        HarnessModel()
    with pytest.raises(UserError, match="one of them"):
        HarnessModel(ours.model, pretrained=str(folder))
    with pytest.raises(UserError, match="max_length is 33; from 1 to the model's 32"):
        HarnessModel(ours.model, max_length=33)
    with pytest.raises(UserError, match="no tokenizer"):
        HarnessModel(dataclasses.replace(ours.model, tokenizer=None))


def test_a_shorter_context_is_kept_to(ours: HarnessModel, folder: Path) -> None:
    """Also of learned positions; the same as what is cut by hand."""
    short = HarnessModel.create_from_arg_string(
        f"pretrained={folder},max_length=8", {"batch_size": "auto", "device": None}
    )
    assert short.batch_size == 8
    ids = ours.tok_encode(TEXTS[1] * 2)[:20]
    [cut] = short._loglikelihood_tokens([(("", ""), ids[:16], ids[16:])])
    [by_hand] = ours._loglikelihood_tokens([(("", ""), ids[11:16], ids[16:])])
    assert cut[0] == pytest.approx(by_hand[0], abs=1e-4)
    assert by_hand[0] != pytest.approx(
        ours._loglikelihood_tokens([(("", ""), ids[:16], ids[16:])])[0][0], abs=1e-3
    )


@pytest.mark.slow
def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    config = task(
        tmp_path,
        "choosing",
        [{"q": "the cat sat on", "choices": ["the mat.", "a hat"], "label": 0}] * 3,
        output_type="multiple_choice",
        doc_to_text="{{q}}",
        doc_to_choice="choices",
        doc_to_target="label",
    )
    # JSON is YAML.
    (tmp_path / "choosing.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "gptjax.evaluation.harness", "run", "--model", "gptjax"]
    command += ["--model_args", f"pretrained={folder}", "--tasks", "choosing"]
    command += ["--include_path", str(tmp_path)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "|choosing" in ended.stdout.replace(" ", "")
