"""s2vflow: talking videos with Wan2.2-S2V from a YAML recipe."""

__version__ = "0.1.0"
