"""Continues a text with a trained model.

python experiments/sample.py runs/quickstart "The function " --num-samples 3
"""

from gptjax.cli import Generate, generate
from gptjax.command_line import parse_flags, run_command


def main() -> None:
    generate(parse_flags(Generate, None, str(__doc__)))


if __name__ == "__main__":
    run_command(main)
