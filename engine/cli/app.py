"""The `longtail` command: options in, exit code out.

Each command checks its options and hands over; what needs vLLM or torch is imported when a command has got that far,
so that help and errors come at once.
"""

from __future__ import annotations

import atexit
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console

from longtail.engine.cli.options import (
    DEFAULT_MODEL,
    BridgeOptions,
    CarryOptions,
    CommonOptions,
    CoreOption,
    DemoOptions,
    EngineOptions,
    ModelOptions,
    RoundOptions,
    RuntimeOptions,
    SamplingOptions,
    ServerOptions,
    command,
    engine_config,
    engine_fields,
)
from longtail.engine.errors import InvalidInputError
from longtail.engine.server.settings import ServerConfig

app = typer.Typer(
    help="Rollouts of language models for reinforcement learning, on vLLM whose scheduler ends a round itself.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> NoReturn:
    """Entry point of the console script."""
    code: object = 0
    try:
        app(prog_name="longtail")
    except SystemExit as end:
        code = end.code
    if "vllm" not in sys.modules:
        sys.exit(code if isinstance(code, int) else 1)
    # The end of an interpreter with vLLM in it takes seconds, in which its libraries complain of each other.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"longtail {metadata.version('longtail')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
@command
def rollout(
    round_options: RoundOptions,
    model: ModelOptions,
    sampling: SamplingOptions,
    engine: EngineOptions,
    runtime: RuntimeOptions,
    common: CommonOptions,
    core: CoreOption = None,
    out: Annotated[
        Path | None, typer.Option(help="File for the trajectories, one JSON object a line.", rich_help_panel="Files")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that file.", rich_help_panel="Files")] = False,
    report: Annotated[
        Path | None, typer.Option(help="File for a web page about the round.", rich_help_panel="Files")
    ] = None,
    continue_: Annotated[
        Path | None,
        typer.Option("--continue", help="Run what this file lacks; needs no other option.", rich_help_panel="Files"),
    ] = None,
) -> None:
    """Generate groups of answers until enough groups are complete; write each answer to a file as it ends.

    A run that was stopped is completed with: longtail rollout --continue FILE
    """
    from longtail.engine.cli.rollout import check_files, run_rollout
    from longtail.engine.cli.rollout_request import continued_request, new_request

    if (out is None) == (continue_ is None):
        raise InvalidInputError(
            "out", "exactly one of --out FILE and --continue FILE", None if out is None else str(out)
        )
    fields = engine_fields(engine, runtime, core)
    if continue_ is not None:
        if overwrite:
            raise InvalidInputError("overwrite", "not with --continue", overwrite)
        check_files(continue_, report, overwrite=True)
        request = continued_request(continue_, round_options, model.model, sampling.given(), fields)
        if request is None:
            Console().print(f"{continue_} is complete: nothing to run", soft_wrap=True, highlight=False, markup=False)
            return
    else:
        assert out is not None
        request = new_request(out, round_options, model.model, sampling.given(), fields)
        check_files(out, report, overwrite=overwrite)
    run_rollout(request, report, overwrite=overwrite, verbose=common.verbose)


@app.command()
@command
def serve(
    server: ServerOptions,
    bridge: BridgeOptions,
    carry: CarryOptions,
    model: ModelOptions,
    engine: EngineOptions,
    runtime: RuntimeOptions,
    common: CommonOptions,
    core: CoreOption = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="LONGTAIL_API_KEY",
            show_envvar=True,
            help="Key that every route needs that does more than say how the server is.",
            rich_help_panel="Server",
        ),
    ] = None,
) -> None:
    """Serve a model: vLLM's OpenAI-compatible API, and rounds at POST /v1/rollouts; or with --bridge a trainer."""
    from longtail.engine.cli.bridge import check_options, serve_bridge
    from longtail.engine.cli.engine_output import longtail_log_on, quiet_vllm
    from longtail.engine.cli.model import make_ready
    from longtail.engine.server.serve import serve as run_server

    console = Console(stderr=True)
    check_options(bridge, carry, server.given())
    fields = engine_fields(engine, runtime, core)
    if not common.verbose:
        fields["vllm_args"] = quiet_vllm() | fields.get("vllm_args", {})
    if bridge.bridge is not None:
        serve_bridge(model.model or DEFAULT_MODEL, fields, bridge, carry, console)
        return
    config = engine_config(model.model or DEFAULT_MODEL, fields)
    ServerConfig(api_key=api_key, **server.given())
    make_ready(config.model, "float32", console)
    with longtail_log_on(console):
        run_server(config, api_key=api_key, **server.given())


@app.command()
@command
def keys(
    common: CommonOptions,
    folder: Annotated[Path, typer.Argument(help="Folder for the keys; made when there is none.")],
    client: Annotated[list[str] | None, typer.Option(help="Name of a client. Repeatable. Default: client.")] = None,
) -> None:
    """Make CURVE keys for a bridge: a pair for the service, and one for each client."""
    from longtail.engine.cli.keys import write_keys

    write_keys(folder, client or ["client"], Console())


@app.command("train-demo")
@command
def train_demo(
    demo: DemoOptions,
    common: CommonOptions,
    out: Annotated[Path, typer.Option(help="Folder for what the run leaves.", rich_help_panel="Files")] = Path(
        "runs/train-demo"
    ),
    report: Annotated[Path, typer.Option(help="File for a web page about the run.", rich_help_panel="Files")] = Path(
        "report.html"
    ),
) -> None:
    """Watch a small model learn: an engine and a trainer, two processes that speak over the bridge."""
    from longtail.engine.cli.rollout import check_files
    from longtail.trainer_bridge.demo.run import STEPS_FILE, DemoSettings, run_demo

    check_files(out / STEPS_FILE, report, overwrite=True)
    run_demo(DemoSettings(**demo.given()), out, report, Console())


@app.command()
@command
def model(
    common: CommonOptions,
    name: Annotated[str, typer.Argument(help="smollm2, or a checkpoint folder to check.")],
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of the stored weights of smollm2.")
    ] = "float32",
    verify: Annotated[bool, typer.Option("--verify", help="Check the checksum of every file.")] = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build anew, whatever is there.")] = False,
) -> None:
    """Make a model ready to use, and print its folder."""
    from longtail.engine.cli.model import make_ready

    folder = make_ready(name, dtype, Console(stderr=True), verify=verify, rebuild=rebuild)
    print(folder)


@app.command()
@command
def doctor(
    common: CommonOptions,
    model: Annotated[str | None, typer.Option(help="Start an engine with this model and look at it, too.")] = None,
) -> None:
    """Check the installation: versions, platform, and every change that longtail makes to vLLM."""
    from longtail.engine.doctor import run_doctor

    raise typer.Exit(run_doctor(Console(), model))
