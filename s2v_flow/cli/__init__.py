"""The terminal: commands, their options, what they print."""
