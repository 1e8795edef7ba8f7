"""What is computed and what is masked: data2vec 2.0 for text.

Four ideas make data2vec cheaper by several times (section 3 of the paper):

3.1  Contextualized targets. The teacher, an EMA of the student's layers, reads the whole block. A
     target is the mean over its last layers, each normalized over the places of the block. Student
     and teacher read the same features: tokens and positions, embedded once.
3.2  The encoder sees only what is visible. Hidden tokens are left out, not replaced by `<mask>`:
     the layers work on half the tokens. After them noise is put at the hidden places, and a
     decoder of a few convolutions predicts there.
3.3  Many masks for one target. A block is copied, and each copy gets a mask of its own, so that one
     pass of the teacher serves all of them.
3.4  For text single tokens are hidden, at random, and as many in each copy.

Source: Baevski et al. 2022, 'Efficient self-supervised learning with contextualized target
representations' (arXiv 2212.07525); details as in fairseq's examples/data2vec/models/data2vec2.py
with config/v2/base_text_only_task.yaml, at commit 3f6ba43f.

Shapes: B blocks, K copies of each (row b K + k is copy k of block b), T tokens, L visible places of
a row, C width, D width of the decoder, N hidden places of all rows.
"""

from dataclasses import dataclass

from config import Config, ModelConfig
from data import Batch
from hardware import kernels
from model import (
    LAYER_NORM_EPS,
    Data2VecText,
    Encoder,
    RegressionHead,
    at_places,
    data2vec_loss,
    init_weights,
    mean_of_layers,
)
from text.binarized import PAD

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

# ------------------------------------------------------------------------------------------- masks


@dataclass(frozen=True, kw_only=True)
class Copies(Batch):
    """Masked copies of whole blocks: `target` is (B, T), all else is of the K copies.

    `source` (BK, T) shows <pad> at hidden places; `masked` (N,) are flat places in it, in the order
    of rows and places.
    """

    visible: np.ndarray  # (BK, L): flat places in `target` that the student reads
    restore: np.ndarray  # (BK, T): where a place lies in the BK rows of L outputs and T - L noises
    pads_count: bool  # in the statistics of the targets, and for the decoder


def masked_copies(batch: Batch, update: int, cfg: Config, copies: int) -> Batch:
    """The copies of the blocks that a student learns from after `update` updates, on the host; with
    another objective, the batch as it is.

    Of a batch, which is masked by version 1's rule, only the whole blocks are read. The masks are
    the same on every device.
    """
    if cfg.model.objective != "data2vec2":
        return batch
    exact, tokens = cfg.train.fairseq_exact, batch.target
    B, T = tokens.shape
    K = copies
    # differs from fairseq: there a shape has about 15,625 different masks
    key = cfg.data.seed, update, *batch.ids.tolist()
    seed = reference_seed(*key, copies=K) if exact else hash(key) % 2**63
    uniform = torch.rand(B * K, T, generator=torch.Generator().manual_seed(seed))

    # differs from fairseq: there pads are hidden and predicted like text, and a copy that keeps
    # nothing but pads has the loss NaN
    is_pad = np.zeros_like(tokens, bool) if exact else tokens == PAD
    is_pad = is_pad.repeat(K, 0)  # (BK, T)
    length = T - is_pad.sum(1, keepdims=True)  # (BK, 1)
    left = np.maximum(1, (length * (1 - cfg.data.mask_prob)).astype(np.int64))
    # text in random order, then pads
    order = (uniform + torch.from_numpy(is_pad)).argsort(1).numpy()  # (BK, T)
    # visible text, pads, hidden text: so the student reads as many places of each row
    column = np.arange(T)
    is_hidden = (left <= column) & (column < length)
    order = np.take_along_axis(order, np.argsort(is_hidden * T + column, 1), 1)

    L = max(1, int(T * (1 - cfg.data.mask_prob)))
    rank = np.argsort(order, 1)  # (BK, T): the inverse of the order
    hidden = rank >= T - (length - left)  # (BK, T) bool
    masked = np.flatnonzero(hidden)  # (N,)
    rows = np.arange(B * K)[:, None]
    return Copies(
        source=np.where(hidden, PAD, tokens.repeat(K, 0)),
        target=tokens,
        masked=masked,
        target_places=masked // (K * T) * T + masked % T,
        chosen=masked,
        ids=batch.ids,
        ntokens=batch.ntokens,
        source_padded=batch.target_padded,
        target_padded=batch.target_padded,
        visible=rows // K * T + order[:, :L],
        restore=rows * T + rank,
        pads_count=exact,
    )


def reference_seed(seed: int, update: int, *ids: int, copies: int) -> int:
    """fairseq's seed of a batch's masks, to the bit: float remainders of Python's own hash.

    It is a multiple of 64, but for a few, and depends on the sum of the blocks' numbers only.
    """
    offsets = [0] + [int(hash((seed, i)) % 1e10) for i in range(copies - 1)]
    total = sum(number + offset for number in ids for offset in offsets)
    return int(hash((seed, update, total)) % 1e6)


# ----------------------------------------------------------------------------------- the student


class Decoder(nn.Module):
    """Convolutions over time, each with LayerNorm and GELU, then Linears with GELU between."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        C, D = cfg.embed_dim, cfg.decoder_dim
        form = dict(padding=cfg.decoder_kernel // 2, groups=cfg.decoder_groups)
        widths = [C] + [D] * (cfg.decoder_layers - 1)
        convolutions = [nn.Conv1d(width, D, cfg.decoder_kernel, **form) for width in widths]
        # names blocks.0.0, proj.0, proj.2 as in the reference
        self.blocks = nn.ModuleList(nn.ModuleList([conv]) for conv in convolutions)
        self.proj = RegressionHead(cfg, D)
        self.residual = cfg.decoder_residual

    def forward(self, x: Tensor, places: Tensor, real: Tensor | None) -> Tensor:
        """x (BK, T, C) -> features (N, D) at the flat places (N,).

        real (BK, T, 1): True at text, what lies elsewhere is read as 0; None: read all.
        """
        T = x.shape[1]
        for (conv,) in self.blocks:
            # differs from fairseq, whose decoder reads pads: as beyond the ends of a block
            if real is not None:
                x = x * real
            y = conv(x.transpose(1, 2))[:, :, :T].transpose(1, 2)  # (BK, T, D)
            y = kernels.gelu(F.layer_norm(y, y.shape[-1:], eps=LAYER_NORM_EPS))
            x = x + y if self.residual and x.shape == y.shape else y
        return at_places(x, places)


class Data2Vec2(nn.Module):
    """The student: an encoder for the visible tokens, and the decoder.

    The teacher is an `Encoder` of its own, made by `ema.make_teacher`, of which only the layers are
    used.
    """

    regression_head = lm_head = None  # heads of version 1

    def __init__(self, cfg: ModelConfig, vocabulary_size: int):
        super().__init__()
        state = torch.get_rng_state()
        self.encoder = Encoder(cfg, vocabulary_size)
        self.decoder = Decoder(cfg)
        self.noise_std = cfg.mask_noise_std
        torch.set_rng_state(state)
        self.draw_weights()

    def draw_weights(self):
        """Version 1's first weights, but torch's own for convolutions; in the reference's order, so
        that on a CPU they are equal to the bit."""
        words, positions = self.encoder.embed_tokens, self.encoder.embed_positions
        rest = [*self.decoder.modules(), *self.encoder.layers.modules()]
        for module in (words, positions, positions, *rest):  # positions twice, as there
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for module in (words, positions, *rest):
            init_weights(module)

    @record_function("student")
    def forward(self, batch: Copies) -> tuple[Tensor, Tensor, Tensor | None]:
        """Predictions at the hidden places (N, C), and what the teacher reads: the features of the
        whole blocks (B, T, C), and where text is (B, T) bool, or None for everywhere."""
        x, features, real = self.decoded(batch, batch.masked)
        return self.decoder.proj(x), features.detach(), real

    def decoded(self, batch: Copies, places: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `forward`, with the decoder's features (N, D) at any flat places (N,) of the rows in
        place of the predictions."""
        features, real = self.encoder.features(batch.target, batch.target_padded)
        rows, L = batch.visible.shape
        T = features.shape[1]

        # only visible places
        x = at_places(features, batch.visible.flatten()).view(rows, L, -1)  # (BK, L, C)
        attend = None
        if real is not None:
            seen = at_places(real, batch.visible.flatten())
            attend = kernels.mask(seen.view(rows, L))
        x, _ = self.encoder(None, embedded=(x, attend))  # (BK, L, C)

        # all places in their order, with noise where tokens were left out
        noise = x.new_zeros(rows, T - L, x.shape[2])
        if self.training:  # differs from fairseq: none in evaluation, as there is no dropout
            noise.normal_(0, self.noise_std)
        x = torch.cat([self.encoder.dropout(x), noise], 1)
        x = at_places(x, batch.restore.flatten()).view(rows, T, -1)  # (BK, T, C)
        text = None
        if real is not None and not batch.pads_count:
            text = real.repeat_interleave(rows // len(real), 0)[:, :, None]
        return self.decoder(x, places, text), features, real


def make_student(cfg: ModelConfig, vocabulary_size: int) -> nn.Module:
    """The student of the objective."""
    network = Data2Vec2 if cfg.objective == "data2vec2" else Data2VecText
    return network(cfg, vocabulary_size)


# ------------------------------------------------------------------------------- targets and loss


@torch.no_grad()
@record_function("teacher")
def targets_of_copies(
    teacher: Encoder, features: Tensor, real: Tensor | None, batch: Copies, cfg: ModelConfig
) -> Tensor:
    """What the student has to predict (N, C), float32; once a block, for all of its copies.

    features (B, T, C) and real (B, T), or None, as the student's forward returns them.
    """
    attend = None if real is None else kernels.mask(real)
    _, layers = teacher(None, top_k=cfg.average_top_k_layers, embedded=(features, attend))
    # differs from fairseq: there pads count in the mean and variance of a block
    all_count = real is None or batch.pads_count
    weight = torch.ones_like(features[:, :, :1]) if all_count else real[:, :, None].float()
    y = mean_of_layers(layers, weight, cfg)  # (B, T, C)
    return at_places(y, batch.target_places)


def loss_of_copies(student, teacher, batch: Copies, cfg: ModelConfig) -> tuple:
    """The loss () of a batch on the device, and prediction and target (N, C)."""
    prediction, features, real = student(batch)  # (N, C), and what the teacher reads
    target = targets_of_copies(teacher, features, real, batch, cfg)  # (N, C), no gradient
    loss = data2vec_loss(prediction, target, cfg)
    return loss, prediction, target
