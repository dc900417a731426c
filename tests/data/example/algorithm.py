"""A small algorithm for the Grand Challenge inference API: read /input, write /output, exit."""

import json
import os
import sys
from pathlib import Path

# Set by `run` where /input and /output cannot be made; an algorithm on the platform needs neither.
INPUT = Path(os.environ.get("SHIM_INPUT_PATH", "/input"))
OUTPUT = Path(os.environ.get("SHIM_OUTPUT_PATH", "/output"))


def main() -> int:
    image = json.loads((INPUT / "image.json").read_text())
    print(f"Segmenting {image['name']} ({len(image['pixels'])} rows)")
    mask = [[int(value >= image["threshold"]) for value in row] for row in image["pixels"]]
    (OUTPUT / "images").mkdir(exist_ok=True)
    (OUTPUT / "images" / "mask.json").write_text(json.dumps(mask))
    area = sum(map(sum, mask))
    (OUTPUT / "results.json").write_text(json.dumps({"area": area}))
    if area == 0:
        print("Nothing was found: is the threshold too high?", file=sys.stderr)
    print(f"Wrote a mask with an area of {area} pixels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
