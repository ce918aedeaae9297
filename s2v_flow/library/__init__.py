"""Model files: which ones a recipe needs, where they lie, where they come from."""
