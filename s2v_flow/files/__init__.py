"""Files: written whole or not at all, locked, and what is remembered of their content."""
