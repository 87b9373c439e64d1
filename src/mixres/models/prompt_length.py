"""How long prompts are for the text encoder, counted with the base's own tokenizer.

Promise: a prompt is over the limit exactly where its tokens are; what is cut fits and ends between characters. Cost:
none for prompts of fewer bytes than the limit has tokens; else the tokenizer is loaded, then some microseconds a word.
"""

from collections.abc import Iterable
from unicodedata import normalize

from transformers import AutoTokenizer

from mixres.models import hub


def over_long(
    prompts: Iterable[str], path: str, *, limit: int, revision: str | None = None, tokenizer: str = "tokenizer"
) -> dict[str, tuple[int, str]]:
    """Of `prompts` those with more than `limit` tokens: how many, and the longest beginning that fits.

    `tokenizer` is the folder of the pipeline that holds it; special tokens are not counted.

    Raises:
        UserError: the tokenizer of the pipeline cannot be had.
    """
    # A token of a byte-level vocabulary is one byte or more of the text in Unicode form NFC. One of T5's is a character
    # or more in form NFKC, and one more may stand before the first.
    suspects = [
        text
        for text in dict.fromkeys(prompts)
        if (len(text) if text.isascii() else max(len(normalize(form, text).encode()) for form in ("NFC", "NFKC")))
        >= limit
    ]
    if not suspects:
        return {}
    folder = hub.pipeline_folder(path, (tokenizer,), revision=revision)
    loaded = AutoTokenizer.from_pretrained(folder / tokenizer)

    def starts(text: str) -> list[int]:
        """Where in `text` each token starts."""
        encoded = loaded(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [start for start, _ in encoded["offset_mapping"]]

    found = {}
    for text in suspects:
        tokens, cut = starts(text), text
        while len(rest := starts(cut)) > limit:  # what ends elsewhere may be split into more tokens
            cut = cut[: rest[limit]].rstrip()
        if cut != text:
            found[text] = (len(tokens), cut)
    return found
