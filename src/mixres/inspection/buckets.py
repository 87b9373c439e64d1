"""What a trainer with aspect-ratio buckets would make of the same targets: what it crops, enlarges and leaves out.

Promise: one stated rule, the common one, taken at its kindest: buckets by target alone, the best-fitting bucket, the
largest crop that fits it, nothing thrown out for its aspect. Cost: one pass over sizes.

The rule. Buckets: for each width that is a multiple of `STEP`, the largest height that is one and keeps width x height
within `max_pixels`, and the same with width and height exchanged, no bucket longer than `MAX_ASPECT` to 1. This is
how NovelAI described it in 2022 and what `make_bucket_resolutions` of kohya's sd-scripts does but for its bounds on
sides. An image goes to the bucket that is nearest in log(width / height), is scaled to cover it and cropped at the
centre. Batches are of one bucket; the rest of a bucket that does not fill a batch is dropped in each epoch
(`drop_last`; OneTrainer and diffusers' examples do so). Trainers that keep the rest drop nothing and make steps of
fewer samples: `mean_batch`.
"""

import math
from collections import Counter
from collections.abc import Sequence

from mixres.geometry import Size

STEP = 64
MAX_ASPECT = 4.0


def bucketing(targets: Sequence[Size], *, samples_per_step: int, max_pixels: int) -> dict[str, float]:
    """Counts of images, and fractions of 1; `targets` are the sizes of the files, at least one."""
    shapes = bucket_shapes(max_pixels)
    pairs = [(size, nearest(size, shapes)) for size in targets]
    losses = [crop_loss(size, bucket) for size, bucket in pairs]
    counts = Counter(bucket for _, bucket in pairs).values()
    dropped = sum(count % samples_per_step for count in counts)
    return {
        "buckets": len(counts),  # that hold an image
        "cropped": sum(loss > 0 for loss in losses),  # images that lose a pixel row or column
        "cropped_most": max(losses),  # fraction of its area that the worst of them loses
        "cropped_mean": sum(losses) / len(losses),  # over all images
        "enlarged": sum(bucket.width > size.width or bucket.height > size.height for size, bucket in pairs),
        "dropped": dropped,  # in each epoch
        "dropped_share": dropped / len(targets),
        "steps_per_epoch": sum(count // samples_per_step for count in counts),
        "mean_batch": len(targets) / sum(-(-count // samples_per_step) for count in counts),
    }


def bucket_shapes(max_pixels: int) -> list[Size]:
    """All buckets; one of `STEP` x `STEP` where no other fits."""
    shapes = {Size(STEP, STEP)} if max_pixels < 2 * STEP**2 else set[Size]()
    for width in range(STEP, max_pixels // STEP + 1, STEP):
        height = max_pixels // width // STEP * STEP
        if height and max(width, height) <= MAX_ASPECT * min(width, height):
            shapes |= {Size(width, height), Size(height, width)}
    return sorted(shapes)


def nearest(size: Size, shapes: Sequence[Size]) -> Size:
    """The bucket nearest in log(width / height); of several the largest."""

    def distance(shape: Size) -> tuple[float, int]:
        apart = abs(math.log(shape.width * size.height / (shape.height * size.width)))
        return round(apart, 9), -shape.width * shape.height

    return min(shapes, key=distance)


def crop_loss(size: Size, bucket: Size) -> float:
    """Fraction of the image's area that is cut off where it is scaled to cover `bucket`."""
    ratio = (size.width * bucket.height) / (size.height * bucket.width)
    return 1 - min(ratio, 1 / ratio)
