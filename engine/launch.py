"""Start one vLLM engine from an `EngineConfig`, check that the patch ledger is in everywhere, and stop it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from longtail.engine.config import EngineConfig
from longtail.engine.core_link import CoreLink
from longtail.engine.models import resolve_model
from longtail.engine.patches import ledger
from longtail.engine.prompts import PromptLimits, Tokenizer
from longtail.engine.runtime import CpuRuntime, describe
from longtail.engine.startup import fast_start
from longtail.engine.weights import declare_first_version

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine


@dataclass(frozen=True, slots=True)
class StartedEngine:
    """A running engine and what its facade needs of it."""

    llm_engine: LLMEngine
    link: CoreLink
    tokenizer: Tokenizer | None
    limits: PromptLimits
    model_dir: Path
    runtime: CpuRuntime

    def shutdown(self) -> None:
        """Stop the core and give back its memory; an inline core also leaves torch's process group."""
        self.link.close()
        self.llm_engine.engine_core.shutdown()
        self.link.join()
        if self.link.is_inline:
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()


@contextmanager
def prepared_process(config: EngineConfig, model_dir: Path) -> Iterator[CpuRuntime]:
    """The block in which vLLM is imported, configured and its core started; says on the log how the CPU is used.

    Raises:
        PatchLedgerError: the installed vLLM is not the ledger's.

    """
    ledger.preflight()
    with fast_start(config, model_dir) as runtime:
        _log_visibly(describe(runtime))
        yield runtime


def _log_visibly(line: str) -> None:
    """To the log `longtail`; to stderr when nobody has set up logging, as vLLM does with its own."""
    logger = logging.getLogger("longtail")
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
    logger.info(line)


def start_engine(config: EngineConfig) -> StartedEngine:
    """Load the model and start the engine core, inline or in its own process.

    Raises:
        ModelSourceError: the checkpoint is missing or incomplete.
        InvalidInputError: vLLM refuses the configuration.
        PatchLedgerError: a process runs without the patch ledger.

    """
    model_dir = resolve_model(config.model)
    with prepared_process(config, model_dir) as runtime:
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.executor.abstract import Executor

        from longtail.engine.vllm_args import build_vllm_config

        vllm_config = build_vllm_config(config, model_dir)
        llm_engine = LLMEngine(
            vllm_config=vllm_config,
            executor_class=Executor.get_class(vllm_config),
            log_stats=False,
            multiprocess_mode=config.core == "process",
        )
    model_config = vllm_config.model_config
    started = StartedEngine(
        llm_engine=llm_engine,
        link=CoreLink(llm_engine.engine_core),
        tokenizer=cast("Tokenizer | None", llm_engine.tokenizer),
        limits=PromptLimits(model_config.get_vocab_size(), model_config.max_model_len),
        model_dir=model_dir,
        runtime=runtime,
    )
    try:
        ledger.verify_engine(started.link.call)
        declare_first_version(started.link, config.weight_version)
    except BaseException:
        started.shutdown()
        raise
    return started
