"""What an entry of the cache is called: a hash over everything that made it.

Promise: a change of anything that went into the key makes another key, in every process and release the same. Cost:
one hash.
"""

import json
from typing import Any

import xxhash

from mixres.data.cache import FORMAT


def entry_key(**parts: Any) -> str:
    """32 hex characters over named JSON values and the cache format; a change of any value changes the key.

    Raises:
        TypeError, ValueError: a part has no exact JSON form (a path, a dtype, NaN); hand in its string or digest.
    """
    text = json.dumps({"format": FORMAT, "parts": parts}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return xxhash.xxh3_128_hexdigest(text.encode("ascii"))
