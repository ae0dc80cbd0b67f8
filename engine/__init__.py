"""The rollout engine: facade, trajectory types, patch ledger, server and command line."""
