"""Recipes: from YAML text to a checked graph of nodes. No torch."""
