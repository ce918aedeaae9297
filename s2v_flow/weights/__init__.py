"""Weight files: headers, shards, tensors as streams; no nets."""
