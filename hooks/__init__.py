"""Training hooks: what an RL recipe plugs into the life of a rollout. Nothing is here yet."""
