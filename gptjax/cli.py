"""The `gptjax` command: thin over the functions."""

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from gptjax.errors import UserError, nearest
from gptjax.experiment import parse_flags, run_command

COMMANDS = {"generate": "Continue a text with a model."}


@dataclass(frozen=True)
class Generate:
    """Continues a text with a model.

    Attributes:
        model: A run folder, or one of its checkpoints.
        prompt: The text to continue.
        max_new_tokens: The most tokens to add.
        num_samples: How many continuations to draw.
        temperature: Divides the logits; 0 is greedy.
        top_k: Keep only the k likeliest tokens.
        top_p: Keep the likeliest tokens that together reach this probability.
        seed: Of the draws.
    """

    model: Annotated[str, tyro.conf.Positional]
    prompt: Annotated[str, tyro.conf.Positional] = "\n"
    max_new_tokens: int = 200
    num_samples: int = 1
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


def generate(settings: Generate) -> None:
    """Prints continuations, each with its prompt."""
    import jax

    from gptjax.generation import generate_text
    from gptjax.pretrained.loading import load
    from gptjax.sampling import Sampling

    sampling = Sampling(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        overflow="slide",
    )
    model = load(settings.model)
    prompts = [settings.prompt] * settings.num_samples
    for number, text in enumerate(
        generate_text(model, prompts, sampling, jax.random.key(settings.seed))
    ):
        if number:
            print("-" * 8)
        print(settings.prompt + text)


def main() -> None:
    """Runs the subcommand that the command line names."""
    run_command(_main)


def _main() -> None:
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help"):
        print("usage: gptjax COMMAND ...\n\ncommands (gptjax COMMAND --help tells more):")
        for name, text in COMMANDS.items():
            print(f"  {name:12}{text}")
        return
    if args[0] not in COMMANDS:
        raise UserError(f"unknown command {args[0]!r}{nearest(args[0], COMMANDS)}")
    generate(parse_flags(Generate, None, COMMANDS["generate"], args[1:]))


if __name__ == "__main__":
    main()
