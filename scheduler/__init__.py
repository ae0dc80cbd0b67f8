"""Policies of the rollout scheduler and the adapter that puts them into vLLM.

`rollout_scheduler`, `rollout_kv`, `kv_parking`, `parked_queue` and `stop_strings` are the adapter and need vLLM;
everything else here is pure.
"""
