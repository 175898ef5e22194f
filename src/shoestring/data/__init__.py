"""Text in, batches out: sources, tokenizers, encoded corpora, packed rows, yardsticks.

    train, held_out = open_source("stdlib").split(0.02)
    tokenizer = train_tokenizer(train, 4096)
    batches = PackedBatches(encode(train, tokenizer), length=256, batch=4, seed=0)

What is wrong with the data is a DataError that names the file and the place.
"""

from .cache import default_cache
from .corpus import Corpus, encode
from .documents import Document, Source
from .packing import PackedBatches, Rows, held_out_batches
from .sources import SUFFIXES, open_source
from .tokenizer import check_tokenizer, load_tokenizer, train_tokenizer
from .yardsticks import ByteNgrams, bits_per_byte, compressed_bits, measure

__all__ = [
    "SUFFIXES",
    "ByteNgrams",
    "Corpus",
    "Document",
    "PackedBatches",
    "Rows",
    "Source",
    "bits_per_byte",
    "check_tokenizer",
    "compressed_bits",
    "default_cache",
    "encode",
    "held_out_batches",
    "load_tokenizer",
    "measure",
    "open_source",
    "train_tokenizer",
]
