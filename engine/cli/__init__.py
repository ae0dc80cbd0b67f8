"""The `longtail` command line: its commands, the live display of a round, the table and the report at its end."""
