"""What trees in the scheduler lean on: the sources that they were written against.

No class of vLLM is changed. `longtail.scheduler.trees` gives requests that were never scheduled their first output
tokens, puts them, and paths of synchronous trees that it had preempted, in front of the queue, and takes the latter out
of it.
"""

from __future__ import annotations

from longtail.engine.patches.entry import Entry, Source

_SCHEDULER = "vllm.v1.core.sched.scheduler"
_QUEUE = "vllm.v1.core.sched.request_queue"
_UTILS = "vllm.v1.core.sched.utils"

ENTRY = Entry(
    name="trees",
    what="Members of a tree are held until they are branches of another one, and are first in line then.",
    why="vLLM has no request that begins with the tokens and the KV of another one.",
    upstream=(),
    versions=("0.32.0",),
    where="everywhere",
    changes=(),
    relies_on=(
        Source(_SCHEDULER, "Scheduler.add_request", "2fd9eefbdf572e52"),
        Source(_SCHEDULER, "Scheduler.finish_requests", "fd01cf8d16821cd7"),
        Source(_SCHEDULER, "Scheduler._preempt_request", "3c74a6f3e8b7d175"),
        Source("vllm.v1.core.sched.async_scheduler", "AsyncScheduler", "bae3a2b6a1870d22"),
        Source(_QUEUE, "FCFSRequestQueue", "537af785a93e3031"),
        Source(_QUEUE, "PriorityRequestQueue", "fdc4b9a22cc08388"),
        Source("vllm.v1.request", "Request", "6d8b5d6f85ab7af8"),
        Source(_UTILS, "check_stop", "332298324e7691fe"),
        Source(_UTILS, "check_sequence_repetition", "1fb9974da706e449"),
    ),
)
