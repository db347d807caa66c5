"""Tables 2 and 3 of the paper at small scale; `python -m benchmarks.reproduction` runs all of it."""
