"""Tokenizers of open_clip models without open_clip: cleaning of texts, and a fast tokenizer of Hugging Face."""

import html
import os
import string
from collections.abc import Sequence
from typing import Annotated, Literal

import ftfy
import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer

from app.names.text import nfc

# A token has about four characters in English and fewer in other languages; no text has so many on average.
_MAX_CHARS_PER_TOKEN = 32
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class TokenizerOptions(BaseModel):
    """What a model does with texts besides tokenizing them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    clean: Literal["whitespace", "lower", "canonicalize"]
    """open_clip's name of the cleaning; ``lower`` and ``canonicalize`` are for lower-case tokenizers, the latter also
    removes punctuation."""

    context_length: Annotated[int, Field(gt=0)]
    """Tokens of a text, including the special ones."""

    pad_id: int | None
    """Token of padding that the text tower masks, so that common padding can be removed; None if it masks nothing."""

    zeroed_id: int | None = None
    """Token that is replaced by 0; None for no token."""


class TextTokenizer:
    """Maps texts to token ids in a time linear in their length.

    Args:
        tokenizer: adds the special tokens, truncates and pads to the context length.
        options: of the model.
    """

    def __init__(self, tokenizer: Tokenizer, options: TokenizerOptions) -> None:
        # Each call tokenizes few texts; threads of the tokenizer would be forked with the workers.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._tokenizer = tokenizer
        self._options = options

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return int64 (k, length) for k >= 1 texts; the length is at most the context length."""
        options = self._options
        cleaned = [clean_text(shortened(text, options.context_length), options.clean) for text in texts]
        tokens = np.array([each.ids for each in self._tokenizer.encode_batch(cleaned)], dtype=np.int64)
        if options.zeroed_id is not None:
            tokens[tokens == options.zeroed_id] = 0
        if options.pad_id is not None:
            tokens = tokens[:, : int((tokens != options.pad_id).sum(axis=1).max())]
        return tokens


def shortened(text: str, context_length: int) -> str:
    """Return a text as Unicode's NFC, without what is surely beyond the context."""
    return nfc(text[: _MAX_CHARS_PER_TOKEN * context_length])


def clean_text(text: str, how: str) -> str:
    """Clean a text as open_clip does before it tokenizes."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    if how == "canonicalize":
        text = text.replace("_", " ").translate(_NO_PUNCTUATION)
    if how != "whitespace":
        text = text.lower()
    return " ".join(text.split())
