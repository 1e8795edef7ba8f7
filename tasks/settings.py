"""Every setting of a fine-tuning, and the recipes of GLUE. No torch, as config.py."""

from collections import namedtuple
from dataclasses import dataclass

from config import InputError, option

# How the reference fine-tunes on each task of GLUE.
Recipe = namedtuple("Recipe", "batch_size lr max_update warmup_updates metric")
RECIPES = {
    "cola": Recipe(16, (1e-5,), 5336, 320, "matthews"),
    "sst2": Recipe(32, (1e-5,), 20935, 1256, "accuracy"),
    "mrpc": Recipe(16, (1e-5,), 2296, 137, "accuracy_and_f1"),
    "stsb": Recipe(16, (2e-5,), 3598, 214, "pearson_and_spearman"),
    "qqp": Recipe(32, (1e-5,), 113272, 28318, "accuracy_and_f1"),
    "mnli": Recipe(32, (1e-5,), 123873, 7432, "accuracy"),
    "qnli": Recipe(32, (1e-5,), 33112, 1986, "accuracy"),
    "rte": Recipe(16, (2e-5,), 2036, 122, "accuracy"),
}
# what can decide which checkpoint is the best; the first is what `auto` takes
CLASS_METRICS = ("accuracy", "f1", "matthews", "accuracy_and_f1")
SCORE_METRICS = ("pearson_and_spearman", "pearson", "spearman")
METRICS = ("auto", *CLASS_METRICS, *SCORE_METRICS)


@dataclass(frozen=True)
class FinetuneConfig:
    # the encoder to start from, and the files of its tokenizer
    ckpt: str = option("", "the encoder: a checkpoint, ours or fairseq's, or a Hugging Face folder")
    attention_heads: int = option(0, "of a file that does not say (0: a guess, printed)", low=0)
    dict: str = option("", "dict.txt of the pretraining data, where it is not found")
    encoder_json: str = option("", "the BPE's vocabulary")
    vocab_bpe: str = option("", "the BPE's merges")
    # the labelled text
    task: str = option("none", "of GLUE, its files in --data_path", choices=("none", *RECIPES))
    data_path: str = option("", "folder of GLUE's files, or of folders input0, input1 and label")
    train: str = option("", "your own labelled text: .tsv, .csv or .jsonl")
    valid: str = option("", "the split that decides which checkpoint and which --lr is the best")
    test: str = option("", "a split to score once, by the best checkpoint")
    text: str = option("", "columns of the text, one or two (A,B): names, or numbers from 1")
    label: str = option("", "column of the label")
    header: str = option("auto", "first row: names", choices=("auto", "true", "false"))
    regression: bool = option(False, "labels are numbers to be predicted, not classes")
    label_scale: float = option(1.0, "divide the numbers by this while training", above=0)
    # what is trained
    freeze: bool = option(False, "fit a linear classifier on frozen features; no training")
    pool: str = option("cls", "the head reads <s>, or the mean state", choices=("cls", "mean"))
    new_head: bool = option(False, "draw the head anew, whichever the file has")
    untrained: bool = option(False, "do the same from random weights, for comparison")
    embed_rms: float = option(0.0, "first bring the embeddings to this size (0: no)", low=0)
    dropout: float = option(0.1, "of attention, and after each part", low=0, below=1)
    # how
    lr: tuple = option((2e-5,), "highest learning rate; of several (A,B,C) each is tried", low=0)
    seed: int = option(1, "seed of order, head and dropout", low=0, high=2**31 - 1)
    seeds: int = option(1, "how many seeds from --seed on to fine-tune with", low=1, high=1000)
    batch_size: int = option(16, "most examples in a batch", low=1)
    max_tokens: int = option(4400, "most tokens in a batch, padding included (0: any)", low=0)
    update_freq: int = option(1, "batches that make one update", low=1)
    max_update: int = option(0, "updates in all; then the rate is 0 (0: --max_epoch epochs)", low=0)
    max_epoch: int = option(10, "stop after so many epochs (0: no limit)", low=0)
    warmup_updates: int = option(-1, "of linear warm-up (-1: 6% of all)", low=-1)
    metric: str = option("auto", "decides; auto: accuracy, or mean correlation", choices=METRICS)
    clip_norm: float = option(0.0, "largest global gradient norm (0: no clipping)", low=0)
    weight_decay: float = option(0.1, "decoupled weight decay, on all parameters", low=0)
    fairseq_exact: bool = option(False, "as recorded from fairseq: no dropout, batches unsorted")
    # what comes out
    save_dir: str = option("", "where the checkpoint, finetune.jsonl and results.json go")
    overwrite: bool = option(False, "remove an older fine-tuning in --save_dir")
    predict: str = option("", "classify lines (of a pair: A, tab, B), or columns with --text")
    out: str = option("", "where the predictions go (none: standard output)")

    def check(self):
        if not self.ckpt:
            raise InputError("--ckpt is missing: the pretrained checkpoint to start from")
        if self.predict:
            return
        if not self.save_dir:
            raise InputError("--save_dir is missing: the folder for the fine-tuned checkpoint")
        if not self.lr:
            raise InputError("--lr is empty: one learning rate, or several joined by commas")
        if len({f"{lr:g}" for lr in self.lr}) < len(self.lr):
            raise InputError("--lr has one learning rate twice")
        if bool(self.train or self.valid or self.test) == bool(self.data_path):
            raise InputError("the labelled text: --data_path DIR, or --train F --valid F")
        if not self.data_path and not (self.train and self.valid and self.text and self.label):
            raise InputError("--train F needs --valid F, --text COL[,COL] and --label COL")
        if self.data_path and (self.text or self.label):
            raise InputError("--text and --label go with --train; in --data_path they are known")
        if self.task != "none" and not self.data_path:
            raise InputError(f"--task {self.task} needs --data_path, the folder of GLUE's files")
        if not (self.max_update or self.max_epoch):
            raise InputError("--max_update 0 --max_epoch 0: one of them must end the run")
