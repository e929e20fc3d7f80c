"""Scores against a plain float64 softmax, windows, batches, and what is shown of them."""

import dataclasses
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from small_models import GPT2, MODERN, STYLES, random_params
from small_tokenizers import chat_like, fuzzed, llama_like, random_unicode

from gptjax import scoring, token_scores
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.model import Model, forward
from gptjax.params import init_params
from gptjax.pretrained.loading import load
from gptjax.scoring import Score, colored, print_score, score, to_html
from gptjax.text_generation import prompt_ids
from gptjax.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer

run = jax.jit(forward, static_argnames="config")
ALPHABET = "abcdefghijklmnopqrstuvwxyz .,!\n"
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def model_of(config: ModelConfig, tokenizer: Tokenizer, rng: np.random.Generator) -> Model:
    # One vocabulary for most tokenizers, as large as the largest needs: one program for all.
    config = config.replace(vocab_size=31 if isinstance(tokenizer, CharTokenizer) else 512)
    return Model(config, random_params(config, rng), tokenizer)


def text_of(rng: np.random.Generator, length: int) -> str:
    return "".join(rng.choice(list(ALPHABET), length))


def window_start(token: int, context: int) -> int:
    """Where the window begins that scores a token: the first that reaches the token before it."""
    return next(start for start in range(0, token, context // 2) if start + context >= token)


def expected_logits(model: Model, ids: list[int]) -> np.ndarray:
    """Float64 logits `[N - 1, V]` of all tokens but the first, each from a pass of its own."""
    C = model.config.context_length
    rows = []
    for token in range(1, len(ids)):
        seen = ids[window_start(token, C) : token]
        padded = np.full((1, C), 7, np.int32)
        padded[0, : len(seen)] = seen
        rows.append(np.asarray(run(model.params, padded, model.config))[0, len(seen) - 1])
    return np.array(rows, np.float64)


def assert_scored(result: Score, logits: np.ndarray, targets: list[int]) -> None:
    assert result.tokens.tolist()[-len(targets) :] == targets
    shifted = logits - logits.max(-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    own = logits[np.arange(len(targets)), targets][:, None]
    N = len(targets)
    np.testing.assert_allclose(result.logprobs[-N:], logprobs[np.arange(N), targets], **CLOSE)
    np.testing.assert_allclose(
        result.entropies[-N:], -(np.exp(logprobs) * logprobs).sum(-1), **CLOSE
    )
    # Logits that are equal but for rounding may change places.
    assert (result.ranks[-N:] >= (logits > own + 1e-4).sum(-1)).all()
    assert (result.ranks[-N:] < (logits > own - 1e-4).sum(-1)).all()


def assert_same(one: Score, other: Score) -> None:
    assert one.pieces == other.pieces
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_allclose(one.logprobs, other.logprobs, **CLOSE)
    np.testing.assert_allclose(one.entropies, other.entropies, **CLOSE)
    assert np.abs(one.ranks - other.ranks).max(initial=0) <= 1


@STYLES
def test_a_text_after_what_begins_it(config: ModelConfig, rng: np.random.Generator) -> None:
    for tokenizer in (llama_like(), chat_like(), ByteTokenizer()):
        model = model_of(config.replace(context_length=64), tokenizer, rng)
        text = "the cat, 日本 🙂\n"
        ids = tokenizer.encode(text)
        lead = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        [result] = score(model, text)
        assert_scored(result, expected_logits(model, [lead, *ids]), ids)
        assert len(result.logprobs) == len(result.ranks) == len(result.entropies) == len(ids)
        assert "".join(result.pieces) == text


@STYLES
def test_a_first_token_after_nothing_has_no_prediction(
    config: ModelConfig, rng: np.random.Generator
) -> None:
    model = model_of(config, CharTokenizer(ALPHABET), rng)
    text = text_of(rng, 11)
    [result] = score(model, text)
    ids = model.tokenizer.encode(text)
    assert_scored(result, expected_logits(model, ids), ids[1:])
    assert len(result.tokens) == 11
    assert np.isnan([result.logprobs[0], result.entropies[0], result.bits[0]]).all()
    assert result.ranks[0] == -1
    # They count the tokens that are predicted, and those alone.
    mean = result.logprobs[1:].astype(np.float64).mean()
    assert result.perplexity == pytest.approx(math.exp(-mean))
    assert result.bits_per_byte == pytest.approx(-mean / math.log(2))
    [single] = score(model, "a")
    assert single.ranks.tolist() == [-1]
    assert math.isnan(single.perplexity)
    assert math.isnan(single.bits_per_byte)


def test_perplexity_and_bits_per_byte() -> None:
    logprobs = np.log(np.array([0.5, 0.125, 0.25], np.float32))
    result = Score(np.arange(3), ("a", "", "é "), logprobs, logprobs, np.zeros(3, np.int32))
    assert result.text == "aé "
    np.testing.assert_allclose(result.bits, [1, 3, 2], rtol=1e-6)
    assert result.perplexity == pytest.approx(4)
    assert result.bits_per_byte == pytest.approx(6 / 4)


def test_ties_do_not_count_as_likelier(rng: np.random.Generator) -> None:
    model = model_of(GPT2, CharTokenizer(ALPHABET), rng)
    level = jax.tree.map(jnp.zeros_like, model.params)
    [result] = score(dataclasses.replace(model, params=level), text_of(rng, 9))
    assert result.ranks.tolist() == [-1] + [0] * 8
    np.testing.assert_allclose(result.logprobs[1:], -math.log(31), rtol=1e-6)
    np.testing.assert_allclose(result.entropies[1:], math.log(31), rtol=1e-6)
    assert result.perplexity == pytest.approx(31)


@STYLES
def test_long_texts_in_windows(config: ModelConfig, rng: np.random.Generator) -> None:
    """Each token once, by the first window that has it; the edges of windows too."""
    tokenizers: list[tuple[Tokenizer, int]] = [(CharTokenizer(ALPHABET), 16), (ByteTokenizer(), 8)]
    for tokenizer, context in tokenizers:
        model = model_of(config.replace(context_length=context), tokenizer, rng)
        half = context // 2
        lengths = [context - 1, context, context + 1, context + half, context + half + 1]
        texts = [text_of(rng, length) for length in [*lengths, int(rng.integers(40, 60))]]
        for text, result in zip(texts, score(model, texts, batch_size=3), strict=True):
            lead = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
            ids = lead + tokenizer.encode(text)
            assert_scored(result, expected_logits(model, ids), ids[1:])
            assert (result.ranks[1 - len(lead) :] >= 0).all()


def test_windows_score_every_token_once(rng: np.random.Generator) -> None:
    for context in (1, 2, 3, 8, int(rng.integers(4, 40))):
        for stride in {1, max(context // 2, 1), int(rng.integers(1, context + 1)), context}:
            for length in range(0, 5 * context + 3):
                windows = list(token_scores.windows(0, length, context, stride))
                scored = [t for w in windows for t in range(w.first, w.end + 1)]
                assert scored == list(range(1, length))
                for number, window in enumerate(windows):
                    assert window.start == number * stride
                    assert 0 < window.end - window.start <= context
                    # As much context as the stride leaves, or all there is.
                    seen = window.first - window.start
                    assert window.start == 0 or seen >= max(context - stride, 1)


@STYLES
def test_a_batch_is_its_texts_one_by_one(config: ModelConfig, rng: np.random.Generator) -> None:
    model = model_of(config.replace(context_length=64), ByteTokenizer(), rng)
    texts = [text_of(rng, int(length)) for length in rng.integers(0, 90, 11)]
    alone = [score(model, text)[0] for text in texts]
    for batch_size in (3, 8):
        together = score(model, texts, batch_size=batch_size)
        for one, other in zip(alone, together, strict=True):
            assert_same(one, other)


def test_what_fills_a_row_is_not_seen(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(MODERN.replace(context_length=64), ByteTokenizer(), rng)
    texts = [text_of(rng, int(length)) for length in rng.integers(1, 100, 4)]
    padded = score(model, texts)
    monkeypatch.setattr(token_scores, "bucket", lambda size, limit, **_: limit)
    longest = score(model, texts)
    monkeypatch.setattr(token_scores, "bucket", lambda size, limit, **_: size)
    exact = [score(model, text, batch_size=1)[0] for text in texts]
    for one, two, three in zip(padded, longest, exact, strict=True):
        assert_same(one, two)
        assert_same(one, three)


@pytest.mark.parametrize("tokens", [1, 5])
def test_blocks_of_logits_give_the_same(
    tokens: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MODERN.replace(logit_softcap=5.0)
    model = model_of(config, CharTokenizer(ALPHABET), rng)
    texts = [text_of(rng, int(length)) for length in rng.integers(2, 30, 3)]
    whole = score(model, texts)
    blocks = []
    read = token_scores._scored
    watched = lambda *args: (blocks.append(args[-1]), read(*args))[1]
    monkeypatch.setattr(token_scores, "_scored", watched)
    monkeypatch.setattr(token_scores, "LOGITS_AT_ONCE", 31 * tokens)
    for one, other in zip(whole, score(model, texts), strict=True):
        assert_same(one, other)
    assert set(blocks) == {tokens}


def test_not_all_logits_are_held() -> None:
    config = GPT2.replace(vocab_size=50_000, context_length=64, embed_dim=8)
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    rows, flat = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((8, 64), (512,)))
    count = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = token_scores._scored.lower(params, rows, flat, flat, count, config, 16).compile()
    analysis = compiled.memory_analysis()
    if analysis is None:
        pytest.skip("this backend does not tell how much memory a program takes")
    assert analysis.temp_size_in_bytes < 8 * 64 * config.vocab_size * 4 / 4


def test_few_compilations(rng: np.random.Generator) -> None:
    config = GPT2.replace(context_length=64, num_layers=1)
    model = model_of(config, ByteTokenizer(), rng)
    texts = [text_of(rng, int(length)) for length in rng.integers(0, 200, 30)]
    before = token_scores._scored._cache_size()
    for text in texts:
        score(model, text, batch_size=1)
    # Rows of 16, 32, 48 and 64 tokens.
    assert token_scores._scored._cache_size() - before <= 4
    score(model, texts, batch_size=4)
    score(model, texts[:9], batch_size=4)
    # Of each of them 1, 2 and 4.
    assert token_scores._scored._cache_size() - before <= 12


def test_transformers_agrees(tmp_path: Path, rng: np.random.Generator) -> None:
    torch: Any = pytest.importorskip("torch", reason="PyTorch is missing")
    transformers: Any = pytest.importorskip("transformers", reason="transformers is missing")
    config = transformers.GPT2Config(
        vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    model = dataclasses.replace(load(tmp_path), tokenizer=ByteTokenizer())
    text = random_unicode(rng, 10) + "naïve 🙂"
    ids = [256, *text.encode()]
    with torch.no_grad():
        logits = theirs(torch.tensor([ids[:-1]])).logits[0].double().numpy()
    [result] = score(model, text)
    assert_scored(result, logits, ids[1:])


def test_empty_texts(rng: np.random.Generator) -> None:
    for tokenizer in (ByteTokenizer(), CharTokenizer(ALPHABET), chat_like()):
        model = model_of(GPT2, tokenizer, rng)
        assert score(model, []) == []
        empty, one, last = score(model, ["", "a", ""])
        assert len(one.tokens) == 1
        for result in (empty, last):
            assert result.pieces == ()
            assert result.text == ""
            parts = (result.tokens, result.logprobs, result.entropies, result.ranks, result.bits)
            assert [part.shape for part in parts] == [(0,)] * 5
            assert math.isnan(result.perplexity)
            assert math.isnan(result.bits_per_byte)
            assert colored(result).plain == ""
            assert "0 tokens" in to_html(result)


def test_pieces_join_to_the_text(rng: np.random.Generator) -> None:
    byte_level = BPETokenizer.train(["to be or not to be 🙂"], 262)
    for tokenizer in (byte_level, chat_like(), llama_like(), llama_like(metaspace=True)):
        model = model_of(GPT2.replace(context_length=64), tokenizer, rng)
        texts = ["👩‍👩‍👧 日本語, 한국 e\u0301!", fuzzed(rng), random_unicode(rng), "日"]
        for text, result in zip(texts, score(model, texts), strict=True):
            assert len(result.pieces) == len(result.tokens)
            # A tokenizer as Llama 2's has one token for all that it does not know.
            assert result.text == tokenizer.decode(result.tokens)
            # Llama 2's decoder drops a space that begins a text, also one of the text's own.
            drops = tokenizer.decode(tokenizer.encode(" a")) != " a"
            if not (drops and text.startswith(" ")):
                assert result.text == text or "<unk>" in result.text
    [result] = score(model_of(GPT2, ByteTokenizer(), rng), "aé🙂")
    assert result.pieces == ("a", "", "é", "", "", "", "🙂")


def test_what_cannot_be_scored_is_refused(rng: np.random.Generator) -> None:
    model = model_of(GPT2, ByteTokenizer(), rng)
    with pytest.raises(UserError, match="no tokenizer"):
        score(dataclasses.replace(model, tokenizer=None), "a")
    with pytest.raises(UserError, match="batch_size is 0; at least 1"):
        score(model, "a", batch_size=0)
    with pytest.raises(UserError, match=r"text 1 .* U\+D800, at position 2"):
        score(model, ["a", "ab\ud800"])
    small = model_of(GPT2, CharTokenizer(ALPHABET), rng)
    wider = dataclasses.replace(small, tokenizer=CharTokenizer(ALPHABET + "é"))
    assert len(score(wider, ALPHABET)[0].tokens) == 31
    with pytest.raises(UserError, match="text 1 has token id 31, but ids run from 0 to 30"):
        score(wider, ["a", "aé"])
    with pytest.raises(UserError, match="not among the 31"):
        score(small, "é")
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, small.params)
    with pytest.raises(UserError, match="logits for text 0 are not finite"):
        score(dataclasses.replace(small, params=broken), "ab")


def scored_as(pieces: list[str], bits: list[float]) -> Score:
    N = len(pieces)
    logprobs = np.array(bits, np.float32) * np.float32(-math.log(2))
    ranks = np.where(np.isnan(logprobs), -1, np.arange(N)).astype(np.int32)
    return Score(np.arange(N), tuple(pieces), logprobs, np.full(N, math.log(2)), ranks)


def background(result: Score) -> list[tuple[str, str | None]]:
    """The stretches of a colored text, and their backgrounds."""
    shown = colored(result)
    stretches, at = [], 0
    for span in shown.spans:
        if span.start > at:
            stretches.append((shown.plain[at : span.start], None))
        stretches.append((shown.plain[span.start : span.end], span.style.bgcolor.name))
        at = span.end
    return stretches + ([(shown.plain[at:], None)] if at < len(shown.plain) else [])


def test_colors_are_bits() -> None:
    result = scored_as(["a", "b", "c", "d", "e"], [math.nan, 0.9, 1.01, 12, 40])
    pale, strong = background(result)[1][1], background(result)[2][1]
    assert background(result) == [("ab", None), ("c", pale), ("d", strong), ("e", strong)]
    assert pale != strong
    # Not in nats: 0.8 nats are more than one bit, 8.4 are more than 12.
    nats = scored_as(["a", "b"], [0.8 / math.log(2), 8.4 / math.log(2)])
    assert [color is None for _, color in background(nats)] == [False, False]
    assert background(nats)[1][1] == strong


def test_a_character_of_several_tokens_has_their_bits_together() -> None:
    result = scored_as(["x", "", "é", "", "日"], [0.1, 5, 7, 0.3, 0.4])
    assert [text for text, color in background(result) if color] == ["é"]
    assert background(result)[1][1] == background(scored_as(["é"], [12]))[0][1]
    assert colored(scored_as(["x", ""], [0.1, 3])).plain == "x"


def test_text_is_readable_on_every_shade() -> None:
    def luminance(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    shades = [scoring._shade(bits) for bits in np.linspace(1, 14, 50)]
    darkness = [-luminance(shade) for shade in shades if shade is not None]
    assert len(darkness) == 50
    assert darkness == sorted(darkness)
    # What WCAG 2 asks of small text, here black.
    assert min((0.05 - dark) / 0.05 for dark in darkness) >= 4.5


def printed(result: Score, **options: Any) -> str:
    out = io.StringIO()
    print_score(result, Console(file=out, width=20, **options))
    return out.getvalue()


def test_printed(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = "a [b]line[/b] :smile: that is longer than the terminal\n\tit has 2 lines\n"
    model = model_of(GPT2.replace(context_length=64), ByteTokenizer(), rng)
    [result] = score(model, text)
    terminal = {"force_terminal": True, "color_system": "truecolor"}
    shown = printed(result, **terminal)
    plain = re.sub("\x1b\\[[0-9;]*m", "", shown)
    assert "\x1b[" in shown
    assert "a [b]line[/b] :smile: that is longer than the terminal" in plain
    assert "12 or more" in plain
    assert f"{len(text)} tokens, perplexity {result.perplexity:.4g}" in plain
    # Where there are no colours: in a file, and where they are not wanted.
    assert printed(result).startswith(text + "\n\n")
    monkeypatch.setenv("NO_COLOR", "1")
    assert printed(result, **terminal) == printed(result)
    assert "\x1b" not in printed(result, **terminal)


def test_a_text_does_not_command_the_terminal() -> None:
    result = scored_as(["a\x1b[31m", "\r\n", "\x9b", "\t"], [3, 3, 0, 0])
    assert colored(result).plain == "a␛[31m␍ \n\ufffd\t"


class Page(HTMLParser):
    """The tags and attributes of a page, and the text inside its element of class "text"."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.titles: list[str] = []
        self.styles: list[str | None] = []
        self.text = ""
        self.whole = ""
        self._inside = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        values = dict(attrs)
        if values.get("class") == "text":
            self._inside = True
        if tag == "span" and self._inside:
            self.titles.append(values["title"] or "")
            self.styles.append(values.get("style"))

    def handle_endtag(self, tag: str) -> None:
        if tag == "div":
            self._inside = False

    def handle_data(self, data: str) -> None:
        self.whole += data
        if self._inside:
            self.text += data


def test_html_is_one_page_that_says_it_all(rng: np.random.Generator) -> None:
    model = model_of(GPT2.replace(context_length=64), ByteTokenizer(), rng)
    text = "\n<script>alert(1)</script>\t\"'&amp; <b>é</b>\n</div></span>\n"
    [result] = score(model, text)
    source = to_html(result, title="</title><script>x</script>")
    page = Page(source)
    assert page.text == text
    assert "script" not in page.tags
    assert "<script" not in source
    assert page.tags.count("i") == text.count("\n")
    # Nothing that could come from elsewhere.
    known = {"html", "head", "meta", "title", "style", "body", "h1", "p", "div", "span", "i"}
    assert set(page.tags) <= known
    used = {"charset", "name", "content", "class", "style", "title"}
    assert set(page.attributes) <= used
    assert not re.search(r"url\(|@import|https?:|//", source.replace(text, ""))
    assert f"{len(text) + 1} tokens, perplexity {result.perplexity:.4g}" in page.whole
    assert f"{result.bits_per_byte:.3f} bits per byte" in page.whole
    assert "12 or more" in page.whole
    place = text.index("(")
    probability = math.exp(result.logprobs[place])
    told = page.titles[place].splitlines()
    assert told[0] == "'(' (token 40)"
    assert told[1] == f"probability {probability:.3g} ({-math.log2(probability):.2f} bits)"
    assert told[2] == f"rank {result.ranks[place]} (0 is the likeliest)"
    assert told[3] == f"entropy {result.entropies[place] / math.log(2):.2f} bits"
    assert page.titles[text.index("é")].splitlines()[0] == "part of a character (token 195)"
    assert "'é' (token 169)" in page.titles[text.index("é")]


def test_html_escapes_what_one_token_spells() -> None:
    pieces = ["<script>alert(1)</script>", "' onmouseover='x", '" id="y">', "&lt;", "</span></div>"]
    result = scored_as(pieces, [3, 0, 3, 3, 3])
    source = to_html(result)
    page = Page(source)
    assert "<script" not in source
    assert page.text == "".join(pieces)
    assert page.tags[-5:] == ["span"] * 5
    assert not {"onmouseover", "id"} & set(page.attributes)
    for place, told in enumerate(page.titles):
        assert told.startswith(f"{pieces[place]!r} (token {place})\n")


def test_html_colors_are_those_of_the_terminal() -> None:
    result = scored_as(["a", "b", "c"], [math.nan, 0.5, 6])
    page = Page(to_html(result))
    color = background(result)[1][1]
    assert page.styles == [None, None, f"background:{color};color:#000"]
    assert "nothing comes before it" in page.titles[0]


def test_the_text_is_read_after_what_a_prompt_is(rng: np.random.Generator) -> None:
    """Greedy continuations are the likeliest tokens: both begin alike."""
    from gptjax.sampling import Sampling
    from gptjax.text_generation import generate_text

    model = model_of(GPT2.replace(context_length=64), CharTokenizer(ALPHABET), rng)
    prompt = text_of(rng, 5)
    sampling = Sampling(max_new_tokens=20, temperature=0)
    [continuation] = generate_text(model, prompt, sampling)
    [result] = score(model, prompt + continuation)
    assert (result.ranks[len(prompt_ids(model, prompt)) :] == 0).all()
