"""The first recipe: a project's folder, recipes to begin with."""
