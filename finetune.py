"""Fine-tune a pretrained encoder on labelled text: GLUE, your own files, or fairseq's folders.

    python finetune.py --ckpt FILE --task cola --data_path GLUE/CoLA --save_dir DIR
    python finetune.py --ckpt FILE --train F --valid F --text COL --label COL --save_dir DIR
    python finetune.py --ckpt FILE --data_path DIR --save_dir DIR    folders input0, input1, label
    python finetune.py --ckpt DIR/checkpoint_best.pt --predict LINES

FILE may be a checkpoint of this project or of fairseq, a bare state dict, or a Hugging Face folder.
--task sets the reference's recipe; flags override it. `--seeds 5 --lr 1e-5,2e-5` fine-tunes five
times at each learning rate, and `--untrained` does the same from random weights, for comparison.
DIR receives finetune.jsonl (a row for each update and validation), results.json, and
checkpoint_best.pt with the names of the classes.

Source: fairseq at commit 3f6ba43f, task and criterion `sentence_prediction`, model `roberta`, and
its GLUE recipe.
"""

import contextlib
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from config import DeviceConfig, InputError, OptimConfig, RunError
from run import flags
from tasks.settings import CLASS_METRICS, RECIPES, SCORE_METRICS, FinetuneConfig

PARTS = [FinetuneConfig, DeviceConfig]

if __name__ == "__main__":
    flags.answer_early(PARTS, __doc__)  # torch takes seconds to import


import convert
from hardware.device import LOWEST_LOSS_SCALE, Device
from hardware.opening import open_device, worker
from hardware.vectors import Separate
from optim import Optimizer
from run import checkpoint
from run.guard import Signals, check_memory
from run.lock import lock
from run.progress import say
from tasks import baselines, classifier, predict, pretrained, report
from tasks.classifier import Classifier, LinearProbe, SentenceHead, figures_of, loss_sum
from tasks.labelled import Data, Split, read_data
from tasks.pretrained import Pretrained, Text
from tasks.report import Job, SaveDir

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

# Examples are sorted by length within so many batches; more leave less padding, less is chance.
BATCHES_GROUPED = 16
WARMUP_SHARE = 0.06  # of all updates


def implied(cfg: FinetuneConfig) -> dict:
    """What --task and --fairseq_exact set; flags override it. cfg: as the flags alone make it."""
    values = {}
    if cfg.task != "none":
        recipe = RECIPES[cfg.task]
        values = recipe._asdict()
        # another length keeps the recipe's share
        if cfg.max_update:
            share = recipe.warmup_updates / recipe.max_update
            values["warmup_updates"] = round(share * cfg.max_update)
    # its scores go from 0 to 5
    if cfg.task == "stsb":
        values.update(regression=True, label_scale=5.0)
    # fairseq's random numbers cannot be had again
    if cfg.fairseq_exact:
        values.update(dropout=0.0)
    return values


@dataclass
class Task:
    """What all fine-tunings of one command share."""

    cfg: FinetuneConfig
    device: Device
    source: Pretrained  # the encoder to start from
    text: Text  # its tokenizer
    data: Data  # the labelled text
    metric: str  # decides, on valid
    head: dict  # the file's classification head as a state dict; {}: a new one


def read_task(cfg: FinetuneConfig, device: Device) -> Task:
    """Raises InputError for whatever cannot be used."""
    source = pretrained.load(cfg.ckpt, cfg.attention_heads)
    # weights, and to train them gradients and Adam's two moments
    copies = 2 if cfg.freeze else 5
    check_memory(source.shape, source.vocabulary, device, copies)
    text = pretrained.prepare_text(cfg, source)
    data = read_data(cfg, source.shape.max_source_positions, text.dictionary, text.tokenize)
    metrics = CLASS_METRICS if data.names else SCORE_METRICS
    metric = metrics[0] if cfg.metric == "auto" else cfg.metric
    if metric not in metrics:
        raise InputError(f"--metric {metric}: choose from {', '.join(metrics)}")
    # a head for other classes is an error, before anything is written
    head = {}
    if source.head and not (cfg.new_head or cfg.freeze):
        # fairseq's heads name no classes, but its folders number them
        source.head.is_numbered = bool(cfg.data_path) and cfg.task == "none"
        new = new_head(cfg, source, data)
        head = pretrained.fit_head(source.head, new, data.names, cfg.label_scale, source.path)
    return Task(cfg, device, source, text, data, metric, head)


def new_head(cfg: FinetuneConfig, source: Pretrained, data: Data) -> torch.nn.Module:
    kind = LinearProbe if cfg.freeze or cfg.pool == "mean" else SentenceHead
    return kind(source.shape.embed_dim, data.outputs)


def new_classifier(task: Task, job: Job) -> Classifier:
    """The model before its first update, drawn by the job's seed where it is not pretrained."""
    cfg, source = task.cfg, task.source
    task.device.seed(job.seed)  # of the head, and of random weights
    encoder = source.encoder(job.untrained, cfg.dropout)
    if cfg.embed_rms:
        pretrained.scale_embeddings(encoder, cfg.embed_rms)
    head = new_head(cfg, source, task.data)
    if task.head and not job.untrained:
        head.load_state_dict(task.head)
    return Classifier(encoder, head)


# ------------------------------------------------------------------------------ one fine-tuning


class Tuning:
    """The state of one fine-tuning."""

    def __init__(self, task: Task, job: Job, model: Classifier):
        cfg, lengths = task.cfg, task.data.train.lengths
        self.device, self.data, self.job = task.device, task.data, job
        self.model = model.train()
        # every epoch has the same batches in another order
        order = classifier.training_order(len(lengths), job.seed)
        if not cfg.fairseq_exact:
            order = classifier.group_lengths(lengths, order, BATCHES_GROUPED * cfg.batch_size)
        self.batches = classifier.cut_batches(lengths, order, cfg.batch_size, cfg.max_tokens)
        # Adam has the settings of pretraining, but for these two
        weights = Separate(model, model.encoder, task.device.amp)
        rules = OptimConfig(clip_norm=cfg.clip_norm, weight_decay=cfg.weight_decay)
        self.optimizer = Optimizer(weights, rules, task.device, cfg.update_freq)
        self.num_updates = 0

        # the schedule: where the learning rate is 0, where the run ends, how long it warms up
        longest = cfg.max_epoch * math.ceil(len(self.batches) / cfg.update_freq)  # 0: no limit
        self.total = cfg.max_update or longest
        self.end = min(self.total, longest or self.total)
        self.warmup = cfg.warmup_updates
        if self.warmup < 0:
            self.warmup = round(WARMUP_SHARE * self.total)


def tuning_lr_at(updates: int, lr: float, warmup: int, total: int) -> float:
    """Learning rate after so many updates: linear from 0 to lr, then linear to 0 at `total`."""
    if warmup and updates <= warmup:
        return lr * updates / warmup
    return lr * max(0.0, 1 - (updates - warmup) / max(1, total - warmup))


def forward(tuning: Tuning, ids: np.ndarray) -> Tensor:
    """Training examples through the model -> the sum of their loss ()."""
    train = tuning.data.train
    tokens, padded = classifier.pad([train.rows[i] for i in ids])  # (B, T)
    with tuning.device.autocast():
        outputs = tuning.model(tuning.device.tensor(tokens), padded)  # (B, classes)
    return loss_sum(outputs, tuning.device.tensor(train.labels[ids]))


def tuning_step(tuning: Tuning, groups: list[np.ndarray]) -> dict | None:
    """One optimizer step over some batches.

    Returns its log row, or None if float16 overflowed, which is no update. Raises RunError.
    """
    done, optimizer = tuning.num_updates, tuning.optimizer
    lr = tuning_lr_at(done, tuning.job.lr, tuning.warmup, tuning.total)
    tuning.device.seed(tuning.job.seed + done)  # of dropout
    total = optimizer.begin()
    for ids in groups:
        loss = forward(tuning, ids)
        optimizer.backward(loss)
        total += loss.detach()
    size = sum(len(ids) for ids in groups)
    step = optimizer.step(lr, done, total, torch.tensor([size, size, 0]))
    if step is None:
        if optimizer.loss_scale < LOWEST_LOSS_SCALE:
            raise RunError("gradients overflow float16 at any scale; lower --lr, or --amp bf16")
        return None

    loss, gnorm = step.loss.item() / size, step.gnorm.item()
    if not math.isfinite(loss + gnorm):
        text = f"update {done + 1}: loss {loss}, gradient norm {gnorm}"
        raise RunError(f"{text}; try a lower --lr")
    tuning.num_updates += 1
    return dict(num_updates=done + 1, loss=loss, sample_size=size, gnorm=gnorm, lr=lr)


def validate(task: Task, model: Classifier, splits: dict[str, Split]) -> dict[str, dict]:
    """The figures of each split, without dropout."""
    model.eval()
    figures = {}
    for name, split in splits.items():
        outputs = classifier.outputs_of(model, task.device, split, task.cfg)
        figures[name] = figures_of(outputs, split, task.data.names)
    model.train()
    return figures


class Outlet:
    """Where one fine-tuning writes, finetune.jsonl and checkpoint_best.pt; and its best figures."""

    def __init__(self, task: Task, job: Job, save_dir: SaveDir, folder: Path):
        self.task, self.job, self.save_dir = task, job, save_dir
        self.path = folder / report.BEST
        # an older log stays until the first save, as all of an older fine-tuning
        self.part = folder / "finetune.new.jsonl"
        self.log = open(self.part, "w", buffering=1, encoding="utf-8")
        self.best = None  # the best validation so far: where it was, and the figures of each split

    def write(self, row: dict):
        self.log.write(json.dumps(row) + "\n")

    def validation(self, figures: dict, model: Classifier, where: str, **place):
        """Log a validation, and keep its model if it is the best so far.

        where: in words; place: entries of its row.
        """
        metric, valid = self.task.metric, figures["valid"]
        row = {f"{split}_{k}": v for split, part in figures.items() for k, v in part.items()}
        self.write(place | row)
        is_first = self.best is None
        is_best = is_first or valid[metric] > self.best["valid"][metric]
        if is_best:
            place.pop("epoch", None)
            self.best = place | figures
            self.save_dir.save(contents_of(self.task, model), self.path)
        if is_first:
            os.replace(self.part, self.part.with_name("finetune.jsonl"))
        shown = f"valid loss {valid['loss']:.4f}, {metric} {valid[metric]:.4f}"
        say(f"{self.job.name}: {where}: {shown}")


def tuning_loop(tuning: Tuning, task: Task, outlet: Outlet, signals: Signals):
    """Fine-tune to the end, or to a signal.

    There is a validation after each epoch and after the last update.
    """
    end, freq, epoch = tuning.end, task.cfg.update_freq, 0
    bar = tqdm(total=end, desc=outlet.job.name, unit=" updates", disable=None, file=sys.stderr)
    is_over = False
    while not is_over:
        epoch += 1
        batches = classifier.epoch_batches(tuning.batches, outlet.job.seed, epoch)
        for i in range(0, len(batches), freq):  # the last update takes what is left
            row = tuning_step(tuning, batches[i : i + freq])
            if row is None:
                row = dict(num_updates=tuning.num_updates, overflow=True)
            else:
                bar.set_postfix_str(f"loss {row['loss']:.4f}", refresh=False)
                bar.update()
            outlet.write(row | dict(epoch=epoch))
            is_over = tuning.num_updates >= end or signals.stop > 0
            if is_over:
                break

        # the epoch, or the run, is over
        figures = validate(task, tuning.model, tuning.data.valid)
        done = tuning.num_updates
        where = f"update {done:,} of {end:,}, epoch {epoch}"
        outlet.validation(figures, tuning.model, where, num_updates=done, epoch=epoch)
    bar.close()


def fine_tune(task: Task, outlet: Outlet, signals: Signals):
    """One fine-tuning; the outlet has what it reaches."""
    job = outlet.job
    model = new_classifier(task, job).to(task.device.torch_device)
    if job.is_probe:
        for decay, figures in baselines.probes(model.eval(), task.device, task.data, task.cfg):
            outlet.validation(figures, model, f"weight decay {decay:g}", decay=decay)
    else:
        tuning_loop(Tuning(task, job, model), task, outlet, signals)
    outlet.log.close()
    # the test split is scored once, by the best checkpoint
    if task.data.test and not signals.stop:
        best = checkpoint.load(outlet.path)
        model.encoder.load_state_dict(checkpoint.stripped(best.student, "encoder."))
        model.head.load_state_dict(best.content["classifier"]["head"])
        outlet.best |= validate(task, model, {"test": task.data.test})


def contents_of(task: Task, model: Classifier) -> dict:
    """What checkpoint.load reads as a checkpoint of ours without a teacher; and the classifier."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    head = checkpoint.stripped(state, "head.")
    settings = dict(vars(task.source.shape))
    settings["data_path"] = str(Path(task.cfg.save_dir).resolve())
    settings["tokens_per_sample"] = task.source.shape.max_source_positions
    labels = dict(labels=task.data.names, texts=task.data.texts, header=task.data.header)
    return convert.beginning(task.cfg.seed) | dict(
        config=settings,
        dictionary=task.text.dictionary.entry(),
        student={k: v for k, v in state.items() if k.startswith("encoder.")},
        classifier=dict(head=head, **labels, label_scale=task.cfg.label_scale),
        teacher={},
    )


# ---------------------------------------------------------------------------------- all of them


def finetune(cfg: FinetuneConfig, device: Device) -> int:
    """Read the data; fine-tune at each learning rate with each seed; report."""
    folder = Path(cfg.save_dir)
    # what is wrong shows before anything is made
    report.older_results(folder, cfg.ckpt, cfg.overwrite)
    task = read_task(cfg, device)
    jobs = report.jobs_of(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock(folder))
        # once more: another fine-tuning may have ended here in the meantime
        older = report.older_results(folder, cfg.ckpt, cfg.overwrite)
        save_dir = SaveDir(folder, older, task.text.files)
        report.describe(task.source, task.data, task.metric, max(job.lr for job in jobs))
        bag = baselines.bag_of_tokens(task.data, len(task.text.dictionary), task.metric)
        report.say_bag(bag, task.metric)

        results = []
        signals = stack.enter_context(Signals(device))
        for job in jobs:
            place = folder if len(jobs) == 1 else folder / job.name.replace(" ", "_")
            place.mkdir(exist_ok=True)
            results.append(Outlet(task, job, save_dir, place))
            fine_tune(task, results[-1], signals)
            group = [result for result in results if result.job.group == job.group]
            report.keep_best(group, task.metric)
            if signals.stop:
                print(f"stopped by a signal; {folder} has the best so far", file=sys.stderr)
                return 128 + signals.stop
        report.finish(results, bag, task.metric, folder)
    return 0


def main(argv: list | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if any(word.replace("-", "_").startswith("__config_") for word in argv):
        raise InputError("--config_name, --config_dir are for pretraining; --task sets a recipe")
    # what the flags say, then with what they imply
    (cfg, where), _ = flags.parse(PARTS, __doc__, argv)
    (cfg, where), _ = flags.parse(PARTS, __doc__, argv, base=implied(cfg))
    cfg.check()
    if worker()[1] > 1:
        raise InputError("fine-tuning runs on one device; start it without torchrun")
    device = open_device(where)
    try:
        return predict.predict(cfg, device) if cfg.predict else finetune(cfg, device)
    finally:
        device.close()


if __name__ == "__main__":
    flags.program(main)
