"""The small model for `euclid_task`: a Llama of 0.4 million parameters, trained from scratch in a minute or two.

`warm_up` imitates a pupil who forgets borrows, so that the model answers a part of the problems and reinforcement
learning has something to mend. `base_model` keeps the result in the user's cache, as a checkpoint folder that vLLM
loads. Equal arguments give equal weights on one machine, and nearly equal ones elsewhere.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from longtail.engine.smollm2 import cache_root
from longtail.trainer_bridge.demo import euclid_task as task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM

MAX_MODEL_LEN = 512
#: Share of borrows that the demonstrations forget, and how many updates make the base model.
SLIP_RATE = 0.3
NUM_UPDATES = 700
#: Of reinforcement learning after it, by AdamW.
LEARNING_RATE = 2e-4

#: In the name of the cached folder: change it with anything that changes the weights.
_RECIPE = 1
_BATCH_TOKENS = 1500
_POOL = 600
_MATRIX_LEARNING_RATE, _MATRIX_MOMENTUM = 0.02, 0.95
_OTHER_LEARNING_RATE = 4e-3
_RAMP_UPDATES = 30

#: Called with the number of updates made, the number wanted, and the last loss.
WarmUpProgress = Callable[[int, int, float], None]


def base_model(seed: int = 0, num_updates: int = NUM_UPDATES, progress: WarmUpProgress | None = None) -> Path:
    """The checkpoint folder of the model after `warm_up`, made if the cache does not have it.

    The folder appears whole or not at all; of two processes that make it at once, one is late and wasted its time.
    """
    folder = cache_root() / "models" / f"euclid-{_RECIPE}-{seed}-{num_updates}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    model = new_model(seed)
    warm_up(model, num_updates, seed=seed, progress=progress)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write_checkpoint(model, temporary)
        temporary.chmod(0o755)
        temporary.rename(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not (isinstance(error, OSError) and folder.exists()):
            raise
    return folder


def new_model(seed: int = 0, hidden_size: int = 96, num_layers: int = 3) -> LlamaForCausalLM:
    """An untrained model in float32; `hidden_size` is a multiple of 32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=task.VOCAB_SIZE, hidden_size=hidden_size, intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers, num_attention_heads=hidden_size // 32, num_key_value_heads=hidden_size // 32,
        head_dim=32, max_position_embeddings=MAX_MODEL_LEN, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=task.EQUAL, pad_token_id=task.PAD, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).float()


def load_model(folder: Path) -> LlamaForCausalLM:
    """The model of a checkpoint folder, in float32, to be trained."""
    from transformers import LlamaForCausalLM

    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype="float32")
    return model


def write_checkpoint(model: LlamaForCausalLM, folder: Path) -> None:
    """Weights, configuration, and a tokenizer of one character a token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {task.CHARACTERS[i]: i for i in range(task.VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=task.CHARACTERS[task.PAD]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=task.CHARACTERS[task.EQUAL], pad_token=task.CHARACTERS[task.PAD]
    ).save_pretrained(folder)


def warm_up(
    model: LlamaForCausalLM, num_updates: int, *, seed: int = 0, progress: WarmUpProgress | None = None
) -> None:
    """Train the model on demonstrations in which `SLIP_RATE` of the borrows are forgotten.

    By Muon (Jordan et al. 2024), which needs half the updates of AdamW here; torch's own computes in bfloat16, which
    few CPUs are good at.
    """
    import torch
    from torch.nn.functional import cross_entropy

    inner = [parameter for name, parameter in model.named_parameters() if _is_inner_matrix(name, parameter)]
    others = [parameter for name, parameter in model.named_parameters() if not _is_inner_matrix(name, parameter)]
    momenta = [torch.zeros_like(parameter) for parameter in inner]
    optimizer = torch.optim.AdamW(others, lr=_OTHER_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    batches = _batches(seed)
    for update in range(1, num_updates + 1):
        schedule = min(1.0, update / _RAMP_UPDATES) * max(0.02, 1 - update / num_updates)
        token_ids = next(batches)
        labels = token_ids[:, 1:].clone()
        labels[:, : task.PROMPT_TOKENS - 1] = task.PAD
        logits = model(token_ids).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=task.PAD)
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = _OTHER_LEARNING_RATE * schedule
        optimizer.step()
        with torch.no_grad():
            for parameter, momentum in zip(inner, momenta, strict=True):
                assert parameter.grad is not None
                momentum.mul_(_MATRIX_MOMENTUM).add_(parameter.grad)
                direction = _orthogonal(parameter.grad + _MATRIX_MOMENTUM * momentum)
                scale = max(1.0, len(parameter) / parameter.shape[1]) ** 0.5
                parameter.add_(direction, alpha=-_MATRIX_LEARNING_RATE * schedule * scale)
        if progress is not None:
            progress(update, num_updates, loss.item())


def _is_inner_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.dim() == 2 and "embed" not in name and "lm_head" not in name


def _orthogonal(matrix: Tensor) -> Tensor:
    """Nearly the matrix with the same singular vectors and singular values of 1: Muon's Newton-Schulz iteration."""
    x: Tensor = matrix / (matrix.norm() + 1e-7)
    is_tall = len(x) > x.shape[1]
    x = x.T if is_tall else x
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if is_tall else x


def _batches(seed: int) -> Iterator[Tensor]:
    """Prompts with demonstrations, int64 [N, L], padded: about `_BATCH_TOKENS` tokens, of nearly equal length."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rng = random.Random(seed)
    drawn = task.problems(seed)
    while True:
        problems = [next(drawn) for _ in range(_POOL)]
        pool = sorted((task.demonstrated(problem, SLIP_RATE, rng) for problem in problems), key=len)
        batches: list[list[Tensor]] = [[]]
        for ids in pool:
            if batches[-1] and (len(batches[-1]) + 1) * len(ids) > _BATCH_TOKENS:
                batches.append([])
            batches[-1].append(torch.tensor(ids))
        rng.shuffle(batches)
        yield from (pad_sequence(batch, True, task.PAD) for batch in batches)
