"""How the demo's models were trained: drawn characters, a VAE that draws them, a DiT that makes them talk."""
