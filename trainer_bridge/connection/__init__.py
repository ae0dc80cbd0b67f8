"""The client's side: one thread owns the socket; calls, rounds and pushes go through it. Users import `client.py`."""
