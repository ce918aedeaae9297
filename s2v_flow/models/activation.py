"""How much memory the diffusion transformer computes with: plain arithmetic, without torch."""

from __future__ import annotations


def activation_bytes(dim: int, ffn_dim: int, num_tokens: int, num_branches: int, item_bytes: int) -> int:
    """Count what a block's computation holds at its fullest, without weights; attention never holds its scores.

    One float32 stream per branch; beside it, while keys are normalised, two float32 arrays (three where the dtype has
    fewer bits) and input, queries and keys in the dtype; in the feed-forward the input and two hidden layers.

    Args:
        dim: The model's width.
        ffn_dim: The width of the feed-forward's hidden layer.
        num_tokens: How many tokens are computed at once.
        num_branches: For how many branches of guidance.
        item_bytes: The size of a number in the dtype that is computed in.
    """
    widened = 4 if item_bytes < 4 else 0  # a float32 copy where the dtype has fewer bits
    attention = dim * (8 + widened + 3 * item_bytes)
    feed_forward = dim * item_bytes + 2 * ffn_dim * item_bytes
    return num_tokens * (4 * dim * num_branches + max(attention, feed_forward))
