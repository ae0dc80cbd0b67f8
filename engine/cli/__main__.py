"""`python -m longtail.engine.cli` is the `longtail` command."""

from longtail.engine.cli.app import main

if __name__ == "__main__":
    main()
