"""The ground: every setting of a run, in the order of the paper, the presets, and the two errors.

No torch, and nothing of ours: a program that imports this file first answers --help at once.
Each group of settings is a frozen dataclass whose fields are made with `option`; run/flags.py turns
them into a command line.
"""

import contextlib
import dataclasses
import importlib.util
import math
import operator
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

if sys.version_info < (3, 10):
    sys.exit(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]}")
if not importlib.util.find_spec("fcntl"):
    sys.exit("Linux or macOS is needed; on Windows, use its Linux (WSL)")

# one that is closed at the start is None, and the next file to be opened would take its place
for _name, _mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
    if getattr(sys, _name) is None:
        setattr(sys, _name, open(os.devnull, _mode))

VERSION = "0.4.0"  # docs/changelog.md begins with it

# torch reads these when it is imported, and whatever of ours needs torch imports this file first.
# torch_npu hooks itself into `import torch`, which then fails where its driver is missing.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
# Threads that spin while they wait take the cores away from others, and from each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# oneDNN, and torch's layer above it, each keep the last 1,024 kernels of as many shapes, 250 KB
# each. The number of masked places gives almost every update new shapes, some 40 of them, which
# its layers share. So 64 are as fast, with 1 GB instead of 4 (docs/benchmarks.md).
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")


# ------------------------------------------------------------------------------------------ errors


class InputError(ValueError):
    """The user's input is wrong. The text is one line that says what, where, and what to do."""


class RunError(RuntimeError):
    """A run cannot continue. The text is one line that says why and what to do."""


def printable(text: str) -> str:
    """The text on one line, with control characters escaped: paths may contain anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def check_file(path):
    """Raise InputError unless it is an ordinary file; a pipe or a device could be endless. Nor may
    it be the few lines that a clone without Git LFS has in its place."""
    if not Path(path).is_file():
        raise InputError(f"{path}: {'not a file' if Path(path).exists() else 'no such file'}")
    with open(path, "rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            what = "a pointer of Git LFS, not the file itself; get it with: git lfs pull"
            raise InputError(f"{path}: {what}")


def read_text(path, errors="strict", encoding="utf-8", newline=None) -> str:
    """The text of an ordinary file. Raises InputError.

    newline: as for open; "" leaves the ends of lines as they are.
    """
    with reading(f"{path}"):
        check_file(path)
        with open(path, encoding=encoding, errors=errors, newline=newline) as file:
            return file.read()


def is_out_of_memory(error: Exception) -> bool:
    """Whether it is Python's MemoryError or one of torch's kinds, some a plain RuntimeError."""
    known = re.search("can(not|'t) allocate|out of memory", str(error), re.I)
    return isinstance(error, MemoryError) or known is not None


@contextlib.contextmanager
def reading(what: str):
    """The door of every file: whatever reading it raises becomes one InputError after `what`.

    `what` begins with the file's name. torch, zipfile, json and the decompressors raise dozens of
    kinds of errors for damaged files. Memory that runs out is no fault of the file, and stays an
    error of its own: a resume must not take an older checkpoint for it.
    """
    try:
        yield
    except Exception as e:
        if isinstance(e, (InputError, RunError)) or is_out_of_memory(e):
            raise
        why = str(getattr(e, "strerror", None) or e).strip() or type(e).__name__
        if isinstance(e, UnicodeDecodeError):
            why = f"not UTF-8 at byte {e.start}; if it is a text, iconv converts it"
        raise InputError(f"{what}: {why.splitlines()[0][:200]}") from None


# --------------------------------------------------------------------------- how a setting is made


def option(default, help, low=None, high=None, above=None, below=None, choices=None):
    """A dataclass field that becomes a flag. low and high are allowed, above and below are not."""
    if type(default) is int and high is None:
        high = 2**31 - 1
    bounds = {"at least": low, "at most": high, "above": above, "below": below}
    metadata = dict(help=help, choices=choices, bounds=bounds)
    return dataclasses.field(default=default, metadata=metadata)


COMPARE = {"at least": operator.ge, "at most": operator.le}
COMPARE |= {"above": operator.gt, "below": operator.lt}
NO_PATH = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")  # characters that no path can hold


def check_ranges(config):
    """Raise InputError for the first field of a dataclass that is out of range; else return it."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = f"--{field.name} {str(value)[:100]}"
        # a value may come out of a checkpoint, so its type is checked, too
        if not isinstance(value, (int, float) if field.type is float else field.type):
            raise InputError(f"{name}: must be of type {field.type.__name__}")
        if isinstance(value, str) and NO_PATH.search(value):
            raise InputError(f"{name}: holds a character that no path can hold")
        choices = field.metadata["choices"]
        if choices and value not in choices:
            raise InputError(f"{name}: choose from {', '.join(map(str, choices))}")
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, float) and not math.isfinite(part):
                raise InputError(f"{name}: must be a finite number")
            for bound, limit in field.metadata["bounds"].items():
                if limit is not None and not COMPARE[bound](part, limit):
                    raise InputError(f"{name}: must be {bound} {limit}")
    return config


# ------------------------------------------------------------------------------------- pretraining

BREAK_MODES = ("none", "eos", "complete", "complete_doc")
OBJECTIVES = ("data2vec", "data2vec2", "mlm")
SEEDS = 2**32 - 1 - 10**6  # the largest: an update's number is added to it


@dataclass(frozen=True)
class DataConfig:
    data_path: str = option("", "folder with dict.txt and {train,valid}.{bin,idx}; A:B: in turn")
    # blocks
    sample_break_mode: str = option("complete_doc", "how blocks are cut", choices=BREAK_MODES)
    tokens_per_sample: int = option(512, "longest block, <s> included", low=2)
    long_sentences: str = option("split", "cut or drop what is longer", choices=("split", "skip"))
    # batches
    max_tokens: int = option(8192, "most tokens in a batch, padding included", low=1)
    batch_size: int = option(0, "most blocks in a batch (0: no limit)", low=0)
    required_batch_size_multiple: int = option(8, "a batch holds a multiple, or fewer", low=1)
    drop_remainder: bool = option(False, "drop a last batch of another size, as fairseq does")
    # masks
    mask_prob: float = option(0.35, "share of tokens to mask, before overlaps", above=0, below=1)
    mask_multiple_length: int = option(4, "tokens masked in a row", low=1, high=10_000)
    mask_stdev: float = option(0.0, "standard deviation of that length", low=0, high=10_000)
    random_token_prob: float = option(0.0, "masked tokens replaced by a random one", low=0, high=1)
    leave_unmasked_prob: float = option(0.0, "masked tokens left as they are", low=0, high=1)
    fixed_masks: bool = option(False, "epoch 1's masks always, as fairseq with num_workers=1")
    # what the teacher reads: the paper's way, or the released code's
    teacher_input: str = option(
        "full", "the block, or its masked tokens", choices=("full", "masked")
    )
    seed: int = option(1, "seed of order, masks, first weights and dropout", low=0, high=SEEDS)

    def check(self):
        if not self.data_path:
            raise InputError("--data_path is missing: the folder that preprocess.py has made")
        if self.random_token_prob + self.leave_unmasked_prob > 1:
            raise InputError("--random_token_prob and --leave_unmasked_prob: at most 1 together")


@dataclass(frozen=True)
class ModelConfig:
    # the encoder: fairseq's roberta_base
    layers: int = option(12, "encoder layers", low=1, high=1000)
    embed_dim: int = option(768, "width", low=1, high=100_000)
    ffn_embed_dim: int = option(3072, "inner width of the feed-forward part", low=1)
    attention_heads: int = option(12, "attention heads", low=1)
    max_source_positions: int = option(512, "rows of the position table", low=1)
    normalize_before: bool = option(False, "LayerNorm before each part (pre-norm), not after")
    activation_fn: str = option("gelu", "in the feed-forward part", choices=("gelu", "relu"))
    dropout: float = option(0.1, "after embedding, attention and feed-forward", low=0, below=1)
    attention_dropout: float = option(0.1, "on the attention weights", low=0, below=1)
    activation_dropout: float = option(0.0, "after the activation", low=0, below=1)
    # the student's head and the teacher's target (paper, 3.3)
    head_layers: int = option(2, "linear layers of the regression head", low=1, high=100)
    average_top_k_layers: int = option(10, "the teacher's last layers in the target", low=1)
    batch_norm_target_layer: bool = option(False, "norm of a layer's target over the batch")
    instance_norm_target_layer: bool = option(False, "norm of a layer's target over a block")
    layer_norm_target_layer: bool = option(True, "norm of a layer's target over the channels")
    layer_norm_targets: bool = option(False, "norm of the averaged target over the channels")
    instance_norm_targets: bool = option(False, "norm of the averaged target over a block")
    # the loss
    loss_beta: float = option(4.0, "smooth L1 is linear from here on (0: squared error)", low=0)
    loss_scale: float = option(1.0, "factor of the loss (0 or less: 1 / sqrt(width))")
    objective: str = option("data2vec", "targets, or hidden words", choices=OBJECTIVES)
    mlm_weight: float = option(0.0, "of the language model's loss beside data2vec's", low=0)
    # data2vec2's copies and decoder
    clone_batch: int = option(8, "masked copies of a block, for one target", low=1, high=1000)
    mask_noise_std: float = option(0.01, "of what the decoder reads at hidden places", low=0)
    decoder_dim: int = option(768, "width of the decoder", low=1, high=100_000)
    decoder_kernel: int = option(9, "tokens that a convolution of the decoder spans", low=1)
    decoder_layers: int = option(5, "convolutions of the decoder", low=1, high=100)
    decoder_groups: int = option(1, "groups of a convolution's channels", low=1)
    decoder_residual: bool = option(False, "add each convolution's input to its output")

    @property
    def predicts_words(self) -> bool:
        return self.objective == "mlm" or self.mlm_weight > 0

    @property
    def norms_over_places(self) -> bool:
        per_layer = self.batch_norm_target_layer or self.instance_norm_target_layer
        return per_layer or self.instance_norm_targets

    def check(self):
        heads, width = self.attention_heads, self.embed_dim
        if width % heads:
            raise InputError(f"--attention_heads {heads} does not divide --embed_dim {width}")
        top = self.average_top_k_layers
        if top > self.layers:
            raise InputError(f"--average_top_k_layers {top}: there are only {self.layers} layers")
        groups = self.decoder_groups
        if self.objective == "data2vec2" and math.gcd(width, self.decoder_dim) % groups:
            sizes = f"--embed_dim {width} and --decoder_dim {self.decoder_dim}"
            raise InputError(f"--decoder_groups {groups} does not divide {sizes}")


@dataclass(frozen=True)
class EmaConfig:
    ema_decay: float = option(0.999, "decay of the teacher at the start", low=0, high=1)
    ema_end_decay: float = option(0.9999, "decay from ema_anneal_end_step on", low=0, high=1)
    ema_anneal_end_step: int = option(300000, "updates from the one to the other", low=0)
    ema_transformer_layers_only: bool = option(True, "copy the embeddings, do not average them")


@dataclass(frozen=True)
class OptimConfig:
    clip_norm: float = option(5.0, "largest global gradient norm (0: no clipping)", low=0)
    adam_betas: tuple = option((0.9, 0.98), "Adam's decays", low=0, below=1)
    adam_eps: float = option(1e-6, "Adam's epsilon, of the uncorrected second moment", above=0)
    weight_decay: float = option(0.01, "decoupled weight decay; 2.0: of matrices alone", low=0)

    def check(self):
        if len(self.adam_betas) != 2:
            raise InputError(f"--adam_betas {self.adam_betas}: two numbers, such as 0.9,0.98")


AMP = ("auto", "off", "fp16", "bf16")


@dataclass(frozen=True)
class DeviceConfig:
    device: str = option("auto", "where to run", choices=("auto", "npu", "cuda", "cpu"))
    amp: str = option("auto", "precision; auto: bf16, else fp16; off on a slow CPU", choices=AMP)
    deterministic: bool = option(False, "NPU, GPU: the same numbers again; slower")


@dataclass(frozen=True)
class GuardConfig:
    # with --fairseq_exact nothing guards against a collapse, as in the released code
    max_skipped: int = option(50, "non-finite updates in a row before the run stops", low=1)
    min_target_var: float = option(0.01, "targets have collapsed under it (0: no guard)", low=0)
    min_pred_var: float = option(1e-6, "predictions have collapsed under it (0: no guard)", low=0)


@dataclass(frozen=True)
class TrainConfig:
    fairseq_exact: bool = option(False, "the released code bug for bug")
    # the schedule
    lr: float = option(2e-4, "highest learning rate", low=0)
    warmup_updates: int = option(10000, "updates of linear warm-up", low=0)
    max_update: int = option(1_000_000, "updates in all; then the learning rate is 0", low=1)
    max_hours: float = option(0.0, "stop after so many hours in all (0: no limit)", low=0)
    max_epoch: int = option(0, "stop after so many epochs (0: no limit)", low=0)
    update_freq: int = option(1, "batches that make one update, per worker", low=1)
    compile: bool = option(False, "torch.compile fuses layers; the first updates take a minute")
    # what is told and measured
    log_interval: int = option(200, "updates between two log lines", low=1)
    disable_validation: bool = option(False, "never validate; no valid split is needed")
    validate_interval: int = option(1, "epochs between validations (0: not at epoch ends)", low=0)
    validate_interval_updates: int = option(0, "updates between validations (0: none)", low=0)
    probe_interval_updates: int = option(0, "updates between two with the probe (0: none)", low=0)
    best_by: str = option("loss", "what checkpoint_best.pt goes by", choices=("loss", "probe"))
    # checkpoints
    save_interval: int = option(0, "epochs between checkpoints (0: not at epoch ends)", low=0)
    save_interval_updates: int = option(50000, "updates between kept checkpoints (0: none)", low=0)
    keep_interval_updates: int = option(1, "how many of those to keep (-1: all)", low=-1)
    save_interval_minutes: float = option(30.0, "between saves by the clock (0: none)", low=0)
    save_dir: str = option("checkpoints", "for checkpoints and train.jsonl")
    tensorboard_logdir: str = option("", "for TensorBoard curves under fairseq's names")
    npu_profile: int = option(0, "NPU: write torch_npu's profile of so many updates", low=0)
    init_from: str = option("", "start from weights and teacher of this checkpoint, of any kind")

    def check(self):
        if self.best_by == "probe" and not self.probe_interval_updates:
            raise InputError("--best_by probe needs --probe_interval_updates")
        if not self.save_dir:
            raise InputError("--save_dir is empty; the current folder is called .")


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    data: DataConfig
    model: ModelConfig
    ema: EmaConfig
    optim: OptimConfig
    device: DeviceConfig
    guard: GuardConfig
    train: TrainConfig

    def __post_init__(self):
        for part in (self.data, self.model, self.optim, self.train):
            part.check()
        if self.model.objective == "mlm" and self.data.teacher_input == "masked":
            raise InputError("--objective mlm reads whole blocks: --teacher_input full")
        if self.model.objective == "data2vec2":
            self._check_version_2()
        block, table = self.data.tokens_per_sample, self.model.max_source_positions
        if block > table:
            raise InputError(f"--tokens_per_sample {block} is above --max_source_positions {table}")

    def _check_version_2(self):
        """Raise InputError for settings of version 1 that have no meaning in version 2."""
        built_in = dict(teacher_input="full", mask_multiple_length=1, ema_transformer_layers_only=1)
        unused = "mask_stdev random_token_prob leave_unmasked_prob fixed_masks mlm_weight".split()
        values = self.flat()
        for name, value in {**built_in, **dict.fromkeys(unused, 0)}.items():
            if values[name] != value:
                raise InputError(f"--objective data2vec2 knows only --{name} {value} (see base_v2)")

    def flat(self) -> dict:
        """Every setting by its name."""
        values = {}
        for part in dataclasses.fields(self):
            values.update(vars(getattr(self, part.name)))
        return values


PARTS = [part.type for part in dataclasses.fields(Config)]

# The defaults are those of fairseq's config/text/pretraining/base.yaml; a preset has what differs.
# fmt: off
PRESETS = {
    "base": {},
    "npu_1p": dict(tokens_per_sample=64, max_tokens=1280),  # the Ascend ModelZoo's, one device
    "tiny": dict(  # shows in a minute or two on a laptop's CPU that everything works
        tokens_per_sample=128, max_tokens=2048,
        embed_dim=128, ffn_embed_dim=512, layers=4, attention_heads=4,
        dropout=0.0, attention_dropout=0.0, average_top_k_layers=3,
        ema_decay=0.99, ema_end_decay=0.999, ema_anneal_end_step=200,
        lr=1e-3, warmup_updates=40, max_update=400,
        log_interval=20, validate_interval=0, validate_interval_updates=200,
    ),
    "small": dict(  # learns from megabytes of text in 2 to 3 hours of a core (docs/results.md)
        tokens_per_sample=128, max_tokens=4096, mask_prob=0.3, mask_multiple_length=1,
        embed_dim=256, ffn_embed_dim=1024, layers=4, attention_heads=4,
        dropout=0.0, attention_dropout=0.0, normalize_before=True,
        average_top_k_layers=4, instance_norm_target_layer=True, loss_scale=0.2, mlm_weight=1.0,
        ema_decay=1.0, ema_end_decay=0.999, ema_anneal_end_step=5000,
        ema_transformer_layers_only=False,
        lr=2e-3, warmup_updates=200, max_update=12000,
        log_interval=50, validate_interval=0, validate_interval_updates=1000,
        probe_interval_updates=3000, save_interval_updates=0,
    ),
}
VERSION_2 = dict(objective="data2vec2", mask_prob=0.48, mask_multiple_length=1, loss_beta=0.0)
VERSION_2 |= dict(instance_norm_target_layer=True, layer_norm_target_layer=False, clip_norm=1.0)
PRESETS["base_v2"] = VERSION_2 | dict(  # the release's v2/base_text_only_task.yaml, on one device
    sample_break_mode="none", batch_size=4, average_top_k_layers=12, warmup_updates=4000,
    ema_decay=0.9999, ema_end_decay=0.99999, ema_anneal_end_step=100_000, min_pred_var=1e-4,
)
PRESETS["small_v2"] = PRESETS["small"] | VERSION_2 | dict(  # the encoder of `small`
    max_tokens=1024, clone_batch=4, mlm_weight=0.0, loss_scale=0.0, decoder_dim=256,
    decoder_kernel=5, decoder_layers=3, decoder_groups=4, ema_transformer_layers_only=True,
)
# What the released code does where it differs from the paper or loses text.
FAIRSEQ_EXACT = dict(
    teacher_input="masked", long_sentences="skip", drop_remainder=True,
    min_target_var=0.0, min_pred_var=0.0,
)
# fmt: on
