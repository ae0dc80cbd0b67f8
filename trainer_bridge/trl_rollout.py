"""A `rollout_func` for TRL's unmodified `GRPOTrainer`: longtail completes the prompts, and gets the weights.

    with LongtailRollout("tcp://127.0.0.1:5555") as rollout:
        trainer = GRPOTrainer(..., args=GRPOConfig(use_vllm=False, ...), rollout_func=rollout)
        trainer.train()

Each call is one round. The weights are pushed before it when they have changed since the last one, so that every round
begins on the policy that the trainer has, and TRL gets the log-probabilities that the tokens were sampled with. TRL
weighs its loss by the ratio to its own (`vllm_importance_sampling_correction`, on by default), which TRL otherwise does
for its own vLLM only; for this the trainer's attribute `use_vllm` is set at the first call.

A round answers every prompt that TRL asks for. With `carry=True` it carries over instead, see `trl_partial.py`. One
process only. Imports neither TRL nor torch: they come with the trainer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from longtail.engine.config import SamplingConfig
from longtail.engine.prompts import Prompt
from longtail.engine.trajectory import Group, Round, Trajectory
from longtail.trainer_bridge.errors import BridgeError, InvalidInputError
from longtail.trainer_bridge.trl_partial import (
    PROMPTS,
    EndlessPrompts,
    RewardOfPrompts,
    check_partial,
    reward_of_prompts,
)
from longtail.trainer_bridge.trl_settings import (
    check_trainer,
    check_trl,
    correct_for_sampling,
    sampling_of,
    token_ids_of,
)
from longtail.trainer_bridge.weights.checkpoint_tensors import checkpoint_tensors

#: The column in which the reward functions get the `Trajectory` of each completion.
TRAJECTORY = "trajectory"


class Service(Protocol):
    """What is used of a `BridgeClient`."""

    @property
    def address(self) -> str: ...
    @property
    def weight_version(self) -> int: ...
    @property
    def weights_needed(self) -> int | None: ...
    def rollout(
        self,
        prompts: Any,
        *,
        group_size: int,
        target_groups: int | None,
        over_provision: float | None,
        sampling: SamplingConfig,
        carry: bool,
        timeout_s: float | None,
    ) -> Round: ...
    def push_weights(
        self,
        named_tensors: Iterable[tuple[str, Any]],
        version: int,
        *,
        delta: bool | Literal["auto"],
        transport: Literal["auto", "zmq", "shm"],
        timeout_s: float | None,
    ) -> Any: ...
    def ack(self) -> None: ...
    def close(self) -> None: ...


class LongtailRollout:
    """Give it to one `GRPOTrainer` as `rollout_func`. Use it as a context manager around `train()`.

    Completions are sampled as the trainer's own generation would: `temperature`, `max_completion_length` and the end
    tokens are the trainer's. The reward functions get one more column, `trajectory`: the `Trajectory` of each
    completion, with its weight versions, finish reason and reward of longtail's hooks.

    Args:
        service: address of a bridge service, or a client of one, which stays open (for keys, other timeouts).
        carry: let the rounds of the training carry over; the engine must be set to (`CarryConfig`), and every reward
            function wrapped by `reward`.
        over_provision: with `carry`, groups in flight as a multiple of those that TRL asks for.
        stop: strings that end a completion, besides the end tokens.
        seed: of the sampling, the same numbers for equal runs; `None` draws from the engine's stream.
        named_tensors: gives a model's weights under the checkpoint's names and in its dtypes.
        delta: push only what changed, see `BridgeClient.push_weights`.
        transport: of the weights.
        timeout_s: bound on one round, and on one push.

    Attributes:
        last_round: the round of the last call.
        last_push: the report of the last push.

    Raises:
        ModuleNotFoundError: TRL is not installed.
        InvalidInputError: an argument is wrong; at the first call, a setting of the trainer that longtail can't follow.

    """

    def __init__(
        self,
        service: str | Service,
        *,
        carry: bool = False,
        over_provision: float | None = None,
        stop: Sequence[str] = (),
        seed: int | None = None,
        named_tensors: Callable[[Any], Iterable[tuple[str, Any]]] = checkpoint_tensors,
        delta: bool | Literal["auto"] = False,
        transport: Literal["auto", "zmq", "shm"] = "auto",
        timeout_s: float = 600.0,
    ) -> None:
        check_trl()
        if carry != (over_provision is not None):
            expected = "a number with carry=True" if carry else "None without carry=True: every prompt is answered"
            raise InvalidInputError("over_provision", expected, over_provision)
        SamplingConfig(stop=tuple(stop), seed=seed)  # refuses what is wrong with them
        self.last_round: Round | None = None
        self.last_push: Any = None
        self._carry = carry
        self._over_provision = over_provision
        self._stop = tuple(stop)
        self._seed = seed
        self._named_tensors = named_tensors
        self._push_options: dict[str, Any] = {"delta": delta, "transport": transport, "timeout_s": timeout_s}
        self._timeout_s = timeout_s
        self._trainer: Any = None
        self._prompts: EndlessPrompts | None = None
        self._pushed_at: tuple[int, bool] | None = None
        self._version = -1
        self._version_of_step_0 = 0
        self._serials = itertools.count()
        self._owns_client = isinstance(service, str)
        self._client: Service = _connect(service, timeout_s) if isinstance(service, str) else service

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None and self.last_round is not None:
                self._client.ack()
        finally:
            self.close()

    def close(self) -> None:
        """Close the connection, unless it was given."""
        if self._owns_client:
            self._client.close()

    def reward(self, function: Callable[..., Any]) -> RewardOfPrompts:
        """A reward function for rounds that carry over: `reward_funcs=[rollout.reward(function)]`.

        It gets the prompts and the columns that its completions belong to.
        """
        return reward_of_prompts(function, self)

    def weights_changed(self) -> None:
        """Push before the next round even if no optimiser step was made; for weights that were changed by hand."""
        self._pushed_at = None

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Complete prompts, each of which comes `num_generations` times in a row.

        Returns:
            Lists with one entry a completion, by TRL's names: `prompt_ids`, `completion_ids` (with the end token),
            `logprobs`, `trajectory`, `env_mask` where a token must not be trained on, and with `carry` the columns of
            the data set.

        Raises:
            InvalidInputError: a setting of the trainer that longtail can't follow.
            WeightsPushError: the push was refused, for instance because of a name that the checkpoint does not have.
            BridgeError: the service is gone or a bounded wait ran out; a group was not completed.

        """
        if trainer is not self._trainer:
            self._adopt(trainer)
        if self.last_round is not None:
            self._client.ack()  # TRL asks for more when it has done with the last
        self._push_if_changed(trainer)
        training = bool(trainer.model.training)
        group_size = trainer.num_generations if training else trainer.num_generations_eval
        if self._prompts is not None and training:
            return self._carried(self._prompts, len(prompts) // group_size, group_size)
        return self._answers(prompts, group_size)

    def _adopt(self, trainer: Any) -> None:
        check_trainer(trainer, stop=self._stop, own_field=TRAJECTORY)
        if self._carry:
            check_partial(trainer, self)
            self._prompts = EndlessPrompts(trainer)
        correct_for_sampling(trainer)
        self._trainer = trainer
        self._pushed_at = None

    def _push_if_changed(self, trainer: Any) -> None:
        # After the training the best checkpoint may have been loaded: that is another state at the same step.
        step = trainer.state.global_step
        if (now := (step, trainer.is_in_train)) == self._pushed_at:
            return
        lowest = max(self._client.weight_version, self._version) + 1
        version = max(self._version_of_step_0 + step, lowest, self._client.weights_needed or 0)
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        self.last_push = self._client.push_weights(self._named_tensors(model), version, **self._push_options)
        self._version, self._version_of_step_0 = version, version - step
        self._pushed_at = now

    def _answers(self, prompts: list[Any], group_size: int) -> dict[str, Any]:
        """A round of the prompts that TRL asks for."""
        starts = range(0, len(prompts), group_size)
        for start in starts:
            if any(prompt != prompts[start] for prompt in prompts[start : start + group_size]):
                raise InvalidInputError(f"prompts[{start}]", f"the same prompt {group_size} times", prompts[start])
        token_ids = token_ids_of([prompts[start] for start in starts], self._trainer)
        asked = {str(i): ids for i, ids in enumerate(token_ids)}
        num_numbers = len(asked) * group_size
        seed = None if self._seed is None else self._seed + next(self._serials) * num_numbers
        round_ = self._client.rollout(
            [Prompt(token_ids=ids, group_id=group_id) for group_id, ids in asked.items()],
            group_size=group_size,
            target_groups=len(asked),
            over_provision=None,
            sampling=sampling_of(self._trainer, stop=self._stop, seed=seed),
            carry=False,
            timeout_s=self._timeout_s,
        )
        self.last_round = round_
        answered = {group.group_id: group for group in round_.complete_groups}
        if missing := sorted(asked.keys() - answered.keys()):
            raise BridgeError(self._client.address, _why(round_, missing))
        return self._as_trl([answered[group_id] for group_id in asked])

    def _carried(self, prompts: EndlessPrompts, num_groups: int, group_size: int) -> dict[str, Any]:
        """As many groups of a round that carries over, of whichever prompts."""
        round_ = self._client.rollout(
            prompts,
            group_size=group_size,
            target_groups=num_groups,
            over_provision=self._over_provision,
            sampling=sampling_of(self._trainer, stop=self._stop, seed=self._seed),
            carry=True,
            timeout_s=self._timeout_s,
        )
        self.last_round = round_
        if len(groups := round_.complete_groups) != num_groups:
            message = f"round {round_.round_id} has {len(groups)} complete groups, {num_groups} were asked for"
            raise BridgeError(self._client.address, message)
        answer = self._as_trl(groups)
        columns = prompts.columns_of(answer[TRAJECTORY])
        return {**columns, PROMPTS: columns.pop("prompt"), **answer}

    def _as_trl(self, groups: list[Group]) -> dict[str, Any]:
        trajectories: list[Trajectory] = [trajectory for group in groups for trajectory in group.trajectories]
        answer: dict[str, Any] = {
            "prompt_ids": [trajectory.prompt_token_ids for trajectory in trajectories],
            "completion_ids": [trajectory.output_token_ids for trajectory in trajectories],
            "logprobs": [trajectory.logprobs for trajectory in trajectories],
            TRAJECTORY: trajectories,
        }
        if not all(all(trajectory.loss_mask) for trajectory in trajectories):
            answer["env_mask"] = [trajectory.loss_mask for trajectory in trajectories]
        return answer


def _connect(address: str, timeout_s: float) -> Service:
    from longtail.trainer_bridge.client import BridgeClient

    client: Service = BridgeClient(address, consumer="trl", timeout_s=timeout_s)
    return client


def _why(round_: Round, missing: list[str]) -> str:
    """Names the first member that did not end by itself."""
    for group in round_.groups:
        for member in group.trajectories:
            if group.group_id in missing and not member.ended_by_itself:
                why = f"{member.finish_reason}: {member.stop_reason}"
                return f"prompt {group.group_id} of round {round_.round_id} was not completed ({why})"
    return f"round {round_.round_id} has nothing for prompts {', '.join(missing)}"
