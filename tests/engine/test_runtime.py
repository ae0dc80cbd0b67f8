"""The CPU run-time pick: precedence, reasons, and that nothing of it is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from longtail.engine.config import RuntimeConfig
from longtail.engine.cpu_machine import (
    Machine,
    cgroup_cpu_quota,
    count_cores,
    find_intel_openmp,
    find_tcmalloc,
    vllm_is_cpu_build,
)
from longtail.engine.errors import InvalidInputError
from longtail.engine.runtime import CpuRuntime, describe, estimate_parameters, pick_runtime, spawn_environment

INTEL = Path("/libs/libiomp5.so")
TCMALLOC = Path("/libs/libtcmalloc_minimal.so.4")
EIGHT_CORES = Machine(runs_on_cpu=True, num_cores=8, intel_openmp=INTEL, tcmalloc=TCMALLOC)
BARE = Machine(runs_on_cpu=True, num_cores=8)


def pick(
    machine: Machine = EIGHT_CORES,
    environ: Mapping[str, str] | None = None,
    model_dir: Path | None = None,
    **fields: object,
) -> CpuRuntime:
    config = RuntimeConfig(**fields)  # type: ignore[arg-type]
    return pick_runtime(config, model_dir=model_dir, environ=environ or {}, machine=machine)


def test_without_wishes_everything_good_that_is_there_is_picked() -> None:
    runtime = pick()
    assert runtime.environment() == {
        "LD_PRELOAD": f"{TCMALLOC}:{INTEL}",
        "OMP_NUM_THREADS": "8",
        "KMP_BLOCKTIME": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    assert describe(runtime) == (
        "CPU run-time: OpenMP intel (picked), 8 threads (picked: 8 cores), allocator tcmalloc (picked), "
        "blocking time 1 ms (picked)"
    )


def test_what_is_not_there_is_done_without_and_said() -> None:
    runtime = pick(BARE)
    assert runtime.environment() == {"OMP_NUM_THREADS": "7", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    assert describe(runtime) == (
        "CPU run-time: OpenMP gnu (intel is not available), 7 threads (picked: 8 cores, one left free for gnu), "
        "allocator system (tcmalloc is not available)"
    )


def test_one_core_has_one_thread_with_either_library() -> None:
    for intel in (None, INTEL):
        runtime = pick(Machine(runs_on_cpu=True, num_cores=1, intel_openmp=intel))
        assert runtime.omp_threads == 1


@pytest.mark.parametrize(
    ("field", "value", "name", "user", "from_field", "from_user", "from_pick"),
    [
        ("omp_threads", 3, "OMP_NUM_THREADS", "5", "3", "5", "8"),
        ("block_time_ms", 7, "KMP_BLOCKTIME", "infinite", "7", "infinite", "1"),
    ],
)
def test_a_field_wins_over_the_users_variable_and_that_over_the_pick(
    field: str, value: int, name: str, user: str, from_field: str, from_user: str, from_pick: str
) -> None:
    wishes = {field: value}
    assert pick(environ={name: user}, **wishes).environment()[name] == from_field
    assert pick(environ={name: user}).environment()[name] == from_user
    assert pick().environment()[name] == from_pick
    assert pick(environ={name: user}).why[field] == pick(**wishes).why[field] == "set by you"
    assert pick().why[field].startswith("picked")


def test_an_empty_variable_is_no_wish() -> None:
    empty = {"OMP_NUM_THREADS": "", "KMP_BLOCKTIME": " ", "LD_PRELOAD": "", "VLLM_CPU_OMP_THREADS_BIND": ""}
    assert pick(environ=empty) == pick()


def test_a_list_of_threads_counts_its_first_level() -> None:
    assert pick(environ={"OMP_NUM_THREADS": "4,2"}).omp_threads == 4


@pytest.mark.parametrize("text", ["0", "-1", "many", "2x", ",4"])
def test_a_thread_variable_that_is_no_number_is_an_error_that_names_it(text: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        pick(environ={"OMP_NUM_THREADS": text})
    assert caught.value.field == "OMP_NUM_THREADS"


@pytest.mark.parametrize(
    ("preloaded", "library", "allocator"),
    [
        ("/opt/libiomp5.so", "intel", "tcmalloc"),
        ("/opt/libomp.so.5", "intel", "tcmalloc"),
        ("/opt/libgomp.so.1", "gnu", "tcmalloc"),
        ("/opt/libjemalloc.so.2", "intel", "jemalloc"),
        ("/opt/libjemalloc.so.2:/opt/libgomp.so.1", "gnu", "jemalloc"),
    ],
)
def test_preloaded_libraries_of_the_user_stay_and_are_not_doubled(preloaded: str, library: str, allocator: str) -> None:
    runtime = pick(environ={"LD_PRELOAD": preloaded})
    assert (runtime.omp_library, runtime.allocator) == (library, allocator)
    libraries = runtime.environment()["LD_PRELOAD"]
    assert libraries.endswith(preloaded)
    assert libraries.count("libiomp5") <= 1
    assert ("libtcmalloc" in libraries) == (allocator == "tcmalloc")


def test_the_users_thread_binding_stays() -> None:
    name = "VLLM_CPU_OMP_THREADS_BIND"
    assert pick(environ={name: "0-3"}).environment()[name] == "0-3"


@pytest.mark.parametrize(
    ("machine", "environ", "fields", "named"),
    [
        (BARE, {}, {"omp_library": "intel"}, "runtime.omp_library"),
        (BARE, {}, {"allocator": "tcmalloc"}, "runtime.allocator"),
        (EIGHT_CORES, {"LD_PRELOAD": "/opt/libgomp.so.1"}, {"omp_library": "intel"}, "runtime.omp_library"),
        (EIGHT_CORES, {"LD_PRELOAD": "/opt/libjemalloc.so"}, {"allocator": "tcmalloc"}, "runtime.allocator"),
    ],
)
def test_a_wish_that_cannot_be_had_is_an_error_that_names_its_field(
    machine: Machine, environ: dict[str, str], fields: dict[str, str], named: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        pick(machine, environ, **fields)
    assert caught.value.field == named


def test_a_wish_for_less_is_granted() -> None:
    runtime = pick(omp_library="gnu", allocator="system")
    assert "LD_PRELOAD" not in runtime.environment()
    assert "KMP_BLOCKTIME" not in runtime.environment()
    assert (runtime.why["omp_library"], runtime.why["allocator"]) == ("set by you", "set by you")


def write_config(folder: Path, **fields: object) -> Path:
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


def test_a_tiny_model_runs_on_one_thread_and_a_large_one_does_not(tmp_path: Path) -> None:
    shape = {"vocab_size": 512, "intermediate_size": 128, "num_hidden_layers": 2}
    write_config(tmp_path, hidden_size=64, **shape)
    assert pick(model_dir=tmp_path).omp_threads == 1
    assert pick(model_dir=tmp_path, omp_threads=6).omp_threads == 6
    write_config(tmp_path, hidden_size=4096, **shape)
    assert pick(model_dir=tmp_path).omp_threads == 8


def test_parameters_are_estimated_within_a_tenth(tmp_path: Path) -> None:
    smollm2 = {"hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152, "intermediate_size": 1536}
    for fields in (smollm2, {"text_config": smollm2, "hidden_size": 1}):
        estimate = estimate_parameters(write_config(tmp_path, **fields))
        assert estimate is not None
        assert 0.9 < estimate / 134_515_008 < 1.1


@pytest.mark.parametrize("text", ["", "[]", "{", '{"hidden_size": 64}', '{"hidden_size": "64", "text_config": 3}'])
def test_a_config_that_does_not_say_counts_as_large(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert estimate_parameters(tmp_path) is None
    assert pick(model_dir=tmp_path).omp_threads == 8
    assert estimate_parameters(tmp_path / "missing") is None


def test_on_a_gpu_nothing_is_set() -> None:
    runtime = pick(Machine(runs_on_cpu=False, num_cores=8, intel_openmp=INTEL), omp_threads=2)
    assert runtime.environment() == {}
    before = dict(os.environ)
    with spawn_environment(runtime):
        assert dict(os.environ) == before
    assert "left alone" in describe(runtime)


def test_the_environment_is_set_in_the_block_only_and_for_child_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = dict(os.environ)
    runtime = pick(BARE)
    show = [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"]

    def start() -> str:
        with spawn_environment(runtime):
            os.environ["LD_PRELOAD"] = "/what/vllm/adds/libgomp.so"
            raise RuntimeError(subprocess.check_output(show, text=True).strip())

    with pytest.raises(RuntimeError, match=r"^7$"):
        start()
    assert dict(os.environ) == before


def write_cpu(sysfs: Path, cpu: int, *, core: int, package: int = 0, node: int = 0) -> None:
    folder = sysfs / "cpu" / f"cpu{cpu}"
    (folder / "topology").mkdir(parents=True)
    (folder / f"node{node}").mkdir()
    (folder / "topology" / "core_id").write_text(f"{core}\n", encoding="ascii")
    (folder / "topology" / "physical_package_id").write_text(f"{package}\n", encoding="ascii")


def test_threads_of_one_core_count_once_and_other_nodes_not(tmp_path: Path) -> None:
    for cpu in range(8):
        # Two nodes of two cores with two threads each, numbered as Linux does.
        write_cpu(tmp_path, cpu, core=cpu % 2, package=cpu // 2 % 2, node=cpu // 2 % 2)
    assert count_cores(range(8), tmp_path) == (2, 2)
    assert count_cores([0, 4], tmp_path) == (1, 1)
    assert count_cores([2, 3], tmp_path) == (2, 1)
    assert count_cores([0, 1, 2], tmp_path) == (2, 2)


def test_cpus_without_topology_count_as_cores(tmp_path: Path) -> None:
    assert count_cores(range(3), tmp_path) == (3, 1)
    assert count_cores([], tmp_path) == (1, 1)


def test_the_tightest_cgroup_quota_of_the_hierarchy_counts(tmp_path: Path) -> None:
    own, root = tmp_path / "self", tmp_path / "cgroup"
    (root / "pod" / "box").mkdir(parents=True)
    own.write_text("0::/pod/box\n", encoding="ascii")
    assert cgroup_cpu_quota(own, root) is None
    (root / "pod" / "box" / "cpu.max").write_text("max 100000\n", encoding="ascii")
    assert cgroup_cpu_quota(own, root) is None
    (root / "pod" / "cpu.max").write_text("250000 100000\n", encoding="ascii")
    assert cgroup_cpu_quota(own, root) == 2.5
    (root / "cpu.max").write_text("50000 100000\n", encoding="ascii")
    assert cgroup_cpu_quota(own, root) == 0.5
    own.write_text("0::/not/mounted/here\n", encoding="ascii")
    assert cgroup_cpu_quota(own, root) == 0.5


def test_a_quota_of_the_first_cgroup_version_counts_too(tmp_path: Path) -> None:
    own, root = tmp_path / "self", tmp_path / "cgroup"
    (root / "cpu" / "job").mkdir(parents=True)
    own.write_text("5:memory:/job\n4:cpu,cpuacct:/job\n", encoding="ascii")
    for name, text in (("cpu.cfs_quota_us", "-1"), ("cpu.cfs_period_us", "100000")):
        (root / "cpu" / "job" / name).write_text(text, encoding="ascii")
    assert cgroup_cpu_quota(own, root) is None
    (root / "cpu" / "job" / "cpu.cfs_quota_us").write_text("400000", encoding="ascii")
    assert cgroup_cpu_quota(own, root) == 4.0


def test_an_allocator_is_found_where_the_loader_would_look_first(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    assert find_tcmalloc({}, [str(second)]) is None
    (second / "libtcmalloc.so.4").touch()
    assert find_tcmalloc({}, [str(second)]) == second / "libtcmalloc.so.4"
    (first / "libtcmalloc_minimal.so.4").touch()
    assert find_tcmalloc({"LD_LIBRARY_PATH": f":{first}"}, [str(second)]) == first / "libtcmalloc_minimal.so.4"


def test_the_locked_openmp_library_is_found_as_a_file() -> None:
    path = find_intel_openmp()
    if path is None:
        pytest.skip("intel-openmp is not installed")
    assert path.is_file()
    assert path.name == "libiomp5.so"


def test_the_cpu_build_of_vllm_is_told_without_its_import() -> None:
    # The suite runs on vLLM's CPU build, or forces the device.
    code = "import os, sys; from longtail.engine.cpu_machine import vllm_is_cpu_build as f; print(f(os.environ)); "
    code += "print([m for m in ('torch', 'vllm') if m in sys.modules])"
    answer, imported = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()
    assert answer == str(vllm_is_cpu_build(os.environ))
    assert imported == "[]"
    assert vllm_is_cpu_build({"VLLM_TARGET_DEVICE": "cpu"})
