"""Bounds on what a caller may ask for."""

MAX_ID_CHARS = 200
MAX_GROUP_SIZE = 65_536
MAX_TARGET_GROUPS = 1_048_576
