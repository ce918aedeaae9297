"""The demo: tiny models of the real architecture, a portrait and a spoken sentence."""
