"""Write the SHA-256 manifest of a backbone's tensors: python tools/make_manifest.py vgg16 FILE.

For whoever adds a backbone. FILE is one of its sources; check the values against an independent
publication before the manifest is committed, as `test_weights_are_the_published_ones` does for VGG16.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from chanscale.backbones import find_backbone
from chanscale.weight_files import read_tensors
from chanscale.weights import describe_tensor


def main(name: str, file: str) -> None:
    """Read FILE by the backbone's name table and write the manifest next to the code."""
    backbone = find_backbone(name)
    with torch.device("meta"):
        state = backbone.build().state_dict()
    # A norm also counts its batches, in an integer that nothing in eval reads.
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items() if tensor.is_floating_point()}
    tensors = read_tensors(Path(file), shapes, backbone.names, backbone.digests)
    entries = {key: dataclasses.asdict(describe_tensor(tensor)) for key, tensor in tensors.items()}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items())
    path = Path(__file__).parents[1] / "src" / "chanscale" / f"{name}_manifest.json"
    path.write_text(f'{{"backbone": {json.dumps(name)}, "tensors": {{\n{lines}\n}}}}\n', encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
