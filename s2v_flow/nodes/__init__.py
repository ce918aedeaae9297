"""Node kinds: one class per kind. The only layer where the graph meets tensors; torch is imported inside run()."""
