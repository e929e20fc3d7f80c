"""Documents from a source, token arrays from documents, batches from tokens by position."""

from gptjax.data.corpus import Corpus, load_corpus
from gptjax.data.loader import BatchLoader, evaluation_batches
from gptjax.data.mixture import Mixture
from gptjax.data.packing import Example, PackedLoader, packed_batches
from gptjax.data.prefetch import prefetched
from gptjax.data.sources import read_documents
from gptjax.data.token_files import read_tokens, write_tokens
from gptjax.data.token_shards import open_token_shards, verify_token_shards

__all__ = [
    "BatchLoader",
    "Corpus",
    "Example",
    "Mixture",
    "PackedLoader",
    "evaluation_batches",
    "load_corpus",
    "open_token_shards",
    "packed_batches",
    "prefetched",
    "read_documents",
    "read_tokens",
    "verify_token_shards",
    "write_tokens",
]
