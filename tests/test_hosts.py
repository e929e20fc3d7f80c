"""Several processes of one run: as one process, however many there are and whoever dies."""

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from on_devices import xla_flags

from gptjax import command_line, doctor, fitting, hosts
from gptjax.checkpoint import find_checkpoint, read_metadata
from gptjax.config import ModelConfig
from gptjax.data import BatchLoader, evaluation_batches
from gptjax.errors import UserError
from gptjax.fitting import fit
from gptjax.optimizer import OptimizerConfig
from gptjax.plots import read_metrics
from gptjax.sampling import Sampling
from gptjax.sharding import make_mesh
from gptjax.tokenizer import ByteTokenizer

ROOT = Path(fitting.__file__).parents[1]
LIMIT_SECONDS = 120
ENDS_WITHIN_SECONDS = 60
STEPS, ROWS, LENGTH = 40, 4, 16
CONFIG = ModelConfig(
    vocab_size=257, context_length=LENGTH, num_layers=1, embed_dim=32, num_heads=2, dropout=0.1
)
OPTIMIZER = OptimizerConfig(warmup_steps=5, ema_decay=0.9)
TOKENS = np.random.default_rng(7).integers(97, 123, 900)


def row_hash(tokens: np.ndarray, targets: np.ndarray) -> str:
    return hashlib.sha256(tokens.tobytes() + targets.tobytes()).hexdigest()


class RecordedLoader(BatchLoader):
    """Notes what it was asked for, and takes its time so that a signal meets the run."""

    notes: Path
    pause = 0.0

    def rows(self, position: int, start: int, stop: int) -> dict[str, np.ndarray]:
        time.sleep(self.pause)
        batch = super().rows(position, start, stop)
        with self.notes.open("a") as file:
            for row in range(start, stop):
                text = row_hash(batch["tokens"][row - start], batch["targets"][row - start])
                file.write(json.dumps([position, row, text]) + "\n")
        return batch


def loader(notes: Path, pause: float = 0.0) -> RecordedLoader:
    made = RecordedLoader(TOKENS[:800], batch_size=ROWS, context_length=LENGTH, seed=3)
    made.notes, made.pause = notes, pause
    return made


def arguments() -> dict:
    return {
        "steps": STEPS,
        "eval_data": list(evaluation_batches(TOKENS[800:], batch_size=4, context_length=LENGTH)),
        "tokenizer": ByteTokenizer(),
        "eval_every": 20,
        "checkpoint_every": 5,
        "sampling": Sampling(max_new_tokens=5, overflow="slide"),
    }


def main() -> None:
    """One process of a run: where it goes, who it is, and what lies on which axis."""
    out, port, count, process, axes, pause, fails_at = sys.argv[1:]
    hosts.initialize(f"localhost:{port}", int(count), int(process))
    data = loader(Path(f"{out}.rows.{count}.{process}"), float(pause))
    if int(fails_at) >= 0 and process == "1":
        read = data.rows

        def fail(position: int, start: int, stop: int) -> dict[str, np.ndarray]:
            if position == int(fails_at):
                raise UserError("row 3 cannot be read")
            return read(position, start, stop)

        data.rows = fail

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("only process 0 writes")

    for name in ("MetricsLog", "plot_losses", "_write_text") if process != "0" else ():
        setattr(fitting, name, refuse)
    fit(CONFIG, OPTIMIZER, data, out=out, mesh=make_mesh(**json.loads(axes)), **arguments())


if __name__ == "__main__":
    command_line.run_command(main)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def environment(compiled: Path) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "NO_COLOR": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(1),
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "GPTJAX_CACHE": str(compiled),
    }


@dataclass
class Processes:
    """This file as a script in several processes, what each prints in a file."""

    out: Path
    printed: list[Path]
    running: list[subprocess.Popen[bytes]]

    def text(self, process: int = 0) -> str:
        return self.printed[process].read_text(errors="replace")

    def wait_for(self, pattern: str) -> re.Match[str]:
        end = time.monotonic() + LIMIT_SECONDS
        while not (found := re.search(pattern, self.text())):
            assert time.monotonic() < end, self.text()
            assert self.running[0].poll() is None, self.text()
            time.sleep(0.02)
        return found

    def statuses(self, seconds: float = LIMIT_SECONDS) -> list[int]:
        end = time.monotonic() + seconds
        return [process.wait(timeout=end - time.monotonic()) for process in self.running]


@contextlib.contextmanager
def start(
    out: Path, count: int, axes: dict[str, int], pause: float = 0.0, fails_at: int = -1
) -> Iterator[Processes]:
    port = free_port()
    run = Processes(out, [], [])
    try:
        for process in range(count):
            run.printed.append(out.with_name(f"{out.name}.{count}.{process}.txt"))
            words = (out, port, count, process, json.dumps(axes), pause, fails_at)
            with run.printed[-1].open("wb") as file:
                run.running.append(
                    subprocess.Popen(
                        [sys.executable, __file__, *map(str, words)],
                        env=environment(out.parent / "compiled"),
                        stdout=file,
                        stderr=file,
                    )
                )
        yield run
    finally:
        for process in run.running:
            process.kill()
            process.wait(timeout=30)


def losses(out: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in read_metrics(out) if name in row]


def expected_rows() -> dict[tuple[int, int], str]:
    plain = BatchLoader(TOKENS[:800], batch_size=ROWS, context_length=LENGTH, seed=3)
    batches = [plain[position] for position in range(STEPS)]
    return {
        (position, row): row_hash(batch["tokens"][row], batch["targets"][row])
        for position, batch in enumerate(batches)
        for row in range(ROWS)
    }


def read_rows(notes: Path) -> dict[tuple[int, int], str]:
    lines = [json.loads(line) for line in notes.read_text().splitlines()]
    return {(position, row): text for position, row, text in lines}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process on one device."""
    out = tmp_path_factory.mktemp("alone") / "run"
    notes = out.with_name("rows")
    result = fit(CONFIG, OPTIMIZER, loader(notes), out=out, progress=False, **arguments())
    assert result.finished
    assert read_rows(notes) == expected_rows()
    return out


def assert_same_run(out: Path, alone: Path) -> None:
    assert [row["step"] for row in read_metrics(out)] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "val_loss"):
        # Sums over devices are in another order.
        np.testing.assert_allclose(losses(out, name), losses(alone, name), rtol=2e-4)
    np.testing.assert_allclose(losses(out), losses(alone), rtol=2e-5)
    assert (out / "samples.txt").read_text() == (alone / "samples.txt").read_text()
    assert (out / "loss.png").exists()


# (processes, axes, the rows of a batch that each process holds)
LAYOUTS = {
    "two": (2, {"data": 2}, [[0, 1], [2, 3]]),
    "two by width": (2, {"tensor": 2}, [[0, 1, 2, 3], [0, 1, 2, 3]]),
    "four": (4, {"fsdp": 2, "tensor": 2}, [[0, 1], [0, 1], [2, 3], [2, 3]]),
}


@pytest.mark.parametrize(
    "layout",
    ["two", *(pytest.param(name, marks=pytest.mark.slow) for name in ("two by width", "four"))],
)
def test_several_processes_train_as_one(layout: str, alone: Path, tmp_path: Path):
    count, axes, held = LAYOUTS[layout]
    out = tmp_path / "run"
    with start(out, count, axes) as run:
        assert run.statuses() == [0] * count, run.text()
    assert_same_run(out, alone)
    expected = expected_rows()
    for process in range(count):
        rows = read_rows(Path(f"{out}.rows.{count}.{process}"))
        mine = {key: text for key, text in expected.items() if key[1] in held[process]}
        # Before it compiles, every process looks at one whole batch.
        rows = {key: text for key, text in rows.items() if key[0] or key in mine}
        assert rows == mine, process
    for process in range(1, count):
        printed = [line for line in run.text(process).splitlines() if "peer ranks" not in line]
        assert printed == []


@pytest.mark.parametrize("then", ["two by width", pytest.param("four", marks=pytest.mark.slow)])
def test_killed_stopped_and_started_with_other_numbers_it_is_the_same_run(
    then: str, alone: Path, tmp_path: Path
):
    out = tmp_path / "run"
    with start(out, 2, {"fsdp": 2}, pause=0.05) as run:
        run.wait_for(r"train step … [\d.]+ s")
        while not any((out / "checkpoints").glob("*/manifest.json")):
            assert run.running[0].poll() is None, run.text()
            time.sleep(0.02)
        run.running[1].kill()
        began = time.monotonic()
        statuses = run.statuses(ENDS_WITHIN_SECONDS)
        print(f"ended {time.monotonic() - began:.1f} s after the kill")
    assert statuses[0] not in (0, None)
    assert "error: process 1 died, so process 0 ends; the same command resumes" in run.text()
    assert "Traceback" not in run.text()
    for process in range(2):
        Path(f"{out}.rows.2.{process}").rename(f"{out}.rows.killed.{process}")
    killed_at = find_checkpoint(out)[1]
    assert 0 < killed_at < STEPS

    count, axes, _ = LAYOUTS[then]
    with start(out, count, axes, pause=0.05) as run:
        run.wait_for(r"train step … [\d.]+ s")
        time.sleep(0.5)
        run.running[-1].send_signal(signal.SIGTERM)
        assert run.statuses() == [0] * count, run.text()
    assert f"(resuming at step {killed_at})" in run.text()
    found = re.search(r"stopped by a signal to another process after step (\d+)", run.text())
    assert found, run.text()
    stopped_at = int(found[1])
    assert killed_at < stopped_at < STEPS
    assert find_checkpoint(out)[1] == stopped_at
    assert read_metadata(out)["data"] == {"position": stopped_at}
    # One batch is read ahead, by all of them.
    for process in range(count):
        assert max(read_rows(Path(f"{out}.rows.{count}.{process}")))[0] == stopped_at

    result = fit(
        CONFIG, OPTIMIZER, loader(Path(f"{out}.rows.1.0")), out=out, progress=False, **arguments()
    )
    assert result.finished
    assert_same_run(out, alone)
    expected = expected_rows()
    for notes in tmp_path.glob("run.rows.*"):
        for key, text in read_rows(notes).items():
            assert text == expected[key], (notes, key)


@pytest.mark.slow
def test_an_error_in_one_process_of_fit_ends_all(tmp_path: Path):
    with start(tmp_path / "run", 2, {"data": 2}, fails_at=7) as run:
        assert run.statuses(ENDS_WITHIN_SECONDS) == [1, 2], run.text()
    assert "error: row 3 cannot be read\n" in run.text(1)
    assert "error: process 1 failed (row 3 cannot be read), so process 0 ends" in run.text(0)
    assert "Traceback" not in run.text(0) + run.text(1)


ENDING = """
import os, sys, time
import jax
from gptjax import command_line, hosts
from gptjax.errors import UserError

def main():
    port, process, ends, how = sys.argv[1:]
    hosts.initialize(f"localhost:{port}", 3, int(process), start_timeout=60)
    assert hosts.gather(["x" * int(process) * 500, process]) == [
        ["x" * other * 500, str(other)] for other in range(3)
    ]
    assert hosts.on_main(lambda: process) == "0"
    for error in (UserError, OSError):
        def refuse():
            raise error("no" if hosts.is_main() else "not asked")
        try:
            hosts.on_main(refuse)
        except error as raised:
            assert str(raised) == "no"
    vote = hosts.StopVote()
    votes = [vote(process == "2" and step == 1) for step in range(4)]
    assert votes == [False, False, True, False], votes
    print("ready", flush=True)
    for step in range(1000):
        hosts.gather(step)
        if how != "well" and process == ends and step == 3:
            if how == "kill":
                os.kill(os.getpid(), 9)
            raise {"user": UserError, "bug": KeyError}[how]("why it ended")
        if how == "well" and step == 3:
            return
        time.sleep(0.05)

command_line.run_command(main)
"""


@pytest.mark.parametrize(
    ("ends", "how"), [(1, "kill"), (0, "kill"), (2, "user"), (1, "bug"), (0, "well")]
)
def test_one_process_ends_the_others_and_they_say_why(ends: int, how: str, tmp_path: Path):
    port = free_port()
    running = [
        subprocess.Popen(
            [sys.executable, "-c", ENDING, str(port), str(process), str(ends), how],
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(3)
    ]
    try:
        texts = [process.communicate(timeout=ENDS_WITHIN_SECONDS)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait(timeout=30)
    statuses = [process.returncode for process in running]
    assert all("ready\n" in text for text in texts), texts
    if how == "well":
        assert statuses == [0, 0, 0]
        assert not any(re.search("error|Traceback", text) for text in texts), texts
        return
    assert statuses[ends] == {"kill": -signal.SIGKILL, "user": 2, "bug": 1}[how]
    assert ("error: why it ended\n" in texts[ends]) == (how == "user")
    assert ("Traceback" in texts[ends]) == (how == "bug")
    reason = "died" if how == "kill" else r"failed \('?why it ended'?\)"
    for process in {0, 1, 2} - {ends}:
        line = rf"error: process {ends} {reason}, so process {process} ends; the same command res"
        assert re.search(line, texts[process]), texts[process]
        assert "Traceback" not in texts[process]
        # Of process 0's death JAX may abort the others before they can leave.
        assert statuses[process] in ((1, -signal.SIGABRT) if ends == 0 else (1,))


# Finding each other.


def test_a_script_names_the_processes_that_are_missing(tmp_path: Path):
    words = (
        *("--coordinator", f"localhost:{free_port()}", "--num-processes", 4),
        *("--start-timeout", 4, "--out", tmp_path / "run", "--process-id"),
    )
    script = [sys.executable, str(ROOT / "experiments" / "quickstart.py"), *map(str, words)]
    started = [
        subprocess.Popen(
            [*script, process],
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in ("0", "2")
    ]
    try:
        for process in started:
            text, _ = process.communicate(timeout=LIMIT_SECONDS)
            assert process.returncode == 2
            assert "error: processes 1, 3 of 4 did not come to localhost:" in text
            assert text.count("\n") == 1, text
    finally:
        for process in started:
            process.kill()
            process.wait(timeout=30)
    assert not (tmp_path / "run").exists()


def call(*processes: tuple[int, int, float], count: int = 3, timeout: float = 1.0) -> list[object]:
    """What the roll ends with on process 0 and on others, each (number, of how many, delay)."""
    address = ("localhost", free_port())
    found: dict[int, object] = {}

    def take_part(place: int, process: int, of: int, delay: float) -> None:
        time.sleep(delay)
        roll = hosts._answer_roll if process else hosts._call_roll
        try:
            found[place] = roll(address, of, process, timeout)
        except UserError as error:
            found[place] = str(error)

    threads = [
        threading.Thread(target=take_part, args=(place, *of_each))
        for place, of_each in enumerate([(0, count, 0.0), *processes])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return [found[place] for place in sorted(found)]


def test_the_roll():
    links, *others = call((1, 3, 0.3), (2, 3, 0.0))
    assert isinstance(links, dict)
    assert sorted(links) == [1, 2]
    assert [list(link) for link in others] == [[0], [0]]

    assert all("process 1 of 3 did not come to localhost:" in text for text in call((2, 3, 0.0)))
    assert all("two processes came as process 2" in text for text in call((2, 3, 0), (2, 3, 0.2)))
    different = "process 1 was told of 4 processes, but process 0 of 3"
    assert all(different in text for text in call((1, 4, 0.0)))
    with pytest.raises(UserError, match="process 2 of 3 heard nothing from process 0 at localhost"):
        hosts._answer_roll(("localhost", free_port()), 3, 2, 0.5)
    with socket.create_server(("", 0)) as taken, pytest.raises(UserError, match="cannot listen on"):
        hosts._call_roll(("localhost", taken.getsockname()[1]), 2, 0, 1)


def test_one_that_answers_and_dies_is_missing_again():
    address = ("localhost", free_port())
    found = []

    def roll() -> None:
        try:
            hosts._call_roll(address, 3, 0, 3)
        except UserError as error:
            found.append(str(error))

    thread = threading.Thread(target=roll)
    thread.start()
    links = []
    for process in (1, 2):
        time.sleep(0.5)
        links.append(socket.create_connection(address, timeout=5))
        links[-1].sendall(json.dumps({"process": process, "of": 3}).encode() + b"\n")
        if process == 1:
            time.sleep(0.5)
            links[0].close()
    thread.join(timeout=10)
    links[1].close()
    assert found
    assert found[0].startswith("process 1 of 3 did not come")


def test_what_is_not_a_process_of_the_run_is_ignored():
    address = ("localhost", free_port())
    found = []
    thread = threading.Thread(target=lambda: found.append(hosts._call_roll(address, 2, 0, 5)))
    thread.start()
    for sent in (b"GET / HTTP/1.0\r\n\r\n", b"", b"3\n", b'{"process": "x"}\n'):
        end = time.monotonic() + 5
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                stranger = socket.create_connection(address, timeout=5)
                break
            assert time.monotonic() < end
        stranger.sendall(sent)
        stranger.close()
    assert list(hosts._answer_roll(address, 2, 1, 5)) == [0]
    thread.join(timeout=10)
    assert list(found[0]) == [1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("localhost:1234", 2, None), "process_id not given"),
        ((None, 2, 1), "coordinator not given"),
        (("localhost:1234", None, None), "num_processes and process_id not given"),
        (("localhost:1234", 2, 2), "process_id is 2 of num_processes 2"),
        (("localhost:1234", 0, 0), "process_id is 0 of num_processes 0"),
        (("localhost", 2, 1), "coordinator is 'localhost'; give HOST:PORT"),
        (("localhost:99999", 2, 1), "give HOST:PORT"),
    ],
)
def test_what_does_not_say_who_a_process_is_is_refused(given: tuple, message: str):
    with pytest.raises(UserError, match=message) as caught:
        hosts.initialize(*given)
    assert "\n" not in str(caught.value)


def test_a_process_alone_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    hosts.initialize()
    hosts.initialize(num_processes=1)
    for name, value in {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "node[3-4]",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    hosts.initialize()
    assert not jax.distributed.is_initialized()
    assert hosts.gather({"a": 1}) == [{"a": 1}]
    vote = hosts.StopVote()
    assert [vote(False), vote(True)] == [False, True]


def test_slurm_tells_who_a_process_is(monkeypatch: pytest.MonkeyPatch):
    for name, value in {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "node[3-4]",
        "SLURM_NTASKS": "16",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
    }.items():
        monkeypatch.setenv(name, value)
    met = {}

    def answer(address: tuple, count: int, process: int, timeout: float) -> None:
        met.update(address=address, count=count, process=process, timeout=timeout)
        raise UserError("enough")

    monkeypatch.setattr(hosts, "_answer_roll", answer)
    with pytest.raises(UserError, match="enough"):
        hosts.initialize(start_timeout=7)
    assert met.pop("address")[0] == "node3"
    assert met == {"count": 16, "process": 9, "timeout": 7}


def test_unequal_processes_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="2 processes, but the mesh has devices of 1"):
        fit(CONFIG, OPTIMIZER, loader(tmp_path / "rows"), out=tmp_path / "run", **arguments())

    @dataclass
    class Device:
        process_index: int

    @dataclass
    class Mesh:
        devices: np.ndarray

    mesh = Mesh(np.array([Device(0), Device(1)]))
    given = {"model": {"num_layers": 2}, "optimizer": None}
    other = {"model": {"num_layers": 3}, "optimizer": None, "loop": {"mesh": {"data": 2}}}
    monkeypatch.setattr(hosts, "gather", lambda value: [value, other])
    with pytest.raises(UserError, match=r"process 1 .* than process 0 \(model\.num_layers\)"):
        fitting._refuse_unequal_processes(mesh, given, {"mesh": {"data": 2}})
    with pytest.raises(UserError, match=r"\(model\.num_layers, loop\.mesh\.data\)"):
        fitting._refuse_unequal_processes(mesh, given, {"mesh": {"data": 1}})
    monkeypatch.setattr(hosts, "gather", lambda value: [value, value])
    fitting._refuse_unequal_processes(mesh, given, {"mesh": {"data": 2}})


# The platform.


def test_a_platform_that_is_expected_and_not_there_is_an_error(command, tmp_path: Path):
    out = tmp_path / "run"
    assert jax.default_backend() == "cpu"
    status, _, error = command("quickstart", "--require", "gpu", "--out", out)
    assert status == 2
    assert error.startswith("error: gpu is required, but JAX runs on cpu; ")
    assert error.count("\n") == 1
    assert not out.exists()
    doctor.require_platform("cpu")


HELD = {
    "ABORTED: The TPU is already in use by process with pid 176028. Not attempting to load "
    "libtpu.so in this process.": "the TPU is held by process 176028",
    "libtpu.so already in use by another process probably owned by another user. Run "
    '"$ sudo lsof -w /dev/accel0" to figure out which process': "the TPU is held by another",
    "TPU initialization failed: open(/dev/vfio/0): Device or resource busy: Couldn't open "
    "iommu group /dev/vfio/0": "the TPU is held by another process",
    "ABORTED: Internal error when accessing libtpu multi-process lockfile. Run "
    '"$ sudo rm /tmp/libtpu_lockfile".': "remove /tmp/libtpu_lockfile",
}


@pytest.mark.parametrize("text", HELD)
def test_a_tpu_held_by_another_process_is_said_to_be(text: str, command, monkeypatch, tmp_path):
    failure = RuntimeError(f"Unable to initialize backend 'tpu': {text}")

    def refuse(*_: object) -> None:
        raise failure

    monkeypatch.setattr(jax, "devices", refuse)
    monkeypatch.setattr(doctor, "has_tpu", lambda: True)
    assert any(HELD[text] in line for line in doctor.examine() if line.startswith("device"))
    status, _, error = command("quickstart", "--require", "tpu", "--out", tmp_path / "run")
    assert status == 2
    assert HELD[text] in error
    monkeypatch.setattr(jax, "default_backend", refuse)
    status, _, error = command("quickstart", "--require", "tpu", "--out", tmp_path / "run")
    assert status == 2
    assert HELD[text] in error
    monkeypatch.setattr(jax, "process_count", refuse)
    status, _, error = command("quickstart", "--tokenizer", "bytes", "--out", tmp_path / "run")
    assert (status, error.count("\n")) == (1, 1)
    assert HELD[text] in error
