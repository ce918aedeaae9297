"""Many jobs: planned and checked together, written down, and run by processes that keep their models loaded."""
