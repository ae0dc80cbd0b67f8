"""The engine's side of the bridge: deliveries, prompts, rounds and pushes for one trainer."""
