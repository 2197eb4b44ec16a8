"""`synth`: small archives in the shape of ImageNet."""

from __future__ import annotations

import argparse
import time

from imagenet_unpack.cli import streams
from imagenet_unpack.dataset import ilsvrc2012, kinds, synth
from imagenet_unpack.errors import ExitCode, UsageError
from imagenet_unpack.text import human_time


def run(args: argparse.Namespace) -> int:
    """Write the archives and label files."""
    if args.classes > len(ilsvrc2012.WNIDS):
        raise UsageError(f"--classes {args.classes}: there are only {len(ilsvrc2012.WNIDS)} classes")
    spec = synth.SynthSpec(
        classes=args.classes,
        images_per_class=None if args.real_counts else args.images,
        val_images=args.val_images,
        test_images=args.test_images,
        seed=args.seed,
        mean_bytes=args.mean_bytes,
        tar_format=args.format,
        bodies=args.bodies,
        label_files=not args.no_labels,
    )
    synth.write_files(args.folder, kinds.files_of(args.kind, spec))
    streams.emit(f"wrote {args.folder} in {human_time(time.monotonic() - args.began_s)}")
    return ExitCode.OK
