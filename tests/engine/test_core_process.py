"""How core processes are made: forked only where that is safe, and never left behind by a dead parent.

Each case is a process of its own, with the threads and imports that it is about.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from longtail.engine.cpu_machine import probe_machine

TIMEOUT_S = 120
needs_intel = pytest.mark.skipif(probe_machine().intel_openmp is None, reason="intel-openmp is not installed")

PRELUDE = """
import multiprocessing, os, sys, threading, time
from longtail.engine.config import RuntimeConfig
from longtail.engine.core_process import STOCK_METHODS, ForkedCores, can_fork_core
from longtail.engine.inline_runtime import load_intel
from longtail.engine.runtime import pick_runtime, spawn_environment

seen = "at import"

def show():
    print(seen, flush=True)

def start(target):
    process = ForkedCores().Process(target=target)
    process.start()
    process.join(60)
    print(process.exitcode)
"""


def run(folder: Path, body: str) -> list[str]:
    script = folder / "script.py"
    script.write_text(PRELUDE + body, encoding="utf-8")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "KMP_", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environ
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


def test_alone_it_forks_and_shares_what_the_parent_has(tmp_path: Path) -> None:
    body = """
if __name__ == "__main__":
    seen = "later"
    start(show)
"""
    assert run(tmp_path, body) == ["later", "0"]


@pytest.mark.parametrize(
    ("thread", "seen"),
    [("target=threading.Event().wait", "later"), ("target=time.sleep, args=(3,)", "at import")],
    ids=["that waits, it forks", "at work, it spawns"],
)
def test_beside_another_thread(tmp_path: Path, thread: str, seen: str) -> None:
    body = f"""
if __name__ == "__main__":
    seen = "later"
    threading.Thread({thread}, daemon=True).start()
    time.sleep(0.2)
    start(show)
"""
    assert run(tmp_path, body) == [seen, "0"]


def test_what_is_the_parents_stays_the_parents(tmp_path: Path) -> None:
    body = """
import fcntl, signal, socket

def stay():
    print("core", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
    buffered.flush()
    time.sleep(60)

if __name__ == "__main__":
    buffered = open(sys.argv[0] + ".out", "w")
    buffered.write("once ")
    fcntl.flock(buffered, fcntl.LOCK_EX)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    ours, pythons = socket.socketpair()
    for end in (ours, pythons):
        end.setblocking(False)
    signal.set_wakeup_fd(pythons.fileno())
    read_end, write_end = os.pipe()
    stdout, sys.stdout = sys.stdout, None
    process = ForkedCores().Process(target=stay)
    process.start()
    sys.stdout = stdout
    time.sleep(1)
    buffered.close()
    with open(sys.argv[0] + ".out", "a") as again:
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    listener.close()
    socket.create_server(("127.0.0.1", port)).close()
    os.close(write_end)
    assert os.read(read_end, 1) == b""
    process.terminate()
    process.join(30)
    print(process.exitcode, open(sys.argv[0] + ".out").read())
    try:
        print("woken by", ours.recv(9))
    except BlockingIOError:
        print("not woken")
"""
    assert run(tmp_path, body) == ["core", "7 once ", "not woken"]


@needs_intel
def test_a_core_is_forked_only_in_a_fresh_process_with_intels_library(tmp_path: Path) -> None:
    body = """
from dataclasses import replace
from pathlib import Path
runtime = pick_runtime(RuntimeConfig(), model_dir=None, environ={})
print(can_fork_core(replace(runtime, allocator_path=None)))
print(can_fork_core(replace(runtime, omp_library="gnu")))
print(can_fork_core(replace(runtime, allocator_path=Path("/lib/libtcmalloc.so"))))
sys.modules["torch"] = sys
print(can_fork_core(replace(runtime, allocator_path=None)))
"""
    assert run(tmp_path, body) == ["True", "False", "False", "False"]


@needs_intel
def test_intels_library_computes_in_a_fork_even_after_it_did_in_the_parent(tmp_path: Path) -> None:
    body = """
def compute():
    import torch
    one = torch.ones(512, 512)
    print(torch.get_num_threads(), int((one @ one).sum().item()), flush=True)

if __name__ == "__main__":
    runtime = pick_runtime(RuntimeConfig(omp_threads=2), model_dir=None)
    print(load_intel(runtime))
    with spawn_environment(runtime):
        compute()
        start(compute)
"""
    total = 512**3
    assert run(tmp_path, body) == ["None", f"2 {total}", f"2 {total}", "0"]


@pytest.fixture
def pids(tmp_path: Path) -> Iterator[list[int]]:
    """A forked, a lent, vLLM's two kinds as started here, and a stock process; their parent is killed with SIGKILL."""
    body = """
import signal
from longtail.engine.early_core import EarlyCore, _LendingContext

def stay():
    time.sleep(100)

if __name__ == "__main__":
    core = EarlyCore.launch({}, eager=True, modules=())
    contexts = (ForkedCores(), _LendingContext(core), *STOCK_METHODS.values(), multiprocessing.get_context("spawn"))
    processes = [context.Process(target=stay) for context in contexts]
    for process in processes:
        process.start()
    time.sleep(3)
    print(*(process.pid for process in processes), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    script = tmp_path / "script.py"
    script.write_text(PRELUDE + body, encoding="utf-8")
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, str(script)], stdout=out, timeout=TIMEOUT_S, check=False)
    started = [int(pid) for pid in (tmp_path / "out").read_text(encoding="ascii").split()]
    yield started
    for pid in started:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path("/proc", str(pid), "status").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_core_ends_when_its_parent_is_killed_where_stock_stays(pids: list[int]) -> None:
    *ours, stock = pids
    assert len(ours) == 4
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(is_alive(pid) for pid in ours):
        time.sleep(0.1)
    assert ([is_alive(pid) for pid in ours], is_alive(stock)) == ([False] * 4, True)
