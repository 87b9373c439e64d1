"""How long prompts are for the text encoder, counted with the base's own tokenizer.

Promise: a prompt is over the limit exactly where its tokens are; what is cut fits and ends between characters. Cost:
none for prompts of fewer bytes than the limit has tokens; else the tokenizer is loaded, then some microseconds a word.
"""

from collections.abc import Iterable
from unicodedata import normalize

from transformers import AutoTokenizer

from mixres.models import hub


def over_long(
    prompts: Iterable[str], path: str, *, limit: int, revision: str | None = None
) -> dict[str, tuple[int, str]]:
    """Of `prompts` those with more than `limit` tokens: how many, and the longest beginning that fits.

    Raises:
        UserError: the tokenizer of the pipeline cannot be had.
    """
    # A token of the byte-level vocabulary is one byte or more of the text in Unicode form NFC.
    suspects = [text for text in dict.fromkeys(prompts) if len(normalize("NFC", text).encode()) > limit]
    if not suspects:
        return {}
    folder = hub.pipeline_folder(path, ("tokenizer",), revision=revision)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

    def starts(text: str) -> list[int]:
        """Where in `text` each token starts."""
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [start for start, _ in encoded["offset_mapping"]]

    found = {}
    for text in suspects:
        tokens, cut = starts(text), text
        while len(rest := starts(cut)) > limit:  # what ends elsewhere may be split into more tokens
            cut = cut[: rest[limit]].rstrip()
        if cut != text:
            found[text] = (len(tokens), cut)
    return found
