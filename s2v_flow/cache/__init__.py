"""Artifacts on disk. Knows bytes, digests and files; neither tensors nor nodes."""
