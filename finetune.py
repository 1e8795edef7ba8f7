"""Fine-tune a pretrained encoder on labelled text: a task of GLUE, your own files, or fairseq's binarized folders.

    python finetune.py --ckpt FILE --task cola --data_path GLUE/CoLA --save_dir DIR       GLUE's files as shipped
    python finetune.py --ckpt FILE --train F --valid F --text COL[,COL] --label COL --save_dir DIR      your own
    python finetune.py --ckpt FILE --data_path DIR --save_dir DIR                         folders input0, input1, label
    python finetune.py --ckpt DIR/checkpoint_best.pt --predict LINES                      class names, probabilities

FILE may be a checkpoint of this project or of fairseq, a bare state dict, or a Hugging Face folder. --task sets the
reference's recipe; flags override it. `--seeds 5 --lr 1e-5,2e-5` fine-tunes five times at each learning rate, and
`--untrained` does the same from random weights, for comparison. DIR receives finetune.jsonl (a row for each update and
validation), results.json, and checkpoint_best.pt with the names of the classes.

Source: fairseq at commit 3f6ba43f, task and criterion `sentence_prediction`, model `roberta`, and its GLUE recipe.
"""

import json
import math
import sys
from pathlib import Path

from config import METRICS, RECIPES, DeviceConfig, FinetuneConfig, InputError, OptimConfig, RunError
from run import flags

PARTS = [FinetuneConfig, DeviceConfig]

if __name__ == "__main__":
    flags.answer_early(PARTS, __doc__)  # torch takes seconds to import


import convert
from hardware.device import LOWEST_LOSS_SCALE, Device
from hardware.opening import open_device, worker
from hardware.vectors import Separate
from optim import Optimizer
from run import checkpoint
from run.guard import check_memory
from run.lock import Lock
from tasks import baselines as bag
from tasks import labelled, predict, pretrained, report
from tasks.classifier import (
    Classifier,
    LinearProbe,
    SentenceHead,
    figures_of,
    loss_sum,
    outputs_of,
    state_of,
)
from tasks.data import Data, read_data
from tasks.labelled import Split
from tasks.linear_probe import probe

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

BATCHES_GROUPED = 16  # examples are sorted by length within this many batches; more leave less padding, less is chance


def implied(given: FinetuneConfig) -> dict:
    """What --task and --fairseq_exact set; flags override it. given: the config as the flags alone make it."""
    values = {}
    if given.task != "none":
        size, lr, updates, warmup, metric = RECIPES[given.task]
        values = dict(batch_size=size, lr=(lr,), max_update=updates, metric=metric)
        if given.max_update:  # another length keeps the recipe's share
            values["warmup_share"] = warmup / updates
        elif given.warmup_share == FinetuneConfig.warmup_share:
            values["warmup_updates"] = warmup
        if given.task == "stsb":
            values.update(regression=True, label_scale=5.0)
    if given.fairseq_exact:
        values.update(dropout=0.0, attention_dropout=0.0)
    return values


# ---------------------------------------------------------------------------------------------- one fine-tuning


def lr_at(updates: int, lr: float, warmup: int, total: int) -> float:
    """Learning rate after `updates` finished ones: linear warm-up from 0 to lr, then linear to 0 at `total`."""
    if warmup and updates <= warmup:
        return lr * updates / warmup
    return lr * max(0.0, 1 - (updates - warmup) / max(1, total - warmup))


class Run:
    """The state of one fine-tuning."""

    def __init__(
        self,
        cfg: FinetuneConfig,
        device: Device,
        model: Classifier,
        data: Data,
        lr: float,
        seed: int,
    ):
        self.cfg, self.device, self.data, self.lr, self.seed = cfg, device, data, lr, seed
        self.model = model.to(device.torch_device).train()
        order = labelled.training_order(len(data.train.rows), seed)
        if not cfg.fairseq_exact:
            order = labelled.group_lengths(
                data.train.lengths, order, BATCHES_GROUPED * cfg.batch_size
            )
        self.batches = labelled.cut_batches(
            data.train.lengths, order, cfg.batch_size, cfg.max_tokens
        )
        per_epoch = -(-len(self.batches) // cfg.update_freq)
        self.total = (
            cfg.max_update or cfg.max_epoch * per_epoch
        )  # where the learning rate reaches 0
        self.end = min(self.total, cfg.max_epoch * per_epoch) if cfg.max_epoch else self.total
        self.warmup = (
            round(cfg.warmup_share * self.total) if cfg.warmup_updates < 0 else cfg.warmup_updates
        )
        weights = Separate(self.model, self.model.encoder, device.amp)
        rules = OptimConfig(cfg.clip_norm, cfg.adam_betas, cfg.adam_eps, cfg.weight_decay)
        self.optimizer = Optimizer(weights, rules, device, cfg.update_freq)
        self.num_updates = 0

    def updates_of(self, epoch: int) -> list:
        """The batches of each update of an epoch, as lists of row numbers; the last update takes what is left."""
        batches, freq = labelled.epoch_batches(self.batches, self.seed, epoch), self.cfg.update_freq
        return [batches[i : i + freq] for i in range(0, len(batches), freq)]


def forward(run: Run, ids: np.ndarray) -> Tensor:
    """Training examples through the model -> the sum of their loss ()."""
    tokens, padded = labelled.pad([run.data.train.rows[i] for i in ids])
    with run.device.autocast():
        outputs = run.model(run.device.tensor(tokens), padded)
    return loss_sum(outputs, run.device.tensor(run.data.train.labels[ids]))


def update(run: Run, batches: list) -> dict | None:
    """One optimizer step. Returns its log row, or None if float16 overflowed, which is no update. Raises RunError."""
    lr = lr_at(run.num_updates, run.lr, run.warmup, run.total)
    run.device.seed(run.seed + run.num_updates)
    size, total = sum(map(len, batches)), run.optimizer.begin()
    for ids in batches:
        loss = forward(run, ids)
        run.optimizer.backward(loss)
        total += loss.detach()
    step = run.optimizer.step(lr, run.num_updates, total, torch.tensor([size, size, 0]))
    if step is None:
        if run.optimizer.loss_scale < LOWEST_LOSS_SCALE:
            raise RunError(
                "gradients overflow float16 at any loss scale; lower --lr, or use --amp bf16"
            )
        return None
    loss, gnorm = step.loss.item() / size, step.gnorm.item()
    if not math.isfinite(loss + gnorm):
        raise RunError(
            f"update {run.num_updates + 1}: loss {loss}, gradient norm {gnorm}; try a lower --lr"
        )
    run.num_updates += 1
    return dict(num_updates=run.num_updates, loss=loss, sample_size=size, gnorm=gnorm, lr=lr)


def evaluate(run: Run, splits: dict[str, Split]) -> dict[str, dict]:
    """The figures of each split, without dropout."""
    run.model.eval()
    found = {}
    for name, split in splits.items():
        outputs = outputs_of(run.model, run.device, split, run.cfg)
        found[name] = figures_of(outputs, split, run.data.names)
    run.model.train()
    return found


def train(run: Run, metric: str, name: str, write, save) -> dict:
    """Fine-tune to the end. write(row) takes the log's rows; save() keeps the model, which is the best so far.

    Returns the best validation's figures of each split, and its update.
    """
    best, waited, epoch = None, 0, 0
    with tqdm(total=run.end, desc=name, unit=" updates", disable=None, file=sys.stderr) as bar:
        while run.num_updates < run.end and not (run.cfg.patience and waited >= run.cfg.patience):
            epoch += 1
            for batches in run.updates_of(epoch):
                row = update(run, batches)
                write({**(row or dict(num_updates=run.num_updates, overflow=True)), "epoch": epoch})
                if row:
                    bar.set_postfix_str(f"loss {row['loss']:.4f}", refresh=False)
                    bar.update()
                if run.num_updates >= run.end:
                    break

            found = evaluate(run, run.data.valid)
            flat = {
                f"{split}_{k}": v for split, figures in found.items() for k, v in figures.items()
            }
            write(dict(num_updates=run.num_updates, epoch=epoch, **flat))
            better = best is None or found["valid"][metric] > best["valid"][metric]
            waited = 0 if better else waited + 1
            if better:
                best = dict(num_updates=run.num_updates, **found)
                save()
            shown = f"{name}: update {run.num_updates:,} of {run.end:,}, epoch {epoch}"
            tqdm.write(
                f"{shown}: valid loss {found['valid']['loss']:.4f}, {metric} {found['valid'][metric]:.4f}"
            )
    return best


# ---------------------------------------------------------------------------------------------- all of them


class Program:
    """What all fine-tunings of one command share: the encoder to start from, and the labelled text."""

    def __init__(self, cfg: FinetuneConfig, device: Device):
        self.cfg, self.device, self.folder = cfg, device, Path(cfg.save_dir)
        self.source = pretrained.load(cfg.ckpt or cfg.init_from, cfg.teacher, cfg.attention_heads)
        check_memory(
            self.source.shape, self.source.vocabulary, device, copies=2 if cfg.freeze else 5
        )
        self.dictionary, tokenize, self.texts = pretrained.prepare_text(cfg, self.source)
        self.data = read_data(cfg, self.source.longest, self.dictionary, tokenize)
        allowed = METRICS[:4] if self.data.names else METRICS[4:]
        self.metric = (
            cfg.metric if cfg.metric != "auto" else "accuracy" if self.data.names else allowed[-1]
        )
        if self.metric not in allowed:
            raise InputError(f"--metric {self.metric}: choose from {', '.join(allowed)}")

    def run(self, lr: float, seed: int, untrained: bool, alone: bool) -> dict:
        """One fine-tuning; alone: in --save_dir itself, else in a folder under it. Returns its best figures."""
        cfg, device, data = self.cfg, self.device, self.data
        name = f"{'untrained ' * untrained}{'probe' if cfg.freeze else f'lr {lr:g}'} seed {seed}"
        folder = self.folder if alone else self.folder / name.replace(" ", "_")
        folder.mkdir(exist_ok=True)
        path = folder / "checkpoint_best.pt"
        run = Run(cfg, device, self.new_model(seed, untrained), data, lr, seed)
        with open(folder / "finetune.jsonl", "w", buffering=1, encoding="utf-8") as log:

            def write(row: dict):
                log.write(json.dumps(row) + "\n")

            def save():
                checkpoint.save(self.contents(run.model), path)

            if cfg.freeze:
                best = probe(run.model, device, data, cfg, self.metric, name, write, save)
            else:
                best = train(run, self.metric, name, write, save)
        if data.test:
            run.model.load_state_dict(state_of(checkpoint.load(path)))
            best["test"] = evaluate(run, {"test": data.test})["test"]
        return dict(name=name, lr=lr, seed=seed, untrained=untrained, checkpoint=str(path), **best)

    def new_model(self, seed: int, untrained: bool) -> Classifier:
        cfg, source, outputs = self.cfg, self.source, self.data.outputs
        self.device.seed(seed)
        rates = {
            name: getattr(cfg, name)
            for name in ("dropout", "attention_dropout", "activation_dropout")
        }
        encoder, width = source.encoder(untrained, **rates), source.shape.embed_dim
        if cfg.embed_rms:
            pretrained.scale_embeddings(encoder, cfg.embed_rms)
        of_mean = cfg.freeze or cfg.pool == "mean"
        head = (
            LinearProbe(width, outputs)
            if of_mean
            else SentenceHead(width, outputs, cfg.pooler_dropout)
        )
        if cfg.init_from and source.head and not untrained:
            checkpoint.put(source.head, head, "the classification head", source.path)
        return Classifier(encoder, head)

    def contents(self, model: Classifier) -> dict:
        """What checkpoint.load reads as a checkpoint of this project without a teacher, and the classifier."""
        state, symbols = (
            {k: v.detach().cpu() for k, v in model.state_dict().items()},
            self.dictionary,
        )
        place = dict(data_path=str(self.folder.resolve()), tokens_per_sample=self.source.longest)
        return convert.beginning(self.cfg.seed) | dict(
            config={**vars(self.source.shape), **place},
            dictionary=dict(size=len(symbols), digest=symbols.digest(), mask_id=symbols.mask_id),
            student={k: v for k, v in state.items() if k.startswith("encoder.")},
            classifier=dict(
                head={
                    k.removeprefix("head."): v for k, v in state.items() if k.startswith("head.")
                },
                labels=self.data.names,
                texts=self.data.texts,
                label_scale=self.cfg.label_scale,
            ),
            teacher={},
        )


def finetune(cfg: FinetuneConfig, device: Device) -> int:
    folder = Path(cfg.save_dir)
    older = report.prepare(folder, cfg.ckpt or cfg.init_from, cfg.overwrite)
    lock = Lock(folder)
    try:
        program, results = Program(cfg, device), []
        report.remove(older)
        pretrained.write_text_files(folder, program.texts, replace=bool(older))
        lrs = (0.0,) if cfg.freeze else cfg.lr
        report.describe(program.source, program.data, program.metric, lrs)
        counted = bag.fit(program.data, len(program.dictionary), program.metric)
        report.say([counted], program.metric, report.BAG)
        plan = [
            (lr, seed, u)
            for u in (False, True)[: 1 + cfg.untrained]
            for lr in lrs
            for seed in seeds_of(cfg, u)
        ]
        for lr, seed, untrained in plan:
            results.append(program.run(lr, seed, untrained, alone=len(plan) == 1))
            report.keep_best(results, program.metric)
        report.finish(results, counted, program.metric, folder)
    finally:
        lock.release()
    return 0


def seeds_of(cfg: FinetuneConfig, untrained: bool) -> list[int]:
    """A probe on given features is the same at every seed."""
    return list(range(cfg.seed, cfg.seed + (1 if cfg.freeze and not untrained else cfg.seeds)))


def main(argv: list | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if any(word.replace("-", "_").startswith(("__config_name", "__config_dir")) for word in argv):
        raise InputError(
            "--config_name, --config_dir: those settings are for pretraining; --task sets GLUE's recipe"
        )
    (cfg, where), _ = flags.parse(PARTS, __doc__, argv)
    (cfg, where), _ = flags.parse(PARTS, __doc__, argv, base=implied(cfg))
    cfg.check()
    if worker()[1] > 1:
        raise InputError("fine-tuning runs on one device; start it without torchrun")
    device = open_device(where)
    try:
        return predict.predict(cfg, device) if cfg.predict else finetune(cfg, device)
    except KeyboardInterrupt:
        print(
            "\nfinetune.py: interrupted; a checkpoint_best.pt that was written stays",
            file=sys.stderr,
        )
        return 130
    except (RuntimeError, MemoryError) as e:
        if isinstance(e, RunError) or not device.is_out_of_memory(e):
            raise
        said = " ".join(str(e).split())[:200]
        raise RunError(
            f"out of memory; lower --batch_size or --max_tokens, raise --update_freq; {said}"
        ) from None
    finally:
        device.close()


if __name__ == "__main__":
    flags.program(main)
