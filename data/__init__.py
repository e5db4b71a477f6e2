"""Files to tensors and back: corpora, tokenizers, checkpoints, results. Nothing here trains."""

from data.checkpoints import find, write_checkpoint
from data.corpus import corpus_hash, load_corpus
from data.examples import Examples, load_examples
from data.files import InputError, check_folder, environment, fingerprint
from data.files import write_json, write_json_lines, write_tensors
from data.tokenizer import copy_tokenizer, load_tokenizer
