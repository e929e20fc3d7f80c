"""Checkpoints of a training run: saved in the background, whole or not at all, verified when read.

A step is the folder `checkpoints/<step>/`, written by Orbax in two parts: `params/`, so that
sampling and evaluation read nothing else, and `state/`, the rest of the training state. Orbax
restores array data with flipped bits without a word, so a `manifest.json` with the size and the
SHA-256 of every file is written when everything else is on disk, and **a step counts as complete
only when its manifest stands**. The manifest also holds the caller's metadata, the metric and the
shape of every leaf: reading those needs neither Orbax nor the arrays.

Where a run has several processes all of them save and restore together, and need a folder that all
of them see. Neither the arrays nor the metadata depend on their number.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import re
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np

from gptjax import hosts
from gptjax.errors import UserError

if TYPE_CHECKING:
    from etils import epath

PyTree = Any

FORMAT_VERSION = 1

_MANIFEST = "manifest.json"
_STEP_FOLDER = re.compile(r"(\d+)(\.replaced)?")
_ORBAX_LEFTOVER = re.compile(r".*\.orbax-checkpoint-tmp.*")
_MAX_DIFFERENCES = 8
_HASH_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held.

    Attributes:
        step: The step it was saved at.
        state: The tree given to `save`, as arrays in the shardings asked for.
        metadata: The dict given to `save`, as JSON brings it back (tuples are lists, keys are
            strings), with one more key, `"checkpoint"`: format_version, step, metric, versions
            and the time of the save.
    """

    step: int
    state: PyTree
    metadata: dict[str, Any]


class CheckpointManager:
    """Saves and restores the steps of one run. A context manager; leaving it waits for the saves.

    Nothing on disk is changed before the first `save`, so a manager may also be opened to read.

    Args:
        directory: The folder of the steps (`<run>/checkpoints`), local or `gs://`.
        keep_latest: How many of the newest complete steps to keep.
        keep_every: Also keep the steps that this number divides.
        keep_best: Also keep the step with the lowest `metric`.

    Raises:
        UserError: If `keep_latest` or `keep_every` is below 1.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_latest: int = 2,
        keep_every: int | None = None,
        keep_best: bool = True,
    ) -> None:
        # Imported here and not at the first save, which would make a training step wait for it.
        from orbax.checkpoint import v1  # noqa: F401

        for name, value in (("keep_latest", keep_latest), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}, but must be at least 1")
        self.directory = _path(directory)
        self._keep_latest = keep_latest
        self._keep_every = keep_every
        self._keep_best = keep_best
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
            return
        if jax.process_count() > 1:
            # The other processes need not have failed, and would not agree with this one.
            self._executor.shutdown(wait=False)
            return
        # The error of the body is the one to see; a save that fails besides is told along with it.
        try:
            self.close()
        except (OSError, UserError) as save_error:
            error.add_note(f"Besides: {save_error}")

    def save(
        self,
        step: int,
        state: PyTree,
        metadata: dict[str, Any],
        *,
        metric: float | None = None,
    ) -> None:
        """Starts to save a step, after waiting for the save before it.

        Returns when the arrays have been copied to host memory: the caller may donate them at once.
        A stored step of the same number stays until the new one is complete. Stored steps of a
        higher number belong to a past that was left by resuming from an earlier step: a warning
        names them, and they are removed when this step is complete.

        Args:
            step: The number of the step, from 0 up.
            state: A tree of jax or numpy arrays, its top level a dict or dataclass; the entry
                `params` can be read alone later.
            metadata: A JSON-serializable dict.
            metric: What `best_step` compares, lower is better; a value that is not finite counts
                as none.

        Raises:
            UserError: If a leaf, the metadata or the step cannot be stored.
            OSError: If this save could not be started or the one before it failed.
        """
        from orbax.checkpoint import v1 as ocp

        self.wait()
        if step < 0:
            raise UserError(f"step is {step}, but must be 0 or more")
        state = _storable(state)
        content = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "metric": float(metric) if metric is not None and math.isfinite(metric) else None,
            "versions": {name: _version(name) for name in ("gptjax", "jax", "orbax-checkpoint")},
            "time": int(time.time()),
            "metadata": _as_json(metadata),
            "leaves": _leaves(state),
        }
        later = [number for number in self.steps() if number > step]
        if later and hosts.is_main():
            warnings.warn(
                f"step {step} is saved while later steps are stored in {self.directory}: {later} "
                "are removed once it is complete",
                stacklevel=2,
            )
        folder = self.directory / str(step)
        try:
            hosts.on_main(lambda: self._make_room(folder))
        except OSError as error:
            raise _save_error(folder, error) from error
        # Orbax' threads that wait for a folder made in the background outlive the failure to make
        # it by twenty minutes.
        context = ocp.Context()
        context.async_options.create_directories_asynchronously = False
        try:
            with context:
                response = ocp.save_checkpointables_async(folder, _parts(state))
        except Exception as error:
            raise _save_error(folder, error) from error
        self._pending = self._executor.submit(self._finish, response, folder, content)

    def wait(self) -> None:
        """Waits until all saves are complete.

        Raises:
            OSError: If one failed; the steps before it are intact.
        """
        if self._pending is None:
            return
        error = self._pending.exception()
        self._pending = None
        others = [problem for problem in hosts.gather(error and str(error)) if problem is not None]
        if error is not None:
            raise error
        if others:
            raise OSError(others[0])

    def close(self) -> None:
        """Waits like `wait`, then ends the background thread."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()

    def steps(self) -> list[int]:
        """The numbers of the complete steps, ascending."""
        return list(_complete(_folders(self.directory)))

    def latest_step(self) -> int | None:
        """The highest complete step, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The complete step with the lowest metric, or None where no metric was stored."""
        return _best(_complete(_folders(self.directory)))

    def restore(self, abstract_state: PyTree, step: int | None = None) -> Restored:
        """Restores the newest good step, or the given one, after checking the hashes of its files.

        Args:
            abstract_state: The tree of `jax.ShapeDtypeStruct`s of the state. Each array is read
                straight into its sharding, whatever it was saved with; without one, onto the
                default device.
            step: The step; by default damaged and incomplete ones are skipped with a warning.

        Raises:
            UserError: If there is no such step, the given step is damaged, no step is good, the
                state stored has other leaves or shapes, or a newer format was met.
        """
        self.wait()
        folders = _folders(self.directory)
        if not folders:
            raise UserError(f"no checkpoint in {self.directory}; save one first")
        folder, manifest = _first_good(folders, step, abstract_state)
        parts = _load(folder, _parts(abstract_state))
        return Restored(manifest["step"], _join(abstract_state, parts), _metadata(manifest))

    def _make_room(self, folder: "epath.Path") -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        _clean(self.directory)
        if folder.exists():
            folder.rename(self.directory / f"{folder.name}.replaced")

    def _finish(self, response: Any, folder: "epath.Path", content: dict[str, Any]) -> None:
        """Runs in the background: waits for Orbax, writes the manifest, removes old steps."""
        try:
            response.result()
            # Process 0 hashes all files: to share the work, processes would have to wait for each
            # other in this thread while the main one has collectives of its own under way.
            if not hosts.is_main():
                return
            files = _file_entries(folder)
            _write_manifest(folder, content | {"files": files})
        except Exception as error:
            raise _save_error(folder, error) from error
        self._remove_old_steps(content["step"])

    def _remove_old_steps(self, newest: int) -> None:
        folders = _complete(_folders(self.directory))
        numbers = [number for number in folders if number <= newest]
        keep: set[int | None] = set(numbers[-self._keep_latest :])
        if self._keep_every:
            keep |= {number for number in numbers if number % self._keep_every == 0}
        if self._keep_best:
            keep.add(_best({number: folders[number] for number in numbers}))
        kept = {folders[number] for number in numbers if number in keep}
        for folder in self.directory.iterdir():
            if _STEP_FOLDER.fullmatch(folder.name) and folder not in kept:
                _remove(folder)


def read_metadata(path: str | Path, step: int | str | None = None) -> dict[str, Any]:
    """Reads the metadata of a checkpoint, without its arrays and without importing Orbax.

    Args:
        path: A run folder, its `checkpoints` folder, or the folder of one step.
        step: A number, "latest" (the default) or "best".

    Returns:
        What `Restored.metadata` holds.

    Raises:
        UserError: If there is no such checkpoint, or its manifest is damaged or of a newer format.
    """
    folder, _ = find_checkpoint(path, step)
    try:
        return _metadata(_read_manifest(folder))
    except _DamagedError as damage:
        raise UserError(f"damaged checkpoint: {damage}; choose another step") from None


def restore_params(
    path: str | Path,
    abstract_params: PyTree,
    step: int | str | None = None,
    *,
    name: str = "params",
) -> PyTree:
    """Restores the parameters alone; no file of the optimizer state is opened for `params`.

    Args:
        path: A run folder, its `checkpoints` folder, or the folder of one step.
        abstract_params: The tree of `jax.ShapeDtypeStruct`s of `state.params`, with shardings as
            for `CheckpointManager.restore`. Its dtypes may differ from those stored: each array is
            cast as it is read.
        step: A number, "best", or "latest" (the default: the newest good one, with a warning
            where damaged ones are skipped).
        name: The entry of the state that is read; "ema_params" is the average of the weights.

    Raises:
        UserError: As `CheckpointManager.restore`.
    """
    folders = _located(path)
    if step == "latest":
        step = None
    elif step is not None:
        step = _chosen(path, folders, step)
    wanted = {name: abstract_params}
    folder, _ = _first_good(folders, step, wanted, only=name)
    return _join(wanted, _load(folder, _parts(wanted)))[name]


def find_checkpoint(path: str | Path, step: int | str | None = None) -> tuple["epath.Path", int]:
    """Finds a complete step; its files are not verified.

    Args:
        path: A run folder, its `checkpoints` folder, or the folder of one step.
        step: A number, "latest" (the default) or "best".

    Returns:
        The step's own folder and its number.

    Raises:
        UserError: If there is none.
    """
    folders = _located(path)
    number = _chosen(path, folders, step)
    return folders[number], number


def diff_configs(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Compares a config read from a checkpoint with the one given now, field by field.

    Returns:
        One line for each field that differs, nested keys dotted: "num_layers: checkpoint 4, given
        6". A field that only one side has reads "absent" on the other. Both sides are compared as
        JSON brings them back, so a tuple equals the list it was stored as.
    """
    sides = [_flat(_as_json(dict(side))) for side in (stored, given)]
    lines = []
    for name in sides[0] | sides[1]:
        if any(name not in side for side in sides) or sides[0][name] != sides[1][name]:
            old, new = (repr(side[name]) if name in side else "absent" for side in sides)
            lines.append(f"{name}: checkpoint {old}, given {new}")
    return lines


@contextlib.contextmanager
def lock_run(directory: str | Path) -> Iterator[None]:
    """Holds the run folder's lock, so that no second run writes into it.

    The kernel releases the lock `directory/.lock` when the process ends, however it ends. Which
    process holds it is written to `directory/.lock.json`, for the error message only. Remote
    folders (gs://) have no locks, and nothing is done there.

    Raises:
        UserError: At once, if the lock is taken.
    """
    path = _path(directory)
    if not _is_local(path):
        yield
        return
    import filelock

    path.mkdir(parents=True, exist_ok=True)
    holder = path / ".lock.json"
    lock = filelock.FileLock(path / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"{path} is in use by another run{_describe_holder(holder)}; wait for it to end, stop "
            "it, or give another folder"
        ) from None
    try:
        holder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _describe_holder(holder: "epath.Path") -> str:
    try:
        known = json.loads(holder.read_text())
        return f" (process {known['pid']} on {known['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


# The state: which leaves it has, and the two parts that Orbax stores.


def _leaves(tree: PyTree) -> dict[str, list[Any]]:
    """Maps the dotted path of every leaf to its shape and the name of its dtype."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): [list(leaf.shape), str(leaf.dtype)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _storable(state: PyTree) -> PyTree:
    """Returns the state with numpy scalars as arrays; refuses what Orbax would refuse or lose."""
    names = set()

    def check(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise UserError(
                f"state leaf {name} is a {type(leaf).__name__}, but only arrays can be saved; "
                "wrap it in jnp.asarray"
            )
        if leaf.size == 0:
            raise UserError(f"state leaf {name} has shape {leaf.shape}: it is empty; leave it out")
        # Orbax names files by the same dotted path, and keeps one of two arrays that share it.
        if name in names:
            raise UserError(f"two state leaves are both named {name}; use keys without dots")
        names.add(name)
        return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf

    return jax.tree_util.tree_map_with_path(check, state)


def _children(tree: PyTree) -> tuple[dict[str, PyTree], Any]:
    """Splits the top level of a tree into named subtrees and the structure that joins them."""
    children, structure = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: node is not tree
    )
    return {jax.tree_util.keystr(path, simple=True): child for path, child in children}, structure


def _parts(tree: PyTree) -> dict[str, PyTree]:
    """The parts of a state as Orbax stores them; those without leaves are left out."""
    state, _ = _children(tree)
    parts = {"params": state.pop("params", None), "state": state}
    return {name: part for name, part in parts.items() if jax.tree.leaves(part)}


def _join(tree: PyTree, parts: dict[str, PyTree]) -> PyTree:
    """Puts restored parts into the structure of the tree, the inverse of `_parts`."""
    children, structure = _children(tree)
    restored = children | parts.get("state", {})
    if "params" in parts:
        restored["params"] = parts["params"]
    return structure.unflatten(restored[name] for name in children)


def _load(folder: "epath.Path", abstract_parts: dict[str, PyTree]) -> dict[str, PyTree]:
    from orbax.checkpoint import v1 as ocp

    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    targets = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default
        ),
        abstract_parts,
    )
    context = ocp.Context()
    # What is to be there has been checked; an entry may be read without those beside it.
    context.pytree_options.loading.partial_load = True
    with context:
        return ocp.load_checkpointables(folder, targets)


def _check_structure(
    folder: "epath.Path", manifest: dict[str, Any], wanted: PyTree, only: str | None
) -> None:
    """Raises the UserError that lists how the stored leaves differ from the wanted ones."""
    stored = manifest["leaves"]
    if only is not None:
        entry = re.compile(re.escape(only) + r"(\.|$)")
        stored = {name: value for name, value in stored.items() if entry.match(name)}
    expected = _leaves(wanted)
    differences = []
    for name in stored | expected:
        old, new = (
            f"{tuple(side[name][0])} {side[name][1]}" if name in side else "absent"
            for side in (stored, expected)
        )
        same_shape = name in stored and name in expected and stored[name][0] == expected[name][0]
        if old != new and not (only is not None and same_shape):
            differences.append(f"{name}: checkpoint {old}, expected {new}")
    if differences:
        more = len(differences) - _MAX_DIFFERENCES
        raise UserError(
            f"the checkpoint {folder} does not fit: "
            + "; ".join(differences[:_MAX_DIFFERENCES])
            + (f"; and {more} more" if more > 0 else "")
            + "; use the config stored in it"
        )


# The manifest and the files of a step.


class _DamagedError(Exception):
    """A step's files are not those that were saved; the text names the file and what is wrong."""


def _file_entries(folder: "epath.Path") -> dict[str, list[Any]]:
    """Maps the path of every file of a step, relative to its folder, to its size and hash."""
    files = sorted(_walk(folder))
    if _is_local(folder):
        # Where power can go at any time, a manifest must not reach the disk before its files.
        for file in files:
            _sync(file)
    with concurrent.futures.ThreadPoolExecutor(_HASH_THREADS) as pool:
        hashes = pool.map(_hash, files)
        return {
            file.relative_to(folder).as_posix(): [file.stat().length, digest]
            for file, digest in zip(files, hashes, strict=True)
        }


def _verify(folder: "epath.Path", manifest: dict[str, Any], parts: Set[str]) -> None:
    """Checks sizes and hashes of the files of some parts: this process's share of them."""
    unread = {"params", "state"} - parts
    entries = {
        folder / name: entry
        for name, entry in manifest["files"].items()
        if name.partition("/")[0] not in unread
    }
    mine = list(entries)[jax.process_index() :: jax.process_count()]
    for file in mine:
        if not file.exists():
            raise _DamagedError(f"{file} is missing")
        size, expected = file.stat().length, entries[file][0]
        if size != expected:
            raise _DamagedError(f"{file} has {size} bytes instead of {expected}")
    with concurrent.futures.ThreadPoolExecutor(_HASH_THREADS) as pool:
        for file, digest in zip(mine, pool.map(_hash, mine), strict=True):
            if digest != entries[file][1]:
                raise _DamagedError(f"the content of {file} has changed")


def _write_manifest(folder: "epath.Path", manifest: dict[str, Any]) -> None:
    text = json.dumps({"digest": _manifest_digest(manifest), "manifest": manifest}, indent=1)
    target = folder / _MANIFEST
    if not _is_local(folder):
        # Object stores show a file only when it is whole.
        target.write_text(text)
        return
    partial = folder / (_MANIFEST + ".tmp")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, target)
    _sync(folder)
    _sync(folder.parent)


def _sync(path: "epath.Path") -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_manifest(folder: "epath.Path") -> dict[str, Any]:
    """Reads and checks a manifest.

    Raises:
        _DamagedError: If it is missing or not as it was written.
        UserError: If a newer version of this package wrote it.
    """
    file = folder / _MANIFEST
    try:
        text = json.loads(file.read_text())
        manifest = text["manifest"]
        if text["digest"] != _manifest_digest(manifest):
            raise ValueError
    except FileNotFoundError:
        raise _DamagedError(f"{file} is missing, the save did not finish") from None
    except (ValueError, KeyError, TypeError):
        raise _DamagedError(f"the content of {file} has changed") from None
    if manifest["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"the checkpoint {folder} has format version {manifest['format_version']}, but this "
            f"gptjax reads versions up to {FORMAT_VERSION}; upgrade gptjax"
        )
    return manifest


def _manifest_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _metadata(manifest: dict[str, Any]) -> dict[str, Any]:
    about = ("format_version", "step", "metric", "versions", "time")
    return manifest["metadata"] | {"checkpoint": {name: manifest[name] for name in about}}


def _hash(file: "epath.Path") -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _walk(folder: "epath.Path") -> Iterator["epath.Path"]:
    for child in folder.iterdir():
        if child.is_dir():
            yield from _walk(child)
        else:
            yield child


# Folders of steps.


def _folders(directory: "epath.Path") -> dict[int, "epath.Path"]:
    """All step folders by number, ascending, whether complete or not.

    A step that is being replaced stands as `<step>.replaced` until the new one is complete.
    """
    found: dict[int, epath.Path] = {}
    children = directory.iterdir() if directory.is_dir() else ()
    for child in children:
        if match := _STEP_FOLDER.fullmatch(child.name):
            number = int(match[1])
            good = match[2] is None and (child / _MANIFEST).exists()
            if number not in found or good or not (found[number] / _MANIFEST).exists():
                found[number] = child
    return dict(sorted(found.items()))


def _complete(folders: dict[int, "epath.Path"]) -> dict[int, "epath.Path"]:
    return {number: path for number, path in folders.items() if (path / _MANIFEST).exists()}


def _best(folders: dict[int, "epath.Path"]) -> int | None:
    metrics = {}
    for number, folder in folders.items():
        with contextlib.suppress(_DamagedError):
            metric = _read_manifest(folder)["metric"]
            if metric is not None:
                metrics[number] = metric
    return min(metrics, key=metrics.__getitem__, default=None)


def _located(path: str | Path) -> dict[int, "epath.Path"]:
    """The step folders behind any of the three forms of path."""
    given = _path(path)
    if (given / _MANIFEST).exists():
        try:
            return {_read_manifest(given)["step"]: given}
        except _DamagedError as damage:
            raise UserError(f"damaged checkpoint: {damage}; choose another step") from None
    folders = _folders(given / "checkpoints") or _folders(given)
    if not folders:
        raise UserError(
            f"no checkpoint in {given}; give a run folder (one that holds checkpoints/), its "
            "checkpoints folder, or the folder of one step"
        )
    return folders


def _chosen(path: str | Path, folders: dict[int, "epath.Path"], step: int | str | None) -> int:
    """The number of the complete step that `step` (number, "best", "latest", None) stands for."""
    complete = _complete(folders)
    if not complete:
        raise UserError(f"no complete checkpoint in {_path(path)}; none of its saves was finished")
    if step is None or step == "latest":
        return max(complete)
    if step == "best":
        best = _best(complete)
        if best is None:
            raise UserError(f'no checkpoint in {_path(path)} has a metric; use "latest"')
        return best
    if step not in complete:
        raise UserError(
            f"no complete checkpoint of step {step!r} in {_path(path)}; there are "
            f'{list(complete)}, "latest" and "best"'
        )
    return int(step)


def _first_good(
    folders: dict[int, "epath.Path"],
    step: int | None,
    wanted: PyTree,
    only: str | None = None,
) -> tuple["epath.Path", dict[str, Any]]:
    """Finds the step to restore, verified, and its manifest; see `CheckpointManager.restore`.

    Every process comes to the same one, and to the same error.
    """
    if step is not None and step not in folders:
        raise UserError(f"no checkpoint of step {step}; there are {list(folders)}")
    # Processes may see a shared folder change at different times; process 0's view counts.
    names = hosts.gather({number: os.fspath(folder) for number, folder in folders.items()})[0]
    folders = {int(number): _path(folder) for number, folder in names.items()}
    damages = []
    for number in sorted(folders, reverse=True) if step is None else [step]:
        folder = folders[number]
        manifest, damage, misfit = {}, None, None
        try:
            manifest = _read_manifest(folder)
            _check_structure(folder, manifest, wanted, only)
            _verify(folder, manifest, _parts(wanted).keys())
        except _DamagedError as error:
            damage = str(error)
        except UserError as error:
            misfit = str(error)
        found = hosts.gather([damage, misfit])
        for _, misfit in found:
            if misfit is not None:
                raise UserError(misfit)
        damage = next((damage for damage, _ in found if damage is not None), None)
        if damage is not None:
            damages.append(f"step {number} is damaged ({damage})")
            continue
        if damages and hosts.is_main():
            warnings.warn(f"{'; '.join(damages)}: falling back to step {number}", stacklevel=3)
        return folder, manifest
    raise UserError(
        f"checkpoint {'; '.join(damages)}; "
        + ("no good step is left" if step is None else "choose another step")
    )


def _clean(directory: "epath.Path") -> None:
    """Removes what killed saves left.

    A step that Orbax finished but that has no manifest is removed too: its hashes would vouch for
    whatever the crash left on disk, and the resumed run makes the same step again.
    """
    folders = _folders(directory)
    for child in directory.iterdir():
        match = _STEP_FOLDER.fullmatch(child.name)
        incomplete = match and not (child / _MANIFEST).exists()
        outdated = match and match[2] and folders[int(match[1])] != child
        if incomplete or outdated or _ORBAX_LEFTOVER.fullmatch(child.name):
            _remove(child)


def _remove(folder: "epath.Path") -> None:
    # The manifest first: what a kill leaves of the rest must not look complete.
    (folder / _MANIFEST).unlink(missing_ok=True)
    folder.rmtree()


def _path(path: str | Path) -> "epath.Path":
    from etils import epath

    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def _is_local(path: "epath.Path") -> bool:
    return "://" not in os.fspath(path)


# The rest.


def _save_error(folder: "epath.Path", error: Exception) -> OSError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return OSError(
        f"step {folder.name} could not be saved in {folder.parent}: {reason}; the steps before it "
        "are intact"
    )


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """A copy as JSON brings it back."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the metadata or config cannot be stored as JSON: {error}; use only dicts with string "
            "keys, lists, strings, numbers, booleans and None"
        ) from None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
