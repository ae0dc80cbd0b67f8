"""vLLM's OpenAI-compatible server with longtail's scheduler, its rollout routes, and every route behind the API key.

`serve.serve` starts it. `endpoint.LongtailEndpoints` is the plugin that adds routes, guard and metrics to vLLM's app;
the other modules are its parts. What a round is and how it is collected is `longtail.engine.rounds`, not here.
"""
