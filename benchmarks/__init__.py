"""Speed, measured: `python -m benchmarks`, and on a machine with a GPU `python -m benchmarks.gpu`."""
