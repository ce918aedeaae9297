"""Put what was learned into the package: `python -m training.export --state DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

from s2v_flow.demo.plan import FOLDER
from training import state

LARGEST = 5_000_000  # bytes of a file
NAMES = ("vae", "dit", "text", "hearing", "wav2vec2")


def main() -> None:
    """Write every file, in half precision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, default=state.DEFAULT)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    parts = {name: state.load_weights(options.state / f"{name}.safetensors") for name in NAMES}
    for name, weights in parts.items():
        path = options.folder / f"{name}.safetensors"
        state.save_weights(weights, path)
        path.chmod(0o644)
        print(f"{path.name} {path.stat().st_size / 1e6:.2f} MB")
        if path.stat().st_size > LARGEST:
            raise SystemExit(f"{path}: is larger than {LARGEST} bytes")


if __name__ == "__main__":
    main()
