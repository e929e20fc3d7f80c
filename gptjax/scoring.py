"""How sure a model is of each token of a text: in numbers, on the terminal, and as HTML."""

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gptjax.errors import UserError
from gptjax.model import Model
from gptjax.text_generation import prompt_ids
from gptjax.token_scores import TokenScores, score_windows, windows
from gptjax.tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Surprise in bits: below the first there is no colour, from the second on the strongest.
_FIRST_SHADE, _LAST_SHADE = 1.0, 12.0
# Red, green and blue of the two ends. Black letters have a contrast of 6 or more on all between.
_PALE, _STRONG = (255, 236, 214), (255, 64, 48)
_LEGEND = (0, 2, 4, 6, 8, 10, 12)


@dataclass(frozen=True, eq=False)
class Score:
    """What a model makes of each token of a text. All have one entry a token.

    A notebook shows one as the text, coloured as by `to_html`.

    Attributes:
        tokens: `[N]` int32, the ids of the text, without what the tokenizer puts before it.
        pieces: the text of each token. Joined they are the text, where the tokenizer gives it back
            at all (one that normalizes may not). A character that several tokens make is in the
            last one's piece.
        logprobs: `[N]` float32, the natural logarithm of each token's probability given all before
            it, in nats. NaN for a first token that nothing comes before.
        entropies: `[N]` float32, in nats, of the distribution that the token is taken from. NaN
            where `logprobs` is.
        ranks: `[N]` int32, how many tokens of the vocabulary were strictly likelier: 0 is the
            likeliest. -1 where `logprobs` is NaN.
    """

    tokens: np.ndarray
    pieces: tuple[str, ...]
    logprobs: np.ndarray
    entropies: np.ndarray
    ranks: np.ndarray

    @property
    def text(self) -> str:
        """The pieces joined."""
        return "".join(self.pieces)

    @property
    def bits(self) -> np.ndarray:
        """The surprise of each token, `[N]` float64: -log₂ of its probability."""
        return -self.logprobs.astype(np.float64) / math.log(2)

    @property
    def perplexity(self) -> float:
        """`exp` of the mean surprise in nats, of the tokens that are predicted; NaN without any."""
        predicted = self.logprobs[self.ranks >= 0].astype(np.float64)
        if not len(predicted):
            return math.nan
        with np.errstate(over="ignore"):
            return float(np.exp(-predicted.mean()))

    @property
    def bits_per_byte(self) -> float:
        """Surprise in bits for each byte of UTF-8, which compares models of any tokenizers.

        Of the tokens that are predicted; NaN where they spell nothing.
        """
        predicted = self.ranks >= 0
        pieces = [piece for piece, known in zip(self.pieces, predicted, strict=True) if known]
        size = len("".join(pieces).encode("utf-8"))
        return float(self.bits[predicted].sum()) / size if size else math.nan

    def _repr_html_(self) -> str:
        """The text with its colours, inside a page that has a look of its own."""
        return (
            f'<div class="score"><style>{_TEXT_STYLE}</style>{_html_text(self)}'
            f"<p>{_html_legend()}</p><p>{_summary(self)}</p></div>"
        )


def score(model: Model, texts: str | Sequence[str], *, batch_size: int = 8) -> list[Score]:
    """Probability, entropy and rank of every token of texts.

    A text is read after what it would be continued after: what the tokenizer puts before every
    text, else the token that begins a text or ends one (`prompt_ids`). Where there is neither, the
    first token has no prediction.

    One that is longer than the model's context is read in windows of the context's length, each
    half a context after the one before. A token is scored once, in the first window that has it: by
    all before it in the first, and by at least half a context in the others. What comes before
    every text is in the first window only.

    Texts of any lengths share batches, and a result is that of the text alone, but for rounding.
    How they are read and what is compiled is told at `score_windows`.

    Args:
        model: with a tokenizer.
        texts: one text or several; they may be empty.
        batch_size: the most rows (texts, or windows of one) that are read at once.

    Returns:
        A `Score` for each text, in their order; for one text a list of one.

    Raises:
        UserError: if the model has no tokenizer, `batch_size` is below 1, a text cannot be encoded
            or has ids outside the model's vocabulary, or logits are not finite.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UserError("this model has no tokenizer to score texts with; load one that has")
    config = model.config
    texts = [texts] if isinstance(texts, str) else list(texts)
    lead = prompt_ids(model, "")
    rows = []
    for number, text in enumerate(texts):
        _check_unicode(text, number)
        rows.append(np.array(lead + tokenizer.encode(text), np.int32))
        _check_ids(rows[-1], number, config.vocab_size)

    C = config.context_length
    parts = [
        window
        for number, ids in enumerate(rows)
        for window in windows(number, len(ids), C, max(C // 2, 1))
    ]
    results = [_nothing(len(ids)) for ids in rows]
    for index, read in score_windows(model.params, config, rows, parts, batch_size=batch_size):
        row, _, end, first = parts[index]
        for result, part in zip(results[row], read, strict=True):
            result[first : end + 1] = part

    scores = []
    for number, (ids, values) in enumerate(zip(rows, results, strict=True)):
        logprobs, entropies, ranks = (part[len(lead) :] for part in values)
        if not np.isfinite(logprobs[ranks >= 0]).all():
            raise UserError(
                f"the logits for text {number} are not finite; gptjax verify tells which "
                "parameters are not"
            )
        own = ids[len(lead) :]
        scores.append(Score(own, _pieces(tokenizer, own), logprobs, entropies, ranks))
    return scores


def _nothing(length: int) -> TokenScores:
    """Values of tokens that have none yet."""
    unknown = np.full(length, np.nan, np.float32)
    return TokenScores(unknown, unknown.copy(), np.full(length, -1, np.int32))


def _pieces(tokenizer: Tokenizer, ids: np.ndarray) -> tuple[str, ...]:
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(int(i)) for i in ids]
    if pieces:
        pieces[-1] += decoder.finish()
    return tuple(pieces)


def _check_unicode(text: str, number: int) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"text {number} has half a character, U+{ord(text[error.start]):04X}, at position "
            f"{error.start}; give text that was decoded without errors"
        ) from error


def _check_ids(ids: np.ndarray, number: int, vocab_size: int) -> None:
    largest = int(ids.max(initial=0))
    if largest >= vocab_size:
        raise UserError(
            f"text {number} has token id {largest}, but ids run from 0 to {vocab_size - 1}; is it "
            "this model's tokenizer?"
        )


def colored(score: Score) -> "Text":
    """A text for the terminal, the background of each token by its surprise.

    From none below 1 bit to a strong red from 12 bits on, under black letters, so that it can be
    read on a light and on a dark terminal. A character that several tokens make has their bits
    together. What else would not be seen is made visible: a newline that has a colour by a blank
    before it, and control characters (which could command the terminal) by their pictures.

    Args:
        score: of the text.

    Returns:
        A rich `Text`; print it with `soft_wrap=True`, so that no line is broken by rich.
    """
    from rich.style import Style
    from rich.text import Text

    shown = Text()
    for group in _groups(score):
        piece = _visible("".join(score.pieces[group]))
        color = _shade(float(score.bits[group].sum()))
        if color is None:
            shown.append(piece)
        else:
            style = Style(color="#000000", bgcolor=color)
            shown.append(piece.replace("\n", " \n"), style)
    return shown


def print_score(score: Score, console: "Console | None" = None) -> None:
    """Prints a text as `colored` gives it, a legend, and a line that sums it up.

    Where colours cannot be shown, or `NO_COLOR` is set, the text is printed as it is.

    Args:
        score: of the text.
        console: where to; None is standard output.
    """
    from rich.console import Console
    from rich.style import Style
    from rich.text import Text

    terminal = Console() if console is None else console
    if terminal.color_system is None or terminal.no_color:
        print(f"{score.text}\n\n{_summary(score)}", file=terminal.file)
        return
    terminal.print(colored(score), soft_wrap=True)
    legend = Text("\nsurprise in bits:")
    for bits in _LEGEND:
        color = _shade(bits)
        style = "" if color is None else Style(color="#000000", bgcolor=color)
        legend.append(" ").append(f" {_legend_label(bits)} ", style)
    terminal.print(legend, soft_wrap=True)
    terminal.print(_summary(score), soft_wrap=True, highlight=False, markup=False)


_PAGE_STYLE = """
:root { color-scheme: light dark; }
body { max-width: 50rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.6 system-ui, sans-serif; }
"""
# All under a class, so that nothing else on a page is changed by it.
_TEXT_STYLE = """
.score .text { white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 8;
  font-family: ui-monospace, monospace; line-height: 1.6; }
.score .text span:hover { outline: 1px solid; }
.score .text i::before { content: "\\21B5"; font-style: normal; opacity: .5; }
.score .legend span { padding: .1rem .5rem; }
"""


def to_html(score: Score, *, title: str = "Surprise") -> str:
    """A page that shows a text, the background of each token by its surprise as in `colored`.

    Args:
        score: of the text.
        title: of the page.

    Returns:
        HTML that needs no other file, script or font. Hovering over a token tells its probability,
        rank and entropy.
    """
    name = html.escape(title)
    return f"""<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{name}</title>
<style>{_PAGE_STYLE}{_TEXT_STYLE}</style>
</head>
<body class="score">
<h1>{name}</h1>
<p>{_summary(score)}</p>
<p>{_html_legend()}</p>
{_html_text(score)}
</body>
</html>
"""


def _html_text(score: Score) -> str:
    """The text, of which each token has its colour and tells about itself."""
    spans = []
    for group in _groups(score):
        places = range(*group.indices(len(score.pieces)))
        about = html.escape("\n\n".join(_about(score, place) for place in places))
        about = about.replace("\n", "&#10;")
        text = html.escape(_visible("".join(score.pieces[group])))
        # The mark is made by the style, so that it is not in a text copied from the page.
        text = text.replace("\n", "<i></i>\n")
        style = _html_style(float(score.bits[group].sum()))
        spans.append(f'<span{style} title="{about}">{text}</span>')
    return f'<div class="text">{"".join(spans)}</div>'


def _html_legend() -> str:
    """What the colours mean."""
    shades = " ".join(f"<span{_html_style(bits)}>{_legend_label(bits)}</span>" for bits in _LEGEND)
    return f'<span class="legend">Surprise in bits: {shades}</span>'


def _groups(score: Score) -> Iterator[slice]:
    """Tokens that are shown together, for only together do they make characters."""
    start = 0
    for place, piece in enumerate(score.pieces):
        if piece or place == len(score.pieces) - 1:
            yield slice(start, place + 1)
            start = place + 1


def _shade(bits: float) -> str | None:
    """The background, such as "#ffecd6", of so much surprise; None for none (NaN too)."""
    if not bits >= _FIRST_SHADE:
        return None
    share = min((bits - _FIRST_SHADE) / (_LAST_SHADE - _FIRST_SHADE), 1.0)
    ends = zip(_PALE, _STRONG, strict=True)
    return "#" + "".join(f"{round(pale + share * (strong - pale)):02x}" for pale, strong in ends)


def _html_style(bits: float) -> str:
    color = _shade(bits)
    return "" if color is None else f' style="background:{color};color:#000"'


def _legend_label(bits: int) -> str:
    return f"{bits} or more" if bits == _LEGEND[-1] else str(bits)


def _about(score: Score, place: int) -> str:
    """What is told about one token."""
    piece, token = score.pieces[place], int(score.tokens[place])
    name = f"{piece!r} (token {token})" if piece else f"part of a character (token {token})"
    if score.ranks[place] < 0:
        return f"{name}\nnot predicted: nothing comes before it"
    return (
        f"{name}\n"
        f"probability {math.exp(score.logprobs[place]):.3g} ({score.bits[place]:.2f} bits)\n"
        f"rank {score.ranks[place]} (0 is the likeliest)\n"
        f"entropy {score.entropies[place] / math.log(2):.2f} bits"
    )


def _summary(score: Score) -> str:
    count = len(score.tokens)
    line = f"{count} token" if count == 1 else f"{count} tokens"
    if not (score.ranks >= 0).any():
        return line
    return f"{line}, perplexity {score.perplexity:.4g}, {score.bits_per_byte:.3f} bits per byte"


def _visible(text: str) -> str:
    """With pictures in place of control characters, newlines and tabs excepted."""
    return text.translate(_PICTURES)


_PICTURES = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}
