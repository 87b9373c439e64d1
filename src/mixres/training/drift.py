"""How far a made image is shifted and stretched against the image that it should lie on.

Promise: known shifts and scales of photographs are found within 0.25 px and 0.2 % where both sides have 96 px or more,
up to 8 % of a side and 10 % of stretch; changed regions and colours, noise, blur and JPEG are no drift. The same images
give the same numbers. What is too flat, too small or too unlike to be measured has no drift: None, never a guess.
Bounds: scales are up to 0.7 % wrong at 64 px. At 96 to 250 px, crops with little detail under strong noise or blur are
up to 0.8 % wrong, 1 in 60 of random crops and edits; 1 in 25 has no drift.
Cost: 0.2 to 0.8 s of one core; images are worked on at 384 x 384 px of area at the most, so larger ones cost no more.

Method: the images are compared in overlapping windows. Phase correlation gives each window's shift, and a robust fit
dx = x + a * (column - centre), dy = y + b * (row - centre) discards windows of changed regions. The reference is moved
by the fit and compared again, until nothing is left. A search over coarse scales, at low resolution, is the start.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mixres.data.images import on_background

NOT_INSTALLED = "drift is not measured, since scikit-image is not installed: pip install 'mixres[demo]'"
MIN_SIDE = 48  # pixels: below, too few windows fit
_AREA, _START_AREA = 384**2, 96**2  # pixels that the windows and the start work on
_START_SCALES = np.linspace(-0.1, 0.1, 9)
_WINDOW = 24, 64  # pixels, least and most; a quarter of the shorter side in between
_ROUNDS = 8
_DONE = 0.02  # pixels at an edge that the last round moves
_UPSAMPLING = 50  # a window's shift is read off to 1/50 px
_FLAT = 1.0  # grey levels, standard deviation of what has no structure
_STRIPES = 0.01  # of the common structure along one side, against the other, where there is none to measure
_MIN_INLIERS = 0.35  # of the windows, weighted
_MAX_ERROR = 0.0015, 0.2  # standard errors of scale and shift (px) that are still a measurement

_Pixels = NDArray[np.float64]
_Pair = NDArray[np.float64]  # of x and y


class Drift(NamedTuple):
    """Where the content of a reference lies in a made image."""

    x: float  # pixels of the made image at its centre, to the right
    y: float  # the same, downwards
    scale_x: float  # % by which the content is wider than in the reference; 0: the same size
    scale_y: float  # the same for its height

    @property
    def shift_px(self) -> float:
        """Length of the shift, in pixels of the made image."""
        return math.hypot(self.x, self.y)

    @property
    def scale_pct(self) -> float:
        """The larger of both scales by magnitude, signed, in %."""
        return max(self.scale_x, self.scale_y, key=abs)

    def __str__(self) -> str:
        return f"shift {self.shift_px:.1f} px, scale {self.scale_pct:+.1f} %"


class _Fit(NamedTuple):
    shift: float  # pixels
    scale: float  # fraction
    inliers: float  # weighted fraction of the windows
    shift_error: float  # standard errors
    scale_error: float


def is_installed() -> bool:
    """Whether the library that measures is there; otherwise `NOT_INSTALLED` is what to tell, once."""
    return find_spec("skimage") is not None


def drift_line(drifts: Sequence[Drift | None]) -> dict[str, float]:
    """Means over the images that could be measured, for `metrics.jsonl`; nothing where none could."""
    found = [drift for drift in drifts if drift]
    if not found:
        return {}
    scale = statistics.fmean(abs(drift.scale_pct) for drift in found)
    return {"eval/drift_px": statistics.fmean(drift.shift_px for drift in found), "eval/scale_pct": scale}


def measure_drift(made: Image.Image, reference: Image.Image) -> Drift | None:
    """The drift of `made` against `reference`, which is resized to its size as training does: nothing is cropped.

    What is transparent counts as white: colours under it are not seen.

    None where it cannot be measured: a side under `MIN_SIDE`, no structure (stripes have it along one side only),
    nothing in common, or no scikit-image.
    """
    if not is_installed() or min(made.size) < MIN_SIDE:
        return None
    made, reference = on_background(made), on_background(reference).resize(made.size, Image.Resampling.LANCZOS)
    a, b = _grey(made, _AREA), _grey(reference, _AREA)
    if min(a.std(), b.std()) < _FLAT:
        return None
    size = np.array(a.shape[::-1], float)
    shift, scale = _start(_grey(made, _START_AREA), _grey(reference, _START_AREA))
    found = _refine(a, b, shift * size, scale)
    if found is None:
        return None
    (x, y), (scale_x, scale_y) = found[0] * made.size / size, found[1] * 100
    return Drift(float(x), float(y), float(scale_x), float(scale_y))


def _grey(image: Image.Image, area: int) -> _Pixels:
    """The mean of red, green and blue, which no swap of channels changes, at no more than `area` pixels."""
    factor = min(1.0, math.sqrt(area / (image.width * image.height)))
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    grey: _Pixels = np.asarray(image.resize(size, Image.Resampling.LANCZOS), float).mean(-1)
    return grey


def _start(made: _Pixels, reference: _Pixels) -> tuple[_Pair, _Pair]:
    """The shift, in sides of the image, and the scale, within 1.25 %, at which the images correlate best."""
    made, reference = _even_contrast(made), _even_contrast(reference)
    height, width = made.shape
    taper = np.outer(_ramp(height, 1 / 8), _ramp(width, 1 / 8))
    best = math.inf, np.zeros(2), np.zeros(2)
    by_size = sorted(itertools.product(_START_SCALES, repeat=2), key=lambda scale: abs(scale[0]) + abs(scale[1]))
    for scale in map(np.array, by_size):
        moved = _move(reference, np.zeros(2), scale)
        shift, error = _phase_shift(made * taper, moved * taper, upsampling=1)
        if error < best[0]:
            best = error, shift / (width, height), scale
    return best[1:]


def _even_contrast(pixels: _Pixels) -> _Pixels:
    """Details alone, with one contrast everywhere: no changed region outweighs the rest of the image."""
    from skimage.filters import gaussian

    detail = pixels - gaussian(pixels, 3, mode="nearest")
    even: _Pixels = detail / np.sqrt(gaussian(detail**2, 6, mode="nearest") + 4)
    return even


def _ramp(length: int, part: float) -> _Pixels:
    """Ones that fall to zero over a part of the length at each end; with one half, a Hann window."""
    position = np.arange(length) + 0.5
    rising = np.clip(np.minimum(position, length - position) / (part * length), 0, 1)
    ramp: _Pixels = np.sin(np.pi / 2 * rising) ** 2
    return ramp


def _refine(made: _Pixels, reference: _Pixels, shift: _Pair, scale: _Pair) -> tuple[_Pair, _Pair] | None:
    """Shift and scale from windows, round by round; None where windows are too few or disagree."""
    size = np.array(made.shape[::-1], float)
    for _ in range(_ROUNDS):
        rows = _window_shifts(made, reference, shift, scale)
        if len(rows) < 4 or not rows[:, 4:6].any(axis=0).all():
            return None
        fits = _fit(rows[:, 0], rows[:, 2], rows[:, 4]), _fit(rows[:, 1], rows[:, 3], rows[:, 5])
        step, growth = np.array([fit.shift for fit in fits]), np.array([fit.scale for fit in fits])
        shift, scale = shift * (1 + growth) + step, (1 + scale) * (1 + growth) - 1
        if np.abs(scale).max() > 0.2 or (np.abs(shift) > size / 4).any():
            return None
        if (np.abs(step) + np.abs(growth) * size / 2).max() < _DONE:
            break
    common = np.abs(rows[:, 6:].sum(0))
    measured = common.min() > _STRIPES * common.max() and all(
        fit.inliers >= _MIN_INLIERS and fit.scale_error <= _MAX_ERROR[0] and fit.shift_error <= _MAX_ERROR[1]
        for fit in fits
    )
    return (shift, scale) if measured else None


def _window_shifts(made: _Pixels, reference: _Pixels, shift: _Pair, scale: _Pair) -> _Pixels:
    """A row for each window that lies in both images and is not flat.

    Eight columns, x and y of: its centre, its shift, the shift's precision, the structure that both images have.
    """
    moved = _move(reference, shift, scale)
    height, width = made.shape
    side = int(np.clip(min(height, width) / 4, *_WINDOW)) // 2 * 2
    taper = np.outer(_ramp(side, 0.5), _ramp(side, 0.5))
    half = np.array([width, height]) / 2
    rows = []
    for top, left in itertools.product(_starts(height, side), _starts(width, side)):
        centre = np.array([left, top]) + side / 2 - half
        # The taper leaves little of a window's outer eighth: what lies beyond the reference may be there.
        if (np.abs(centre - shift) + side * 3 / 8 > half * (1 + scale)).any():
            continue
        a, b = (pixels[top : top + side, left : left + side] for pixels in (made, moved))
        down, across = (
            np.average(np.stack([g**2, g * h]), axis=(1, 2), weights=np.broadcast_to(taper, (2, side, side)))
            for g, h in zip(np.gradient(a), np.gradient(b), strict=True)
        )
        a, b = ((pixels - np.average(pixels, weights=taper)) * taper for pixels in (a, b))
        if min(a.std(), b.std()) < _FLAT / 4:
            continue
        found, error = _phase_shift(a, b, upsampling=_UPSAMPLING)
        likeness = 1 - error**2
        # The bound of Cramer and Rao: steep edges fix a shift, noise blurs it; 0.1 keeps one window from deciding.
        precision = likeness / (1 - likeness + 0.1) / a.var()
        rows.append([*centre, *found, precision * across[0], precision * down[0], across[1], down[1]])
    return np.array(rows)


def _starts(length: int, side: int) -> list[int]:
    """Where windows begin that overlap by half and cover a length."""
    count = max(2, math.ceil((length - side) / (side / 2)) + 1)
    return [round(start) for start in np.linspace(0, length - side, count)]


def _phase_shift(made: _Pixels, reference: _Pixels, *, upsampling: int) -> tuple[_Pair, float]:
    """How far (x, y) content lies from where it is in the reference, and the error of the match, 0 to 1.

    Of the spectra's amplitudes the square roots are kept: all of them would weight blurred content by its contrast,
    none, as in pure phase correlation, would make noise count as much as edges.
    """
    from skimage.registration import phase_cross_correlation

    spectra = [np.fft.fft2(pixels) for pixels in (made, reference)]
    amplitudes = [np.abs(spectrum) for spectrum in spectra]
    if not all(amplitude.any() for amplitude in amplitudes):
        return np.zeros(2), 1.0
    whitened = [s / np.sqrt(a + 0.02 * a.max()) for s, a in zip(spectra, amplitudes, strict=True)]
    shift, error, _ = phase_cross_correlation(
        *whitened, space="fourier", normalization=None, upsample_factor=upsampling
    )
    return np.array(shift[::-1], float), float(min(error, 1))


def _move(pixels: _Pixels, shift: _Pair, scale: _Pair) -> _Pixels:
    """The image scaled about its centre by `1 + scale`, then shifted; black where it has no pixels."""
    height, width = pixels.shape
    half = np.array([width, height]) / 2
    (step_x, step_y), (x, y) = 1 / (1 + scale), half - (half + shift) / (1 + scale)
    image = Image.fromarray(pixels.astype(np.float32)).transform(
        (width, height), Image.Transform.AFFINE, (step_x, 0, x, 0, step_y, y), Image.Resampling.BICUBIC
    )
    return np.asarray(image, float)


def _fit(position: _Pixels, shift: _Pixels, precision: _Pixels) -> _Fit:
    """Fit `shift = t + a * position` by Tukey's biweight, from the median on: less than half may be outliers."""
    weight = precision / max(float(np.median(precision)), 1e-12)
    basis = np.stack([np.ones_like(position), position], 1)
    line = np.array([_median(shift, weight), 0.0])
    for _ in range(20):
        residual = np.abs(shift - basis @ line)
        spread = max(1 / _UPSAMPLING, 1.4826 * _median(residual, weight))
        kept = weight * np.clip(1 - (residual / (4 * spread)) ** 2, 0, None) ** 2
        normal = basis.T @ (basis * kept[:, None]) + np.diag([1e-9, 1e-6])
        line = np.linalg.solve(normal, basis.T @ (kept * shift))
    residual = np.abs(shift - basis @ line)
    inverse = np.linalg.inv(normal)
    leverage = kept * np.einsum("ni,ij,nj->n", basis, inverse, basis)
    # A window that decides alone agrees with itself: the estimate HC2 of MacKinnon and White.
    doubt = np.maximum(residual, 1 / _UPSAMPLING) / np.sqrt(np.maximum(1 - leverage, 0.01))
    variance = inverse @ (basis.T @ (basis * (kept**2 * doubt**2)[:, None])) @ inverse
    errors = np.sqrt(np.diag(variance)) * math.sqrt(2)  # neighbours share half of their pixels
    inliers = float(weight[residual < 0.5].sum() / weight.sum())
    return _Fit(float(line[0]), float(line[1]), inliers, float(errors[0]), float(errors[1]))


def _median(values: _Pixels, weight: _Pixels) -> float:
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weight[order])
    return float(values[order][np.searchsorted(total, total[-1] / 2)])
