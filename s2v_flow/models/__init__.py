"""The networks of Wan2.2-S2V and what it takes to load them.

Nothing is imported here, so that `--help` and `plan` start without torch.

One legend for every tensor of the package, in this order unless a line says otherwise:

    B   batch                              T      pixel frames; 16 a second
    C   latent channels, 16                8H 8W  pixel rows and columns
    F   latent frames; T = 4 (F - 1) + 1   L      tokens; video tokens come first
    H   latent rows                        S      text tokens
    W   latent columns                     D      width of the model
    N   heads                              A      layers of audio features, 25
    K   width of a head, 128; D = N K      E      width of an audio feature
"""
