"""Files to tensors and back: corpora, tokenizers, checkpoints, results. Nothing here trains."""

from data.checkpoints import load_model, write_checkpoint
from data.examples import Examples, load_examples
from data.files import InputError, check_folder
from data.processes import Progress, complain, join_processes, leave_processes, rank_and_world, share, show
from data.report import Report, mean_loss, show_mask, show_step
from data.runs import (
    environment,
    read_adapter,
    resume,
    run_settings,
    write_adapter,
    write_progress,
    write_result,
)
from data.settings import FLAGS, check_fit, parse_args
from data.tasks import accuracy, answer, format_prompt, in_words, stop_tokens
from data.tokenizer import begin_token, end_token, load_tokenizer, write_tokenizer
