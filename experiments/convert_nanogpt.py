"""Turns a checkpoint of nanoGPT into a folder in Hugging Face's layout.

    python experiments/convert_nanogpt.py out-shakespeare-char/ckpt.pt converted \
        --meta data/shakespeare_char/meta.pkl

The folder opens by `gptjax.load`, by the `gptjax` command and by transformers. nanoGPT's model is
GPT-2 with the exact GELU; where it was trained with bias=False, the biases that GPT-2 has are
zeros. A checkpoint is a pickle: of it only tensors and plain values are read, for which PyTorch has
to be installed, and of meta.pkl only texts and numbers. Code in them is refused and does not run.
The optimizer's state is left behind.
"""

import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gptjax.command_line import parse_flags, run_command
from gptjax.errors import UserError
from gptjax.model import Model
from gptjax.params import count_params
from gptjax.pretrained.families import read_config
from gptjax.pretrained.flax_files import InMemory
from gptjax.pretrained.huggingface import named_tensors, save_pretrained
from gptjax.pretrained.mapping import Tensor, by_layer, file_shape, import_params
from gptjax.pretrained.tokenizer_files import read_tokenizer
from gptjax.tokenizer import CharTokenizer, Tokenizer

_COMPILED = "_orig_mod."
_ARGUMENTS = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
# The ends of the names of linear layers, which nanoGPT has as [out, in] and GPT-2 as [in, out].
_LINEAR = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")


@dataclass(frozen=True)
class Convert:
    """Turns a checkpoint of nanoGPT into a folder in Hugging Face's layout.

    Attributes:
        checkpoint: The file that nanoGPT's train.py wrote, ckpt.pt.
        destination: The folder to write.
        meta: Of a model of characters, the meta.pkl beside its data.
        text: Instead of meta, the text that the model was trained on, of which the characters are
            taken.
        tokenizer: Of a model of other tokens, a folder with the files of its tokenizer, such as
            GPT-2's.
        activation: gelu_new for a model trained by an early nanoGPT, whose model.py has a function
            new_gelu; later ones have the exact gelu.
        overwrite: Whether a folder that is not empty may be written into.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    destination: Annotated[Path, tyro.conf.Positional]
    meta: Path | None = None
    text: Path | None = None
    tokenizer: Path | None = None
    activation: Literal["gelu", "gelu_new"] = "gelu"
    overwrite: bool = False


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Reads the tensors and the plain values of a checkpoint, and nothing else.

    Args:
        path: of a ckpt.pt.

    Returns:
        PyTorch's tensors by name, the arguments of nanoGPT's GPTConfig, and what else the
        checkpoint tells.

    Raises:
        UserError: if PyTorch is not installed, or the file holds something else; what it holds does
            not run.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            "a checkpoint of nanoGPT is read by PyTorch, which is not installed; run: pip install "
            "torch"
        ) from None
    if not path.is_file():
        raise UserError(f"{path} does not exist; give nanoGPT's ckpt.pt")
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < (2, 6):
        raise UserError(
            f"PyTorch {torch.__version__} may run code that a file of tensors holds "
            "(CVE-2025-32434); install 2.6 or newer"
        )
    try:
        # Mapped, so that the optimizer's state is never read.
        values = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and plain values, and is not read, since reading it "
            f"would run code ({_first_line(error)}); give the ckpt.pt that nanoGPT's train.py wrote"
        ) from None
    except Exception as error:  # Of a damaged file PyTorch raises errors of many kinds.
        raise UserError(
            f"{path} is no checkpoint of PyTorch, or is damaged ({_first_line(error)})"
        ) from None
    tensors = values.pop("model", None) if isinstance(values, dict) else None
    arguments = values.pop("model_args", None) if isinstance(values, dict) else None
    if not isinstance(tensors, dict) or not isinstance(arguments, dict):
        raise UserError(
            f"{path} lacks model and model_args; give the ckpt.pt that nanoGPT's train.py wrote"
        )
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UserError(f"the model of {path} holds more than tensors")
    return tensors, arguments, values


def nanogpt_model(
    tensors: dict[str, Any], arguments: dict[str, Any], *, activation: str, where: str
) -> Model:
    """The model of a checkpoint, without a tokenizer.

    Args:
        tensors: PyTorch's, by nanoGPT's names.
        arguments: of nanoGPT's GPTConfig.
        activation: as config.json names it.
        where: what errors call it.

    Raises:
        UserError: if the arguments are not GPTConfig's, or the tensors are not the model's.
    """
    import torch

    unknown = sorted(set(arguments) - _ARGUMENTS)
    if unknown:
        listed = ", ".join(f"{name}={arguments[name]!r}" for name in unknown)
        raise UserError(
            f"model_args of {where} have what nanoGPT's GPTConfig has not: {listed}; a model that "
            "differs from nanoGPT's needs a conversion of its own"
        )
    values = {
        "model_type": "gpt2",
        "vocab_size": arguments.get("vocab_size"),
        "n_positions": arguments.get("block_size"),
        "n_embd": arguments.get("n_embd"),
        "n_layer": arguments.get("n_layer"),
        "n_head": arguments.get("n_head"),
        "activation_function": activation,
    }
    family, config = read_config(values, f"model_args of {where}")
    entries = family.weights(config)
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(_COMPILED)
        # NumPy has no bfloat16 of its own; float32 holds each of its values.
        array = tensor.detach().to(torch.float32).numpy()
        named[name] = InMemory(array.T if name.endswith(_LINEAR) else array)
    if not arguments.get("bias", True):
        for name, entry, _ in by_layer(entries, config):
            if name.endswith(".bias"):
                zeros = torch.zeros(file_shape(entry, config))
                named.setdefault(name, InMemory(zeros.numpy()))
    checked = named_tensors(family, config, named, where)
    return Model(config, import_params(checked, entries, config, None))


def read_characters(meta: Path | None, text: Path | None) -> CharTokenizer | None:
    """The tokenizer of a model of characters.

    Args:
        meta: the meta.pkl of nanoGPT's data.
        text: instead, the text.

    Raises:
        UserError: if meta.pkl holds anything but dicts of texts and numbers.
    """
    if text is not None:
        return CharTokenizer.from_text(text.read_text(encoding="utf-8"))
    if meta is None:
        return None
    try:
        with meta.open("rb") as file:
            values = _PlainUnpickler(file).load()
        letters = values["itos"]
        alphabet = [letters[place] for place in range(len(letters))]
        if not all(isinstance(letter, str) and len(letter) == 1 for letter in alphabet):
            raise TypeError("itos has more than single characters")
    except OSError:
        raise
    except Exception as error:  # Damaged pickles raise errors of many kinds.
        raise UserError(
            f"{meta} is no meta.pkl of nanoGPT's characters ({_first_line(error)}); give the text "
            "itself by --text"
        ) from None
    return CharTokenizer("".join(alphabet))


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, texts, lists and dicts: whatever needs a name to be looked up is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def convert(settings: Convert) -> Model:
    """Reads a checkpoint and writes the folder.

    Raises:
        UserError: as the readers here do, and if the tokenizer is not the model's, or the folder
            holds something.
    """
    directory = settings.destination
    if not settings.overwrite and directory.exists() and any(directory.iterdir()):
        raise UserError(f"{directory} is not empty; give another folder, or --overwrite True")
    given = [name for name in ("meta", "text", "tokenizer") if getattr(settings, name) is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are given; give one of them")
    tokenizer: Tokenizer | None = read_characters(settings.meta, settings.text)
    if settings.tokenizer is not None:
        tokenizer = read_tokenizer(settings.tokenizer)
        if tokenizer is None:
            raise UserError(f"{settings.tokenizer} holds no tokenizer; give a folder with one")
    tensors, arguments, told = read_checkpoint(settings.checkpoint)
    model = nanogpt_model(
        tensors, arguments, activation=settings.activation, where=str(settings.checkpoint)
    )
    size = model.config.vocab_size
    # nanoGPT pads GPT-2's vocabulary, and never a character's.
    if tokenizer is not None and (
        tokenizer.vocab_size > size
        or (isinstance(tokenizer, CharTokenizer) and tokenizer.vocab_size != size)
    ):
        raise UserError(
            f"the tokenizer given by {given[0]} has {tokenizer.vocab_size} tokens and the model a "
            f"vocabulary of {size}; give the one that it was trained with"
        )
    model = Model(model.config, model.params, tokenizer)
    save_pretrained(model, directory)
    after = f", after {told['iter_num']} steps" if isinstance(told.get("iter_num"), int) else ""
    print(f"{settings.destination}: {count_params(model.config):,} parameters{after}")
    if tokenizer is None:
        print("It has no tokenizer; --meta, --text or --tokenizer adds one.")
    return model


def main() -> None:
    convert(parse_flags(Convert, None, str(__doc__)))


if __name__ == "__main__":
    run_command(main)
