"""What a run leaves behind beside its results: a manifest, a note in the video, a lock, a stream of events."""
