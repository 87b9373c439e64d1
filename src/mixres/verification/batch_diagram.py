"""A diagram of a batch: which token of which sample is where in both layouts, and which keys it attends to.

Promise: lengths and padding are those of the batches that the model ran on.
"""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from mixres.batch import Batch

COLOURS = {
    "text": "#4c78a8",
    "target": "#54a24b",
    "control": "#f58518",
    "padding": "#dddddd",
    "attended key": "#2f4b7c",
    "masked key": "#f7c6c5",
}
_WIDTH, _LEFT, _MARGIN, _BAR, _GAP, _SQUARE = 1240, 210, 24, 26, 8, 320

Segment = tuple[str, int]  # what, tokens


def token_layout(padded: Batch, packed: Batch, *, causal: bool = False) -> Image.Image:
    """Both layouts of the same samples, what the mask of the padded one hides, and the packed one's attention.

    `causal` is `Family.block_causal`.
    """
    rows = len(padded.names)
    length, padding = padded.tokens_computed // rows, 1 - padded.tokens / padded.tokens_computed
    mask = f"the joint mask {(rows, 1, 1, length)} hides it as keys" if padding else "so there is no joint mask"
    mask = f"a mask {(rows, 1, length, length)} says what each token sees" if causal else mask
    canvas = _Canvas(214 + rows * (_BAR + _GAP) + _BAR + _SQUARE, length)
    canvas.legend()
    canvas.heading(f"layout padded: {rows} rows x {length} tokens, {padding:.1%} of them padding; {mask}")
    for b in range(rows):
        canvas.bar(padded.names[b], padded_segments(padded, b))
    canvas.scale = canvas.room / packed.tokens_computed
    canvas.heading(f"layout packed: {packed.tokens_computed} tokens, no padding; in the order that attention sees")
    samples = [sequence_segments(packed, b) if causal else sample_segments(packed, b) for b in range(rows)]
    canvas.bar("samples 1 to " + str(rows), [part for segments in samples for part in segments])
    own = "each to its own keys" + (", up to the end of its block, text up to itself" if causal else "")
    canvas.heading(f"attention of the packed samples: {own} (rows: queries, columns: keys)")
    canvas.blocks(samples if causal else [[("sample", sum(tokens for _, tokens in part))] for part in samples])
    return canvas.image


def sample_segments(batch: Batch, b: int) -> list[Segment]:
    """Valid tokens of sample `b`: its text, its target, its controls."""
    target, *controls = (frames * rows * columns for frames, rows, columns in batch.img_shapes[b])
    return [("text", batch.text_lengths[b]), ("target", target), *(("control", tokens) for tokens in controls)]


def sequence_segments(batch: Batch, b: int) -> list[Segment]:
    """Those of a family that is causal from block to block: text before each control and before the target, last."""
    (_, text), target, *controls = sample_segments(batch, b)
    runs = [*batch.text_before[b], text - sum(batch.text_before[b])]
    pairs = zip(runs, (*controls, target), strict=True)
    return [part for run, image in pairs for part in (("text", run), image) if part[1]]


def padded_segments(batch: Batch, b: int) -> list[Segment]:
    """Row `b` of a padded batch, padding included, in the order in which attention sees it."""
    text, *images = sample_segments(batch, b)
    text_padding = batch.prompt_embeds.shape[1] - text[1]
    image_padding = batch.latents.shape[1] - sum(tokens for _, tokens in images)
    row = [text, ("padding", text_padding), *images, ("padding", image_padding)]
    return [(what, tokens) for what, tokens in row if tokens]


class _Canvas:
    """The image as it is drawn from top to bottom."""

    def __init__(self, height: int, tokens: int) -> None:
        self.image = Image.new("RGB", (_WIDTH, height), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(15)
        self.room = _WIDTH - _LEFT - _MARGIN
        self.scale = self.room / tokens
        self.top = 14

    def legend(self) -> None:
        left = _MARGIN
        for name, colour in COLOURS.items():
            self.draw.rectangle((left, self.top, left + 16, self.top + 16), fill=colour, outline="black")
            self.draw.text((left + 23, self.top - 1), name, fill="black", font=self.font)
            left += 45 + round(self.draw.textlength(name, font=self.font))
        self.top += 30

    def heading(self, text: str) -> None:
        self.draw.text((_MARGIN, self.top + 8), text, fill="black", font=self.font)
        self.top += 36

    def bar(self, name: str, segments: Sequence[Segment]) -> None:
        """One row; stretches wide enough are labelled with their number of tokens."""
        label = name.encode("ascii", "backslashreplace").decode()
        label = label if len(label) <= 24 else f"...{label[-21:]}"
        self.draw.text((_MARGIN, self.top + 4), label, fill="black", font=self.font)
        first = 0
        for what, tokens in segments:
            left, right = (_LEFT + round(x * self.scale) for x in (first, first + tokens))
            box = (left, self.top, max(left, right - 1), self.top + _BAR)
            self.draw.rectangle(box, fill=COLOURS[what], outline="white")
            ink = "black" if what in ("padding", "control") else "white"
            if self.draw.textlength(str(tokens), font=self.font) + 8 < right - left:
                self.draw.text((left + 4, self.top + 4), str(tokens), fill=ink, font=self.font)
            first += tokens
        self.top += _BAR + _GAP

    def blocks(self, samples: Sequence[Sequence[Segment]]) -> None:
        """The square of packed attention: a block sees the keys of its sample up to its own end, text up to itself."""
        scale, first, line = _SQUARE / sum(tokens for blocks in samples for _, tokens in blocks), 0, self.top
        corner = (_LEFT, self.top, _LEFT + _SQUARE, self.top + _SQUARE)
        self.draw.rectangle(corner, fill=COLOURS["masked key"], outline="black")
        for b, blocks in enumerate(samples):
            start = near = round(first * scale)
            for what, tokens in blocks:
                first += tokens
                top, near = near, round(first * scale)
                box = (_LEFT + start, self.top + top, _LEFT + near, self.top + near)
                self.draw.rectangle(box, fill=COLOURS["attended key"], outline="white")
                if what == "text":
                    above = [(_LEFT + x, self.top + y) for x, y in ((top, top), (near, top), (near, near))]
                    self.draw.polygon(above, fill=COLOURS["masked key"])
            line = max(line, self.top + (start + near) // 2 - 9)
            tokens = sum(tokens for _, tokens in blocks)
            self.draw.text((corner[2] + 12, line), f"sample {b + 1}: {tokens} tokens", fill="black", font=self.font)
            line += 18
        self.top += _SQUARE + _GAP
