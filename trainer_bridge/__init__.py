"""The ZeroMQ bridge between the engine and a trainer. Nothing is here yet."""
