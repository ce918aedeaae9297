"""The page of `s2vflow ui`: a server on 127.0.0.1 and the files that a browser shows."""
