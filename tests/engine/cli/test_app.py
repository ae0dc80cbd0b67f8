"""The command line without an engine: options, help, errors and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from longtail.engine.cli import app as app_module
from longtail.engine.cli import options
from longtail.engine.cli.app import app
from longtail.engine.config import EngineConfig, RuntimeConfig, SamplingConfig
from longtail.engine.errors import EngineTimeoutError, InvalidInputError, ModelSourceError

HEAVY = ("torch", "vllm", "transformers", "reasoning_gym", "fastapi")


def run(*args: object, **kwargs: Any) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], **kwargs)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder that passes for a checkpoint as long as nobody opens the weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 100}))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"token_ids": [1, 2, i]}) + "\n" for i in range(4)))
    return path


def test_help_and_errors_import_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from longtail.engine.cli.app import app\n"
        "for args in (['--help'], ['rollout', '--help'], ['serve', '--help'],\n"
        "             ['rollout', '--out', 'x', '--task', 't', '--top-p', '2']):\n"
        "    try: app(args)\n"
        "    except SystemExit: pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.splitlines()[-1] == "[]"
    # The control: a command that needs it does import it.
    control = code.replace("'--top-p', '2'", "'--top-p', '1'")
    done = subprocess.run([sys.executable, "-c", control], capture_output=True, text=True, check=True, cwd="/")
    assert "reasoning_gym" in done.stdout.splitlines()[-1]


def test_help_takes_little_time() -> None:
    before = os.times()
    subprocess.run([sys.executable, "-m", "longtail.engine.cli", "--help"], check=True, capture_output=True)
    after = os.times()
    cpu_s = (after.children_user - before.children_user) + (after.children_system - before.children_system)
    assert cpu_s < 1.0  # about 0.3 s of processor time; the bound leaves room for a busy machine


def test_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"longtail {version('longtail')}\n")


@pytest.mark.parametrize(
    ("group", "config"),
    [(options.SamplingOptions, SamplingConfig), (options.RuntimeOptions, RuntimeConfig)],
)
def test_every_field_of_a_configuration_is_an_option(group: type, config: type) -> None:
    # The command line has no hooks, which boundaries are for.
    names = {field.name for field in fields(config) if not field.name.startswith("boundary_")}
    assert {field.name for field in fields(group)} == names


def test_engine_options_reach_the_configuration_and_nothing_is_left_out() -> None:
    given = {
        "dtype": "float32", "max_model_len": 7, "max_num_seqs": 8, "max_num_batched_tokens": 9, "block_size": 32,
        "kv_cache_gib": 0.5, "gpu_memory_utilization": 0.4, "enable_prefix_caching": False, "async_scheduling": True,
        "enforce_eager": False, "engine_seed": 3, "start_timeout_s": 1.0, "stall_timeout_s": 2.0,
        "weight_transfer": "ipc", "vllm_arg": ["swap-space=4", "tokenizer=some/dir"],
    }  # fmt: skip
    assert set(given) == {field.name for field in fields(options.EngineOptions)}
    runtime = options.RuntimeOptions(omp_threads=2, allocator="system")
    chosen = options.engine_fields(options.EngineOptions(**given), runtime, "inline")
    config = options.engine_config("m", json.loads(json.dumps(chosen)))  # as it comes back from a sidecar
    assert (config.seed, config.core) == (3, "inline")
    assert dict(config.vllm_args) == {"swap_space": 4, "tokenizer": "some/dir"}
    assert config.runtime == RuntimeConfig(omp_threads=2, allocator="system")
    for name in set(given) - {"engine_seed", "vllm_arg"}:
        assert getattr(config, name) == given[name], name
    not_options = {"model", "core", "runtime", "vllm_args", "seed", "load_tokenizer", "weight_version", "carry"}
    assert {field.name for field in fields(EngineConfig)} - not_options == set(given) - {"engine_seed", "vllm_arg"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--top-p", "1.5"], "--top-p: expected a finite number in (0, 1], got 1.5"),
        (["--temperature", "nan"], "--temperature: expected a finite number in [0, 100], got nan"),
        (["--stop", ""], "--stop[0]: expected "),
        (["--max-num-seqs", "0"], "--max-num-seqs: expected an integer >= 1, got 0"),
        (["--engine-seed", "-1"], "--engine-seed: expected an integer in"),
        (["--dtype", "int4"], "--dtype: expected one of auto, float32"),
        (["--omp-threads", "0"], "--omp-threads: expected an integer in [1, 1024], got 0"),
        (["--vllm-arg", "swap_space"], "--vllm-arg: expected NAME=VALUE"),
        (["--vllm-arg", "seed=3"], "engine.vllm_args.seed: expected a field that longtail does not set itself"),
        (["--group-size", "0"], "--group-size: expected an integer in [1, 65536], got 0"),
        (["--target-groups", "9"], "--target-groups: expected at most the 4 prompts given, got 9"),
        (["--over-provision", "2"], "--over-provision: expected target_groups with it, got 2.0"),
        (["--over-provision", "0.5", "--target-groups", "2"], "--over-provision: expected a finite number >= 1"),
        (["--num-prompts", "9"], "--num-prompts: expected at most the 4 prompts there are, got 9"),
        (["--num-prompts", "0"], "--num-prompts: expected an integer >= 1, got 0"),
        (["--task", "chain_sum"], "--prompts: expected exactly one of --prompts FILE and --task NAME"),
        (["--continue", "x.jsonl"], "--out: expected exactly one of --out FILE and --continue FILE"),
        (["--report", "/"], "--report: expected a file, got 'the folder /'"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(
    args: list[str], words: str, prompts: Path, model_folder: Path, tmp_path: Path, no_engine: None
) -> None:
    out = tmp_path / "o.jsonl"
    result = run("rollout", "--prompts", prompts, "--model", model_folder, "--out", out, *args)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not out.exists()


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that must not be asked for."""
    from longtail.engine.cli import rollout

    def refuse(config: EngineConfig) -> Any:
        raise AssertionError(f"an engine was started with {config}")

    monkeypatch.setattr(rollout, "open_engine", refuse)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ":2: expected a JSON object"),
        ('{"token_ids": [1, 100]}', "prompts[1].token_ids[1]: expected an integer in [0, 100), got 100"),
        ('{"token_ids": [1], "text": "a"}', ":2: expected exactly one of token_ids, text, messages"),
        ('{"text": "a", "id": "line-1"}', ":2.id: expected an id that line 1 does not have"),
        ('{"messages": [{"role": "me", "content": "a"}]}', ":2.messages[0].role: expected one of system"),
    ],
)
def test_a_wrong_prompt_is_named_before_an_engine_starts(
    line: str, words: str, model_folder: Path, tmp_path: Path, no_engine: None
) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"token_ids": [1]}\n' + line + "\n")
    result = run("rollout", "--prompts", prompts, "--model", model_folder, "--out", tmp_path / "o.jsonl")
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_a_run_that_would_replace_a_file_must_say_so(
    prompts: Path, model_folder: Path, tmp_path: Path, no_engine: None
) -> None:
    out = tmp_path / "o.jsonl"
    out.write_text("work of hours\n")
    result = run("rollout", "--prompts", prompts, "--model", model_folder, "--out", out)
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr
    assert out.read_text() == "work of hours\n"


@pytest.mark.parametrize("model", ["/no/such/folder", "someone/some-model"])
def test_a_model_that_is_not_there_is_wrong_input(model: str, prompts: Path, tmp_path: Path) -> None:
    for args in (("rollout", "--prompts", prompts, "--out", tmp_path / "o.jsonl"), ("serve", "--port", 0)):
        result = run(*args, "--model", model)
        assert result.exit_code == 2, result.output
        assert result.stderr.count("Traceback") == 0
        assert "error: " in result.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--port", "70000"], "--port: expected an integer in [0, 65535], got 70000"),
        (["--host", "0.0.0.0"], "--host: expected a loopback address"),
        (["--api-key", "two words"], "--api-key: expected printable ASCII characters without blanks"),
        (["--max-members", "0"], "--max-members: expected an integer >= 1, got 0"),
        (["--frontend-arg", "port=1"], "server.frontend_args.port: expected an option that longtail does not set"),
    ],
)
def test_a_wrong_server_option_is_named_before_anything_loads(args: list[str], words: str, model_folder: Path) -> None:
    result = run("serve", "--model", model_folder, *args)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "two words" not in result.stderr  # a key is never shown


def test_serve_hands_over_what_was_set(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> None:
    from longtail.engine.server import serve as serve_module

    calls: list[tuple[EngineConfig, dict[str, Any]]] = []
    monkeypatch.setattr(serve_module, "serve", lambda config, **kwargs: calls.append((config, kwargs)))
    monkeypatch.setenv("LONGTAIL_API_KEY", "secret")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    result = run("serve", "--model", model_folder, "--port", 0, "--max-num-seqs", 5, "--frontend-arg", "root_path=/x")
    assert result.exit_code == 0, result.output
    [(config, kwargs)] = calls
    assert (config.model, config.max_num_seqs, kwargs["api_key"]) == (str(model_folder), 5, "secret")
    assert (kwargs["port"], kwargs["frontend_args"]) == (0, {"root_path": "/x"})
    assert "host" not in kwargs  # what was not set is the server's own default


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (InvalidInputError("sampling.top_p", "less", 2), 2, "error: --top-p: expected less, got 2\n"),
        (ModelSourceError("no weights"), 2, "error: no weights\n"),
        (EngineTimeoutError("the engine", 2.0), 1, "error: waited 2 s for the engine\n"),
        (RuntimeError("first\nsecond"), 1, "error: RuntimeError: first second\n"),
    ],
)
def test_every_error_is_a_line_and_debug_adds_the_traceback(
    error: Exception, exit_code: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longtail.engine.cli import model

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(model, "make_ready", fail)
    result = run("model", "smollm2")
    assert (result.exit_code, result.stderr) == (exit_code, line)
    result = run("model", "smollm2", "--debug")
    assert result.exit_code == exit_code
    assert "Traceback" in result.stderr
    assert result.stderr.endswith(line)


def test_model_prints_the_folder_alone_on_stdout(model_folder: Path) -> None:
    result = run("model", model_folder)
    assert (result.exit_code, result.stdout) == (0, f"{model_folder}\n")
    assert run("model", model_folder, "--verify").exit_code == 2


def test_doctor_gives_its_verdict_as_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from longtail.engine import doctor

    for verdict in (0, 1):
        monkeypatch.setattr(doctor, "run_doctor", lambda console, model, verdict=verdict: verdict)
        assert run("doctor").exit_code == verdict


def test_the_console_script_is_this_app() -> None:
    from importlib.metadata import entry_points

    [script] = [point for point in entry_points(group="console_scripts") if point.name == "longtail"]
    assert script.load() is app_module.main
