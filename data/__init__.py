"""Files to tensors and back: corpora, tokenizers, checkpoints, results. Nothing here trains."""

from data.checkpoints import load_model, write_checkpoint
from data.examples import Examples, load_examples
from data.files import InputError, check_folder, environment, read_adapter, read_progress
from data.files import write_adapter, write_json, write_json_lines, write_progress
from data.records import end_token
from data.tasks import accuracy, answer, format_prompt, stop_tokens
from data.tokenizer import load_tokenizer, write_tokenizer
