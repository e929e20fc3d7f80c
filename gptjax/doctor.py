"""What is installed, what JAX sees, and what is missing."""

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator

from gptjax.devices import has_nvidia, has_tpu
from gptjax.errors import UserError

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "tyro",
    "jinja2",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "gguf",
)
_OPTIONAL = ("transformers", "torch")

# What libtpu says by its version (the first two: https://github.com/jax-ml/jax/issues/10192).
_TPU_IS_HELD = re.compile(
    r"(TPU is|libtpu\.so) already in use|/dev/(accel|vfio)\S* ?: Device or resource busy"
)


def examine() -> Iterator[str]:
    """Yields one line a finding, advice last.

    A line that begins with "advice:" says what to do about something that is missing.
    """
    from gptjax.caching import cache_directory

    yield f"python      {platform.python_version()} on {platform.platform()}"
    yield f"gptjax      {_version('gptjax') or 'not installed as a package'}"
    for name in _PACKAGES:
        yield f"{name:<18}{_version(name) or 'MISSING'}"
    for name in _OPTIONAL:
        yield f"{name:<18}{_version(name) or 'not installed (only to compare with)'}"
    cache = cache_directory()
    size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    yield f"cache       {cache} ({size / 1e6:.0f} MB)"
    advice = []
    try:
        import jax

        devices = jax.devices()
        backend = devices[0].platform
        for device in devices:
            stats = device.memory_stats() or {}
            limit = stats.get("bytes_limit")
            memory = f", {limit / 2**30:.1f} GiB" if limit else ""
            yield f"device      {device.id}: {device.device_kind} ({device.platform}{memory})"
    except Exception as error:  # A plugin may raise anything.
        backend = "none"
        reason = explain(error)
        yield f"device      none: {reason}"
        platforms = os.environ.get("JAX_PLATFORMS")
        advice.append(
            f"JAX_PLATFORMS={platforms} names what is not here, or is misspelled; unset it"
            if platforms
            else "JAX cannot start a device. If another process holds the TPU or GPU, end it; "
            "JAX_PLATFORMS=cpu runs without"
        )
    if backend in ("gpu", "tpu"):
        yield from _attention_lines()
    advice += _accelerator_advice(backend)
    missing = [name for name in _PACKAGES if _version(name) is None]
    if missing:
        advice.append(f"install what is missing: pip install {' '.join(missing)}")
    for line in advice:
        yield f"advice: {line}"


def _attention_lines() -> Iterator[str]:
    """What computes the attention of each preset in training on the devices here, and why."""
    from gptjax.attention import Backend, attention_backend
    from gptjax.config import PRESETS
    from gptjax.sharding import make_mesh

    mesh = make_mesh(data=-1)
    names: dict[Backend, list[str]] = {}
    for name, config in PRESETS.items():
        names.setdefault(attention_backend(config, mesh=mesh), []).append(name)
    for backend, presets in names.items():
        yield f"attention   {backend.name} for {', '.join(presets)}: {backend.reason}"


def require_platform(wanted: str) -> None:
    """Checks that JAX runs on what is expected, before anything else is done.

    Args:
        wanted: "gpu", "tpu" or "cpu".

    Raises:
        UserError: if it does not; the error says why, as far as can be told.
    """
    import jax

    try:
        found = jax.default_backend()
    except RuntimeError as error:
        raise UserError(f"{wanted} is required, but {explain(error)}") from None
    if found == wanted:
        return
    reasons = []
    try:
        jax.devices(wanted)
    except RuntimeError as error:
        # Where JAX went on without it, this tells why.
        if "initialize" in str(error):
            reasons.append(explain(error))
    advice = reasons or _accelerator_advice(found) or ["gptjax doctor tells more"]
    raise UserError(f"{wanted} is required, but JAX runs on {found}; {'; '.join(advice)}")


def explain(error: BaseException) -> str:
    """What is wrong where JAX cannot start a device, in one line."""
    text = str(error)
    if "lockfile" in text:
        return (
            "libtpu's lock file is there: another process holds the TPU, or one that was killed "
            "left the file; end that process, or remove /tmp/libtpu_lockfile"
        )
    if _TPU_IS_HELD.search(text):
        holder = re.search(r"process with pid (\d+)", text)
        return (
            f"the TPU is held by {f'process {holder[1]}' if holder else 'another process'}, and it "
            "serves one at a time; end that process (sudo lsof /dev/accel* /dev/vfio/* finds it), "
            "or set JAX_PLATFORMS=cpu to run without"
        )
    return (text.splitlines() or [type(error).__name__])[0]


def _accelerator_advice(backend: str) -> list[str]:
    advice = []
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if has_nvidia() and backend != "gpu":
        plugin = any(_version(f"jax-cuda{n}-plugin") for n in (12, 13))
        if platforms and "cuda" not in platforms and "gpu" not in platforms:
            advice.append(f"there is an NVIDIA GPU, but JAX_PLATFORMS={platforms} leaves it out")
        elif plugin:
            advice.append(
                "there is an NVIDIA GPU and JAX's plugin, but they do not work together; the "
                "driver may be too old for the plugin's CUDA (nvidia-smi tells its version)"
            )
        else:
            advice.append('there is an NVIDIA GPU; for it, pip install "jax[cuda13]"')
    if has_tpu() and backend != "tpu":
        if platforms and "tpu" not in platforms:
            advice.append(f"there is a TPU, but JAX_PLATFORMS={platforms} leaves it out")
        elif _version("libtpu"):
            advice.append(
                "there is a TPU and libtpu, but it does not start; another process may hold it "
                "(a TPU serves one process at a time)"
            )
        else:
            advice.append('there is a TPU; for it, pip install "jax[tpu]"')
    if backend == "cpu" and not advice:
        advice.append("no GPU or TPU is here; everything runs on the CPU")
    return advice


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
