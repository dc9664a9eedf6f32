"""Random layers for as long as one wants: `python -m tests.soak --help`."""
