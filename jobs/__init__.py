"""What a person runs: the `patchstream` command line and the same as Ray job entry points (`python -m jobs …`)."""
