"""Model files in the authors' own forms, made into safetensors files: shards and pickles."""
