"""Features as many write it: OpenSlide, PIL, a DataLoader with two processes, a timm model. Nothing of ours in it.

    python naive_embed.py SLIDE tiles.npy ENCODER OUTPUT

``tiles.npy`` int64[n, 4]: x, y, width, height of each tile, level-0 px. Prints one JSON line: tiles, seconds from the
first tile asked for to the last feature in.
"""

import json
import sys
import time

import numpy as np
import openslide
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

SIZE = 256


class Tiles(Dataset):
    def __init__(self, path, boxes, transform):
        self.path, self.boxes, self.transform, self.slide = path, boxes, transform, None

    def __len__(self):
        return len(self.boxes)

    def __getitem__(self, i):
        if self.slide is None:
            self.slide = openslide.OpenSlide(self.path)
        x, y, width, height = (int(v) for v in self.boxes[i])
        tile = self.slide.read_region((x, y), 0, (width, height)).convert("RGB")
        return self.transform(tile.resize((SIZE, SIZE), Image.BILINEAR))


def main():
    path, tiles, encoder, output = sys.argv[1:]
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )
    model = timm.create_model(encoder, pretrained=False, num_classes=0).eval()
    loader = DataLoader(Tiles(path, np.load(tiles), transform), batch_size=64, num_workers=2)
    begin = time.perf_counter()
    with torch.inference_mode():
        features = torch.cat([model(batch) for batch in loader]).numpy()
    seconds = time.perf_counter() - begin
    np.save(output, features)
    print(json.dumps({"tiles": len(features), "seconds": seconds}))


if __name__ == "__main__":
    main()
