"""Any gptjax model in EleutherAI's lm-evaluation-harness.

In Python `lm_eval.simple_evaluate(model=HarnessModel(model), tasks=[...])`; on the command line all
of `lm_eval`'s own, with a model named gptjax:

    python -m gptjax.evaluation.harness run --model gptjax --model_args pretrained=smollm2 \
        --tasks hellaswag --limit 100

lm_eval looks for models in its own list only, so that `lm_eval --model gptjax` does not find it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from gptjax.batching import Request, complete
from gptjax.chat import render_chat
from gptjax.errors import UserError
from gptjax.evaluation.loglikelihood import each_group, loglikelihoods
from gptjax.model import Model
from gptjax.reporting import Progress
from gptjax.sampling import Sampling
from gptjax.text_generation import tokenizer_of
from gptjax.tokenizer import BPETokenizer, encode_prompt

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(
        f"lm-evaluation-harness cannot be imported ({error}); pip install 'gptjax[harness]'"
    ) from error


@register_model("gptjax")
class HarnessModel(TemplateLM):
    """A model as lm-evaluation-harness asks for it.

    Texts become tokens as its own adapter for transformers (`HFLM`) has it: a context and what
    follows are encoded together, special tokens that a text spells are special, and what the
    tokenizer puts before every text is put there once.

    Args:
        model: with a tokenizer; None loads `pretrained`.
        pretrained: as for `gptjax.load`.
        batch_size: the most rows that are read, or prompts that are continued, at a time; "auto" is
            8.
        max_length: tokens of context to use; None is all that the model has.
        max_gen_toks: the most tokens to generate where a task does not say.
        progress: whether bars are shown.
        seed: of what tasks sample.
        max_batch_size: not used, nor is `device`: lm_eval gives them to all models, and JAX has its
            own way to choose devices (`JAX_PLATFORMS`).
        device: see `max_batch_size`.
    """

    def __init__(
        self,
        model: Model | None = None,
        pretrained: str = "",
        *,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        progress: bool = True,
        seed: int = 0,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        if (model is None) == (not pretrained):
            raise UserError("give a model or pretrained=PATH, one of them")
        if model is None:
            from gptjax.pretrained.loading import load

            model = load(pretrained)
        most = model.config.context_length
        self.max_length = most if max_length is None else int(max_length)
        if not 1 <= self.max_length <= most:
            raise UserError(f"max_length is {max_length}; from 1 to the model's {most}")
        # What is longer is cut by it.
        self.model = dataclasses.replace(
            model, config=model.config.replace(context_length=self.max_length)
        )
        self.tokenizer = tokenizer_of(model)
        self.batch_size = 8 if str(batch_size).startswith("auto") else int(batch_size)
        self.max_gen_toks = max_gen_toks
        self._progress, self._seed = progress, seed
        self._starts = encode_prompt(self.tokenizer, "")
        self._parse = self.tokenizer.encode
        if isinstance(self.tokenizer, BPETokenizer):
            import tokenizers

            # The tokenizer's own reads special tokens as the text they are.
            library = tokenizers.Tokenizer.from_str(self.tokenizer.to_dict()["json"])
            self._parse = lambda text: library.encode(text, add_special_tokens=False).ids

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            UserError: if there is none.
        """
        if self.tokenizer.eos_id is None:
            raise UserError("the tokenizer has no token that ends a text, which lm_eval needs")
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that nothing comes before."""
        bos = self.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """What tells tokenizers apart in lm_eval's caches."""
        about = json.dumps(self.tokenizer.to_dict(), sort_keys=True)
        return f"gptjax-{hashlib.sha256(about.encode()).hexdigest()[:16]}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The tokens of a text, by default after what the tokenizer puts before every text."""
        ids, starts = self._parse(string), self._starts
        if add_special_tokens is False or ids[: len(starts)] == starts:
            return ids
        return starts + ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as one text; without a generation prompt its last message goes on.

        Raises:
            UserError: if the tokenizer has no chat template.
        """
        template = getattr(self.tokenizer, "chat_template", None)
        if template is None:
            raise UserError("this model has no chat template; leave --apply_chat_template out")
        text = render_chat(
            template,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            bos_token=getattr(self.tokenizer, "bos_token", None),
            eos_token=getattr(self.tokenizer, "eos_token", None),
        )
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = loglikelihoods(
            self.model,
            [(context, continuation) for _, context, continuation in requests],
            batch_size=self.batch_size,
            progress=self._progress,
        )
        results = [(result.logprob, result.is_greedy) for result in found]
        for (texts, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of the model's context."""
        texts = [request.args[0] for request in requests]
        groups = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
                )
            ]
            for text in texts
        ]
        sums = [0.0] * len(texts)
        found = each_group(self.model, groups, batch_size=self.batch_size)
        with Progress(len(texts), self._progress, "scoring", "text") as shown:
            for done, (index, parts) in enumerate(found, 1):
                sums[index] = sum(part.logprob for part in parts)
                self.cache_hook.add_partial("loglikelihood_rolling", (texts[index],), sums[index])
                shown.update(done, "")
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, each up to the first of its stop strings."""
        import jax

        by_options: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            options = json.dumps(request.args[1], sort_keys=True)
            by_options.setdefault(options, []).append(index)
        texts = [""] * len(requests)
        key = jax.random.key(self._seed)
        with Progress(len(requests), self._progress, "generating", "text") as shown:
            done = 0
            for options, indices in by_options.items():
                sampling = self._sampling(json.loads(options))
                asked = self._requests(requests, indices, sampling)
                for request, made in complete(
                    self.model, asked, sampling, key, slots=self.batch_size
                ):
                    texts[request.index] = made.text
                    self.cache_hook.add_partial(
                        "generate_until", requests[request.index].args, made.text
                    )
                    done += 1
                    shown.update(done, "")
        return texts

    def _requests(
        self, requests: list[Any], indices: Sequence[int], sampling: Sampling
    ) -> Iterator[Request]:
        limit = sampling.max_new_tokens
        room = self.max_length - limit
        if room < 1:
            raise UserError(
                f"max_gen_toks is {limit}, which leaves nothing of the context of "
                f"{self.max_length} for the prompt; lower it"
            )
        for index in indices:
            context = requests[index].args[0]
            # As HFLM does, the end of a context that is too long is kept.
            tokens = self.tok_encode(context)[-room:] or [self.prefix_token_id]
            yield Request(index, 0, tokens, limit, continues=bool(context))

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        """What a task's `gen_kwargs` say."""
        asked: dict[str, Any] = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        do_sample = asked.pop("do_sample", False)
        temperature = float(asked.pop("temperature", 0.0)) or 1.0
        sampling = Sampling(
            max_new_tokens=asked.pop("max_gen_toks"),
            temperature=temperature if do_sample else 0.0,
            top_k=asked.pop("top_k", None),
            top_p=asked.pop("top_p", None),
            min_p=asked.pop("min_p", None),
            repetition_penalty=asked.pop("repetition_penalty", 1.0),
            stop=tuple(stop for stop in asked.pop("until", []) if stop),
        )
        if asked:
            raise UserError(
                f"gen_kwargs has {', '.join(asked)}, which gptjax does not know; known are until, "
                "max_gen_toks, do_sample, temperature, top_k, top_p, min_p, repetition_penalty"
            )
        return sampling


def main() -> None:
    """lm_eval's command line, with a model named gptjax."""
    from lm_eval.__main__ import cli_evaluate

    from gptjax.command_line import configure_jax

    configure_jax()
    cli_evaluate()


if __name__ == "__main__":
    main()
