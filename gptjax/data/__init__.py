"""Documents from a source, token arrays from documents, batches from tokens by position."""

from gptjax.data.corpus import Corpus, load_corpus
from gptjax.data.loader import BatchLoader, evaluation_batches
from gptjax.data.sources import read_documents
from gptjax.data.token_files import read_tokens, write_tokens

__all__ = [
    "BatchLoader",
    "Corpus",
    "evaluation_batches",
    "load_corpus",
    "read_documents",
    "read_tokens",
    "write_tokens",
]
