"""The paper's other column: masked language modelling in the same setup, alone or beside data2vec.

    python train.py --data_path DIR --objective mlm --mask_multiple_length 1 --mask_prob 0.15 \\
        --random_token_prob 0.1 --leave_unmasked_prob 0.1                     the paper's baseline (table 4)
    python train.py --data_path DIR --mlm_weight 1                            data2vec, and the words beside it

Alone, the loss is the cross-entropy of the word at every place chosen for masking; beside data2vec, at the places that
show `<mask>`, so that both losses have the same places. Source: Liu et al. 2019, 'RoBERTa' (arXiv 1907.11692); names as
in fairseq's RobertaLMHead.
"""

import math

from config import ModelConfig
from data import Batch, BlockDataset
from model import data2vec_loss, teacher_targets

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def places_of(batch: Batch, cfg: ModelConfig) -> Tensor:
    """The flat places (M,) that enter the loss."""
    return batch.chosen if cfg.objective == "mlm" else batch.masked


def words_of(batch: Batch, cfg: ModelConfig) -> Tensor:
    """The tokens (M,) that were there before masking. With objective=mlm the batch must hold whole blocks."""
    return batch.target.flatten().index_select(
        0, batch.chosen if cfg.objective == "mlm" else batch.target_places
    )


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
    loss = data2vec_loss(prediction, target, cfg) + cfg.mlm_weight * word_loss(
        logits, words_of(batch, cfg)
    )
    return loss, prediction, target


class WordFigures:
    """How well the student names hidden words, over all workers, beside the word frequencies of the training split."""

    def __init__(self, run, train: BlockDataset | None):
        """Without a training split the frequencies are not known, and left out."""
        self.device, self.frequency = run.device, None
        if train is not None:
            counts = (
                train.stream.counts(train.dictionary) + 1.0
            )  # as if each word had been seen once more
            self.frequency = run.device.tensor(np.log(counts / counts.sum()).astype(np.float32))
        self.sums = torch.zeros(4, device=run.device.torch_device)

    def add(self, logits: Tensor, words: Tensor):
        """Take in a batch's logits (M, V) and its words (M,)."""
        hits, places = (logits.argmax(1) == words).sum(), words.new_tensor(len(words))
        unigram = places * 0 if self.frequency is None else -self.frequency[words].sum()
        self.sums += torch.stack([word_loss(logits, words), hits, unigram, places])

    def figures(self) -> dict:
        """Mean cross-entropy in nats, that of the frequencies, perplexity, accuracy, and the number of places."""
        loss, hits, unigram, places = self.device.all_reduce(self.sums).tolist()
        loss, unigram = loss / max(1, places), unigram / max(1, places)
        known = {} if self.frequency is None else dict(mlm_loss_frequency=unigram)
        rest = dict(mlm_perplexity=math.exp(min(loss, 700)), mlm_accuracy=hits / max(1, places))
        return dict(mlm_loss=loss, **known, **rest, mlm_places=int(places))
