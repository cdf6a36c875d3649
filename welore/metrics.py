"""Names and units of everything that a run logs. Loggers, records and tables read the same constants."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """`key` as logged, `title` as printed, with `digits` after the point."""

    key: str
    title: str
    digits: int = 2


DENSE_PERPLEXITY = Metric("dense/perplexity", "dense perplexity", 2)
COMPRESSED_PERPLEXITY = Metric("compressed/perplexity", "compressed perplexity", 2)
TUNED_PERPLEXITY = Metric("tuned/perplexity", "tuned perplexity", 2)
# Where a model gives a loss or logits that are not finite, the first layer with such an output: its perplexity is
# missing, or the answers are broken.
BREAKS_AT = "breaks_at"

ERR = Metric("compress/err", "err", 4)
ERR_ATTEMPTED = Metric("compress/err_attempted", "err attempted", 4)
KEEP = Metric("compress/keep", "keep", 4)
PREDICTED_NATS = Metric("compress/predicted_nats", "predicted damage of the cut, nats", 4)
NATS = Metric("compress/nats", "measured damage, nats", 4)
REFINED_FROM = Metric("compress/refined_from_nats", "output of the last layer before its refinement, nats", 4)
REFINED_TO = Metric("compress/refined_to_nats", "output of the last layer after its refinement, nats", 4)
CALIBRATE_SECONDS = Metric("compress/calibrate_seconds", "calibration seconds", 1)
COMPRESS_SECONDS = Metric("compress/seconds", "compression seconds, calibration too", 1)
COMPRESS_PEAK_GIB = Metric("compress/peak_gib", "compression peak GiB", 2)
SPARSITY = Metric("compress/sparsity", "share of zeros", 4)
N_LRC_SPARSITY = Metric("compress/n_lrc_sparsity", "share of zeros in N-LRCs", 4)
ZEROS = Metric("compress/zeros", "zeros", 0)
TUNED_SPARSITY = Metric("tuned/sparsity", "share of zeros after tuning", 4)
THRESHOLD = Metric("compress/threshold", "threshold k", 4)
LRC = Metric("compress/lrc", "LRC", 0)
N_LRC = Metric("compress/n_lrc", "N-LRC", 0)
DENSE_PARAMETERS = Metric("dense/parameters", "dense parameters", 0)
DENSE_BYTES = Metric("dense/bytes", "dense bytes", 0)
PARAMETERS = Metric("compress/parameters", "parameters", 0)
BYTES = Metric("compress/bytes", "bytes", 0)
FLOPS_PER_TOKEN = Metric("compress/flops_per_token", "FLOPs per token", 0)
TUNED_PARAMETERS = Metric("tuned/parameters", "tuned parameters", 0)

FIT_TOKENS_PER_SECOND = Metric("fit/tokens_per_second", "training tokens/s", 1)
FIT_PADDED_TOKENS_PER_SECOND = Metric("fit/padded_tokens_per_second", "training tokens/s with padding", 1)
FIT_PEAK_GIB = Metric("fit/peak_gib", "training peak GiB", 2)
FIT_RESERVED_GIB = Metric("fit/reserved_gib", "training reserved GiB", 2)  # on a GPU alone
FIT_FLOPS_PER_TOKEN = Metric("fit/flops_per_token", "training FLOPs per token", 0)
FIT_STATE_GIB = Metric("fit/state_gib", "gradients and optimizer GiB", 3)
FIT_OPTIMIZER_GIB = Metric("fit/optimizer_gib", "optimizer GiB", 3)
TRAINABLE_PARAMETERS = Metric("fit/trainable_parameters", "trainable parameters", 0)
TRAINABLE_NORMS = Metric("fit/trainable_norm_parameters", "of which normalization", 0)
FIT_TOKENS = Metric("fit/tokens", "training tokens", 0)
FIT_STEPS = Metric("fit/steps", "steps", 0)
FIT_EPOCHS = Metric("fit/epochs", "epochs", 2)
FIT_SECONDS = Metric("fit/seconds", "training seconds", 1)

# Of questions, for each stage: what the model wrote, and which option it held most likely.
DENSE_ACCURACY = Metric("dense/accuracy", "dense accuracy", 4)
COMPRESSED_ACCURACY = Metric("compressed/accuracy", "compressed accuracy", 4)
TUNED_ACCURACY = Metric("tuned/accuracy", "tuned accuracy", 4)
COMPRESSED_BROKEN = Metric("compressed/broken", "answers that are not finite before tuning", 0)
COMPRESSED_CORRECT = Metric("compressed/correct", "right answers before tuning", 0)
TUNED_CORRECT = Metric("tuned/correct", "right answers", 0)
TUNED_UNPARSED = Metric("tuned/unparsed", "unparsed answers after tuning", 0)
TUNED_OPTION_ACCURACY = Metric("tuned/option_accuracy", "tuned accuracy by likelihood", 4)
TRAIN_ACCURACY = Metric("tuned/train_accuracy", "accuracy on training questions", 4)
EVAL_ACCURACY = Metric("eval/accuracy", "accuracy", 4)
EVAL_EXAMPLES = Metric("eval/examples", "test questions", 0)
EVAL_QUESTIONS_PER_SECOND = Metric("eval/questions_per_second", "questions/s", 2)
EVAL_CHANCE = Metric("eval/chance", "share of the most frequent right answer", 4)
EVAL_UNPARSED = Metric("eval/unparsed", "unparsed answers", 0)

# Of answers that a judge rates from 1 to 10: the mean of its ratings, and how many could be read and could not.
DENSE_SCORE = Metric("dense/score", "dense score, of 10", 2)
COMPRESSED_SCORE = Metric("compressed/score", "compressed score, of 10", 2)
COMPRESSED_JUDGED = Metric("compressed/judged", "ratings", 0)
COMPRESSED_UNJUDGED = Metric("compressed/unjudged", "ratings that could not be read", 0)
COMPRESSED_ROUGE_L = Metric("compressed/rouge_l", "ROUGE-L", 4)

# Of the frequencies of tokens alone in some training text: a model that is no better knows no more of this text.
EVAL_FREQUENCY_PERPLEXITY = Metric("eval/frequency_perplexity", "perplexity of token frequencies", 0)
EVAL_TOKENS = Metric("eval/tokens", "test tokens", 0)
EVAL_TOKENS_PER_SECOND = Metric("eval/tokens_per_second", "evaluation tokens/s", 1)
DENSE_EVAL_TOKENS_PER_SECOND = Metric("dense/tokens_per_second", "dense evaluation tokens/s", 1)
EVAL_PEAK_GIB = Metric("eval/peak_gib", "evaluation peak GiB", 2)
EVAL_RESERVED_GIB = Metric("eval/reserved_gib", "evaluation reserved GiB", 2)  # on a GPU alone

TRAIN_LOSS = Metric("train/loss", "loss", 4)
TRAIN_LR = Metric("train/lr", "learning rate", 8)
TRAIN_TOKENS = Metric("train/tokens", "tokens seen", 0)
TRAIN_TOKENS_PER_SECOND = Metric("train/tokens_per_second", "tokens/s", 1)
TRAIN_PEAK_GIB = Metric("train/peak_gib", "peak GiB", 2)
VALIDATION_PERPLEXITY = Metric("validation/perplexity", "validation perplexity", 2)
