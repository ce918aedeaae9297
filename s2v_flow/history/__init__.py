"""Looking back: runs that were, how two of them differ, and whether a video can be made again."""
