"""The paper's other column: masked language modelling (RoBERTa's objective) in the same setup, alone or beside data2vec.

    python train.py --data_path DIR --objective mlm --mask_multiple_length 1 --mask_prob 0.15 \\
        --random_token_prob 0.1 --leave_unmasked_prob 0.1                     the paper's baseline (table 4)
    python train.py --data_path DIR --mlm_weight 1                            data2vec, and the words beside it

Alone, the loss is the cross-entropy of the word at every place chosen for masking; beside data2vec, at the places that
show `<mask>`, so that both losses have the same places. Source: Liu et al. 2019, 'RoBERTa' (arXiv 1907.11692); names as
in fairseq's RobertaLMHead.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import Batch, BlockDataset
from model import ModelConfig, data2vec_loss, teacher_targets


def places_of(batch: Batch, cfg: ModelConfig) -> Tensor:
    """The flat places (M,) that enter the loss."""
    return batch.chosen if cfg.objective == "mlm" else batch.masked


def words_of(batch: Batch, cfg: ModelConfig) -> Tensor:
    """The tokens (M,) that were there before masking. With objective=mlm the batch must hold whole blocks."""
    return batch.target.flatten().index_select(0, batch.chosen if cfg.objective == "mlm" else batch.target_places)


def word_loss(logits: Tensor, words: Tensor) -> Tensor:
    """Cross-entropy of logits (M, V) and words (M,), in nats, summed; float32, ()."""
    return F.cross_entropy(logits.float(), words, reduction="sum")


def loss_of(run, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The objective's loss () of a batch on the device, and prediction and target (M, C) of its data2vec part, of no
    place if it has none. run: a train.Run."""
    cfg = run.cfg.model
    if cfg.objective == "mlm":
        logits = run.student(batch.source, batch.chosen, batch.source_padded)  # (M, V)
        none = logits.new_zeros(0, cfg.embed_dim)
        return word_loss(logits, words_of(batch, cfg)), none, none
    target = teacher_targets(run.teacher, batch, cfg)
    prediction, logits = run.student(batch.source, batch.masked, batch.source_padded)
    loss = data2vec_loss(prediction, target, cfg) + cfg.mlm_weight * word_loss(logits, words_of(batch, cfg))
    return loss, prediction, target


@torch.no_grad()
def evaluate_words(run, dataset: BlockDataset, train: BlockDataset) -> dict:
    """How well the student names hidden words, over all workers: mean cross-entropy in nats, what always answering with
    the word frequencies of the training split gets, perplexity, and accuracy."""
    device, cfg = run.device, run.cfg.model
    counts = np.ones(len(train.dictionary))  # as if each word had been seen once more
    for tokens in train.stream.checked(train.dictionary):
        counts += np.bincount(tokens, minlength=len(counts))
    frequency = torch.tensor(np.log(counts / counts.sum()), dtype=torch.float32, device=device.torch_device)
    sums = torch.zeros(4, device=device.torch_device)
    run.student.eval()
    for host in dataset.batches(dataset.epoch_batches(1, device.rank, device.world_size), 1):
        batch = device.upload(host)
        words = words_of(batch, cfg)
        with device.autocast():
            found = run.student(batch.source, places_of(batch, cfg), batch.source_padded)
        logits = found if cfg.objective == "mlm" else found[1]
        hits = (logits.argmax(1) == words).sum()
        sums += torch.stack([word_loss(logits, words), hits, -frequency[words].sum(), hits.new_tensor(len(words))])
    run.student.train()
    loss, hits, unigram, places = device.all_reduce(sums).tolist()
    loss, unigram = loss / max(1, places), unigram / max(1, places)
    return dict(
        mlm_loss=loss,
        mlm_loss_frequency=unigram,
        mlm_perplexity=math.exp(min(loss, 700)),
        mlm_accuracy=hits / max(1, places),
        mlm_places=int(places),
    )
