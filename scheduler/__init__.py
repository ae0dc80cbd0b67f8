"""Policies of the rollout scheduler and the adapter that puts them into vLLM.

Import `longtail.scheduler.rollout_scheduler` only where vLLM is installed; everything else here is pure.
"""
