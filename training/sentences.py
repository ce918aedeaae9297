"""Sentences that ask for an expression, or for none."""

from __future__ import annotations

import random

SUBJECTS = (
    "She", "He", "The woman", "The man", "The girl", "The boy", "The old man", "The singer", "A character", "The person",
    "The robot", "The character", "An old woman", "The teacher",
)  # fmt: skip
ASKED = (
    (  # smile
        "smiles", "is smiling", "smiles happily", "looks happy", "is happy", "speaks with a smile", "smiles warmly",
        "laughs", "is cheerful", "looks cheerful and smiles", "grins", "talks happily", "smiles at the camera",
        "gives a big smile", "looks joyful", "is smiling and talking",
    ),
    (  # surprise
        "looks surprised", "is surprised", "is amazed", "looks amazed", "raises her eyebrows in surprise", "is astonished",
        "speaks with surprise", "opens her eyes wide", "looks astonished", "seems surprised", "talks in surprise",
        "is very surprised", "raises his eyebrows", "looks startled",
    ),
    (  # anger
        "looks angry", "is angry", "frowns", "is furious", "speaks angrily", "is frowning", "looks furious", "scowls",
        "talks angrily", "seems angry", "frowns at the camera", "is very angry",
    ),
    (  # sadness
        "looks sad", "is sad", "speaks sadly", "is unhappy", "looks unhappy", "talks sadly", "seems sad", "is very sad",
        "sadly looks at the camera", "is sorrowful", "weeps",
    ),
)  # fmt: skip
PLAIN = (
    "speaks", "talks", "looks into the camera", "speaks calmly", "is talking", "looks into the camera and speaks calmly",
    "says a sentence", "is speaking", "sings", "reads the news", "tells a story", "is playing the guitar",
    "speaks to the camera", "faces the camera", "is calm", "sings gently", "looks at the camera",
)  # fmt: skip
ENDINGS = (
    "", "", "", "", "A drawing.", "The background is plain.", "Soft light.", "A portrait.", "The camera is still.",
    "In a studio.", "High quality.", "In front of a wall.", "A cartoon.",
)  # fmt: skip


def sentence(number: int, rng: random.Random) -> str:
    """Make a prompt for an expression: 0 for none, then smile, surprise, anger, sadness."""
    subject = rng.choice(SUBJECTS)
    parts = []
    if number == 0 or rng.random() < 0.4:
        parts.append(f"{subject} {rng.choice(PLAIN)}.")
    if number:
        asked = f"{rng.choice(SUBJECTS)} {rng.choice(ASKED[number - 1])}"
        parts.insert(rng.randrange(len(parts) + 1), asked + ".")
        if rng.random() < 0.15:
            parts = [f"{asked} and {rng.choice(PLAIN)}."]
    if number == 0 and rng.random() < 0.05:
        return ""
    parts.append(rng.choice(ENDINGS))
    text = " ".join(part for part in parts if part)
    return text.lower() if rng.random() < 0.05 else text
