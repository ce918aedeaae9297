"""ComfyUI's workflow files <-> recipes. Nothing here imports torch."""
