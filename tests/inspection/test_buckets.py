"""The bucketing rule by hand: shapes, the bucket of a picture, what it loses, and what is dropped."""

import pytest

from mixres.geometry import Size
from mixres.inspection.buckets import bucket_shapes, bucketing, crop_loss, nearest

MEGAPIXEL = 1024 * 1024


def test_the_buckets_of_a_megapixel() -> None:
    shapes = bucket_shapes(MEGAPIXEL)
    assert {Size(1024, 1024), Size(1152, 896), Size(896, 1152), Size(2048, 512), Size(512, 2048)} <= set(shapes)
    for width, height in shapes:
        assert width % 64 == height % 64 == 0 and width * height <= MEGAPIXEL
        assert width <= 4 * height and Size(height, width) in shapes
    assert bucket_shapes(64 * 64) == bucket_shapes(100) == [Size(64, 64)]


PICTURES = {
    "camera": (Size(6000, 4000), Size(1216, 832), 1 - 1.4615 / 1.5),
    "panorama": (Size(8000, 1000), Size(2048, 512), 0.5),
    "phone": (Size(1080, 1920), Size(768, 1344), 1 - 0.5625 / (768 / 1344)),
}


@pytest.mark.parametrize(("size", "bucket", "loss"), PICTURES.values(), ids=PICTURES)
def test_a_picture_goes_to_the_nearest_aspect(size: Size, bucket: Size, loss: float) -> None:
    shapes = bucket_shapes(MEGAPIXEL)
    assert nearest(size, shapes) == bucket
    assert crop_loss(size, bucket) == pytest.approx(loss, abs=1e-4)


def test_what_does_not_fill_a_batch_is_dropped() -> None:
    targets = [Size(1000, 1000)] * 5 + [Size(1500, 1000)] * 4 + [Size(1000, 1500)] * 3
    found = bucketing(targets, samples_per_step=4, max_pixels=MEGAPIXEL)
    assert (found["buckets"], found["dropped"], found["steps_per_epoch"]) == (3, 4, 2)
    assert found["dropped_share"] == pytest.approx(4 / 12)
    assert found["mean_batch"] == 12 / 4
    assert (found["cropped"], found["enlarged"]) == (7, 5)
    assert found["cropped_mean"] == pytest.approx(7 * found["cropped_most"] / 12)
