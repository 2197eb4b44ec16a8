"""Train a small network for an epoch on a tree that unpack wrote: python docs/examples/train.py demo/ImageNet."""

from __future__ import annotations

import sys

import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from imagenet_unpack import ImageNet

CLASSES = 1000


def main(target: str) -> None:
    transform = v2.Compose([v2.Resize((32, 32)), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    train = ImageNet(target, "train", transform=transform)
    val = ImageNet(target, "val", transform=transform)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, stride=2), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(32 * 16, CLASSES),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)

    for batch, (images, class_indices) in enumerate(DataLoader(train, batch_size=16, shuffle=True, num_workers=2)):
        loss = torch.nn.functional.cross_entropy(model(images), class_indices)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if batch % 10 == 0:
            print(f"batch {batch}: loss {loss.item():.2f}")

    right = 0
    with torch.no_grad():
        for images, class_indices in DataLoader(val, batch_size=64, num_workers=2):
            right += int((model(images).argmax(dim=1) == class_indices).sum())
    print(f"validation: {right / len(val):.0%} right")


if __name__ == "__main__":
    main(sys.argv[1])
