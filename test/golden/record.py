"""Record what fairseq does with the text of rule.py: docs/golden.md says in which Python and with
which packages.

    python test/golden/record.py FOLDER     FOLDER/golden gets corpus, numbers and a checkpoint

fairseq's own commands run, in this process; what they compute is looked at on the way. Nothing of
it is changed but two things: the first weights are those of rule.py, and what is recorded as
"changed" comes from batches made as in its repository, which has changed them since the release.
"""

import contextlib
import hashlib
import json
import os
import platform
import sys
import types
from pathlib import Path

import fairseq
import fairseq.data.mask_tokens_dataset as masking
import numpy as np
import rule
import torch
from fairseq.data import data_utils
from fairseq.trainer import Trainer
from fairseq_cli import hydra_train, preprocess, train

EXAMPLES = Path(fairseq.__file__).parent / "examples"
RECIPES = EXAMPLES / "data2vec" / "config" / "text" / "pretraining"
PLAIN = (
    "common.fp16=false common.cpu=true common.tensorboard_logdir=null dataset.num_workers=0"
    " distributed_training.distributed_world_size=1 hydra.run.dir=. hydra.output_subdir=null"
    " common.user_dir=examples/data2vec task.data=golden/corpus"
).split()

# the settings that differ from fairseq's base.yaml; its names without their groups, as here
BATCHES = dict(
    doc=dict(sample_break_mode="complete_doc", tokens_per_sample=64, max_tokens=512),
    complete=dict(sample_break_mode="complete", tokens_per_sample=48, max_tokens=700),
    none=dict(sample_break_mode="none", tokens_per_sample=32, max_tokens=1000),
    eos=dict(sample_break_mode="eos", tokens_per_sample=96, max_tokens=300),
)
BATCHES["complete"].update(batch_size=16, random_token_prob=0.2, leave_unmasked_prob=0.1, seed=7)
BATCHES["none"].update(mask_stdev=1.5, mask_prob=0.5)
BATCHES["eos"].update(mask_multiple_length=2, seed=5)
RUN = dict(BATCHES["doc"], max_update=60, save_interval_updates=40, warmup_updates=10, lr=0.003)
RUN.update(ema_decay=0.9, ema_end_decay=0.99, ema_anneal_end_step=40, average_top_k_layers=2)
RUN.update(embed_dim=16, ffn_embed_dim=32, layers=2, attention_heads=2, max_source_positions=64)
RUN.update(dropout=0, attention_dropout=0, clip_norm=1)
GROUPS = {
    "common": "seed",
    "task": "sample_break_mode tokens_per_sample mask_prob mask_multiple_length random_token_prob"
    " leave_unmasked_prob",
    "+task": "mask_stdev",  # what base.yaml does not name is added
    "dataset": "max_tokens batch_size",
    "checkpoint": "save_interval_updates save_dir",
    "optimization": "max_update lr clip_norm",
    "lr_scheduler": "warmup_updates",
    "model": "ema_decay ema_end_decay ema_anneal_end_step average_top_k_layers",
    "model.transformer": "dropout attention_dropout max_source_positions",
    "model.transformer.encoder": "embed_dim ffn_embed_dim layers attention_heads",
}


def fairseq_train(settings: dict):
    """fairseq-hydra-train with its recipe for text and these settings, in the current folder."""
    groups = {name: group for group, names in GROUPS.items() for name in names.split()}
    sys.argv = ["fairseq-hydra-train", "--config-dir", str(RECIPES), "--config-name", "base"]
    sys.argv += PLAIN
    for name, value in settings.items():
        sys.argv.append("{}.{}={}".format(groups[name], name, [value] if name == "lr" else value))
    hydra_train.cli_main()


@contextlib.contextmanager
def changed():
    """The two changes to the batches that fairseq's repository has and its release 0.12.2 has not:
    the masks' numbers come from numpy's default_rng, seeded as before; a last batch that is no
    multiple of 8 blocks is dropped."""
    before = masking.np, masking.data_utils, data_utils.batch_by_size
    numpy = types.SimpleNamespace(**vars(np))

    @contextlib.contextmanager
    def numpy_seed(*key):
        drawn = np.random.default_rng(int(hash(key) % 1e6))
        draws = dict(rand=drawn.random, choice=drawn.choice, normal=drawn.normal)
        numpy.random = types.SimpleNamespace(**draws)
        yield

    def batch_by_size(*args, **options):
        batches = before[2](*args, **options)
        if len(batches[-1]) % options["required_batch_size_multiple"]:
            batches = batches[:-1]
        return batches

    masking.np, masking.data_utils = numpy, types.SimpleNamespace(numpy_seed=numpy_seed)
    data_utils.batch_by_size = batch_by_size
    yield
    masking.np, masking.data_utils, data_utils.batch_by_size = before


def digests(iterator, mask: int) -> dict:
    """Counts and digests of the batches that a loader yields."""
    counts = dict.fromkeys(("batches", "empty", "sentences", "tokens", "masked"), 0)
    shas = {name: hashlib.sha256() for name in ("source", "target", "ids")}
    for sample in iterator:
        counts["batches"] += 1
        if not sample:
            counts["empty"] += 1
            continue
        source, target = sample["net_input"]["src_tokens"], sample["net_input"]["target_tokens"]
        for name, tensor in (("source", source), ("target", target), ("ids", sample["id"])):
            shas[name].update(np.ascontiguousarray(tensor.numpy().astype(np.int64)))
        counts["sentences"] += len(source)
        counts["tokens"] += int(source.ne(1).sum())
        counts["masked"] += int(source.eq(mask).sum())
    return dict(counts, **{"sha256_" + name: sha.hexdigest() for name, sha in shas.items()})


def record_batches(settings: dict, workers: int) -> dict:
    """{split, epoch, worker: figures} of two epochs as each worker sees them, and of the validation
    split."""
    found = {}
    for rank in range(workers):

        class Worker(Trainer):
            data_parallel_world_size, data_parallel_rank = workers, rank

        def look(cfg, trainer, task, epochs):  # in place of the training of an epoch
            shuffle = epochs.next_epoch_idx > cfg.dataset.curriculum
            key = "train epoch {} worker {} of {}".format(epochs.next_epoch_idx, rank, workers)
            found[key] = digests(epochs.next_epoch_itr(shuffle=shuffle), task.mask_idx)
            if workers == 1 and epochs.epoch == 1:
                valid = trainer.get_valid_iterator("valid").next_epoch_itr(shuffle=False)
                found["valid epoch 1 worker 0 of 1"] = digests(valid, task.mask_idx)
            return [None], epochs.epoch == 2

        real = train.Trainer, train.train
        train.Trainer, train.train = Worker, look
        small = {name: RUN[name] for name in ("embed_dim", "layers", "attention_heads")}
        fairseq_train(dict(settings, **small))
        train.Trainer, train.train = real
    return found


def used(model) -> list:
    """(name, weight) of all that are trained. The release's layers have more, such as `fc1_weight`,
    for a fast path that training does not take: zeros that stay zeros."""
    return [
        (name, p) for name, p in model.named_parameters() if name.endswith((".weight", ".bias"))
    ]


def record_run(folder: str) -> dict:
    """Figures of each update and validation, unrounded; fairseq saves its checkpoints in the
    folder."""
    updates, validations = [], []

    class Looking(Trainer):
        def __init__(self, cfg, task, model, *others):
            shapes = {name: tuple(p.shape) for name, p in used(model)}
            with torch.no_grad():
                for name, first in rule.weights(shapes).items():
                    model.get_parameter(name).copy_(torch.from_numpy(first))
            super().__init__(cfg, task, model, *others)

        def train_step(self, *samples):
            self.lr_used = self.get_lr()
            return super().train_step(*samples)

        def _reduce_and_log_stats(self, logs, sample_size, grad_norm=None):
            size = sum(log["sample_size"] for log in logs)
            row = dict(loss=float(sum(log["loss"] for log in logs)) / size, sample_size=size)
            if grad_norm is None:
                validations[-1].append(row)
            else:
                row["nsentences"] = sum(log["nsentences"] for log in logs)
                row.update(gnorm=float(grad_norm), lr=self.lr_used)
                row["ema_decay"] = logs[0]["ema_decay"] / 1000
                updates.append(row)
            return super()._reduce_and_log_stats(logs, sample_size, grad_norm)

        def begin_valid_epoch(self, epoch):
            validations.append([])
            super().begin_valid_epoch(epoch)

    real, train.Trainer = train.Trainer, Looking
    fairseq_train(dict(RUN, save_dir=folder))
    train.Trainer = real
    losses = []
    for rows in validations:
        size = sum(row["sample_size"] for row in rows)
        total = sum(row["loss"] * row["sample_size"] for row in rows)
        losses.append(dict(loss=total / size, sample_size=size))
    return dict(updates=updates, validations=losses)


def main(folder: Path):
    golden = folder / "golden"
    golden.mkdir(parents=True)
    os.chdir(str(folder))  # the settings in the checkpoint name no folder of this machine
    for split in rule.LINES:
        Path(split + ".txt").write_text(rule.text(split))
    sys.argv = "fairseq-preprocess --only-source --nwordssrc 200 --destdir golden/corpus".split()
    sys.argv += "--trainpref train.txt --validpref valid.txt".split()
    preprocess.cli_main()
    (golden / "corpus" / "preprocess.log").unlink()
    torch.set_num_threads(1)
    numbers = dict(fairseq=fairseq.__version__, torch=torch.__version__, numpy=np.__version__)
    numbers["python"] = platform.python_version()
    numbers.update(settings=dict(batches=BATCHES, run=RUN), batches={}, run={})
    for name, batches in (("released", contextlib.nullcontext), ("changed", changed)):
        with batches():
            numbers["batches"][name] = {k: record_batches(v, 1) for k, v in BATCHES.items()}
            numbers["batches"][name]["doc"].update(record_batches(BATCHES["doc"], 2))
            numbers["run"][name] = record_run("checkpoints/" + name)
    Path("checkpoints", "released", "checkpoint_2_40.pt").rename(golden / "checkpoint_2_40.pt")
    (golden / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
