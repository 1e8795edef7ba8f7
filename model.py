"""What is computed: data2vec for text.

A student encoder reads masked text; at the masked places a small head predicts what an EMA teacher,
reading the unmasked text, computes inside its upper layers.

Source: Baevski et al. 2022, 'data2vec', sections 3.3 and 4.3 (arXiv 2202.03555); details, names and
defaults as in fairseq's examples/data2vec/models/data2vec_text.py.

Shapes: B blocks, T tokens (padding included), U tokens that the teacher reads, C width, H heads,
M masked places, V words.
"""

import math

from config import InputError, ModelConfig
from hardware import kernels
from text.binarized import PAD

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

LAYER_NORM_EPS = 1e-5


# ----------------------------------------------------------------------------------- the encoder


class Dropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return kernels.dropout(x, self.p) if self.training and self.p else x


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


class GELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return kernels.gelu(x)


def at_places(x: Tensor, places: Tensor) -> Tensor:
    """x (B, T, ...) at flat places (M,) of B x T: (M, ...)."""
    return x.flatten(0, 1).index_select(0, places)


class SelfAttention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.heads, self.dropout = cfg.attention_heads, cfg.attention_dropout
        self.qkv = Linear(cfg.embed_dim, 3 * cfg.embed_dim)  # rows: q, k, v
        self.out_proj = Linear(cfg.embed_dim, cfg.embed_dim)

    def forward(self, x: Tensor, attend: Tensor | None, places: Tensor | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C), or (M, C) at the flat places (M,).

        attend (B, 1, T, T) of `kernels.mask`: where a token may look, or None if everywhere.
        """
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each (B, H, T, C/H)
        dropout = self.dropout if self.training else 0.0
        x = kernels.attention(q, k, v, attend, dropout)
        x = x.transpose(1, 2).reshape(B, T, C)
        return self.out_proj(x if places is None else at_places(x, places))


class EncoderLayer(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.self_attn = SelfAttention(cfg)
        self.self_attn_layer_norm = nn.LayerNorm(cfg.embed_dim, LAYER_NORM_EPS)
        self.fc1 = Linear(cfg.embed_dim, cfg.ffn_embed_dim)
        self.fc2 = Linear(cfg.ffn_embed_dim, cfg.embed_dim)
        self.final_layer_norm = nn.LayerNorm(cfg.embed_dim, LAYER_NORM_EPS)
        self.activation = GELU() if cfg.activation_fn == "gelu" else nn.ReLU()
        self.normalize_before = cfg.normalize_before
        self.dropout = Dropout(cfg.dropout)
        self.activation_dropout = Dropout(cfg.activation_dropout)

    def forward(self, x: Tensor, attend: Tensor | None, places: Tensor | None = None):
        """x (B, T, C) -> the layer's output and its target: (B, T, C), or (M, C) at the places."""
        y = self.self_attn_layer_norm(x) if self.normalize_before else x
        y = self.self_attn(y, attend, places)
        if places is not None:
            x = at_places(x, places)
        x = x + self.dropout(y)
        if self.normalize_before:
            target = self.feed_forward(self.final_layer_norm(x))
            return x + self.dropout(target), target
        x = self.self_attn_layer_norm(x)
        # fc2's output before dropout and residual: what the paper predicts (section 3.3; fairseq
        # calls it fc_results)
        target = self.feed_forward(x)
        return self.final_layer_norm(x + self.dropout(target)), target

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_dropout(self.activation(self.fc1(x))))


class Encoder(nn.Module):
    """Token ids to hidden states. Student and teacher are two of these."""

    def __init__(self, cfg: ModelConfig, vocabulary_size: int):
        super().__init__()
        cfg.check()
        C = cfg.embed_dim
        self.embed_tokens = nn.Embedding(vocabulary_size, C, PAD)
        # positions count from PAD + 1, so that PAD itself has a row, of zeros
        self.embed_positions = nn.Embedding(cfg.max_source_positions + PAD + 1, C, PAD)
        self.layernorm_embedding = nn.LayerNorm(C, LAYER_NORM_EPS)
        self.dropout = Dropout(cfg.dropout)
        self.layers = nn.ModuleList(EncoderLayer(cfg) for _ in range(cfg.layers))
        self.layer_norm = nn.LayerNorm(C, LAYER_NORM_EPS) if cfg.normalize_before else None

    def forward(
        self,
        tokens: Tensor | None,
        padded: bool = True,
        top_k: int = 0,
        places: Tensor | None = None,
        embedded: tuple | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """tokens (B, T) int64 -> the last hidden states, and the targets of the last top_k layers.

        padded: whether PAD may occur in the tokens. places (M,) int64: the only flat places in
        B x T whose output is wanted; the last layer computes no others. embedded: what `embed`
        would return, instead of the tokens.

        States and targets are (B, T, C), meaningless at padded places, or (M, C) with places.
        Raises InputError if a block is longer than the position table.
        """
        x, attend = self.embed(tokens, padded) if embedded is None else embedded
        targets, last = [], len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x, target = layer(x, attend, places if i == last else None)
            if i > last - top_k:
                at_all = places is None or i == last
                targets.append(target if at_all else at_places(target, places))
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        return x, targets

    def embed(self, tokens: Tensor, padded: bool) -> tuple[Tensor, Tensor | None]:
        """What the first layer reads (B, T, C), and where attention may look (B, 1, T, T), or None
        for everywhere."""
        x, real = self.features(tokens, padded)
        return (x, None) if real is None else (x * real[:, :, None], kernels.mask(real))

    def features(self, tokens: Tensor, padded: bool) -> tuple[Tensor, Tensor | None]:
        """Tokens and positions (B, T, C), and where text is (B, T) bool, or None for everywhere."""
        B, T = tokens.shape
        longest = self.embed_positions.num_embeddings - PAD - 1
        if T > longest:
            raise InputError(f"a block of {T} tokens: --max_source_positions is {longest}")
        real = None
        if padded:
            real = tokens != PAD
            positions = real.cumsum(1) * real + PAD  # pads are not counted, wherever they are
        else:
            positions = torch.arange(PAD + 1, PAD + 1 + T, device=tokens.device)
        x = self.embed_tokens(tokens) + self.embed_positions(positions)
        return self.dropout(self.layernorm_embedding(x)), real


# ----------------------------------------------------------------------------------- the student


class RegressionHead(nn.Sequential):
    """`head_layers` Linears with GELU between, widths D, 2D, 2D, ..., C.

    D is what it reads: C, unless another width is given. Numbered 0, 2, 4, ... as in the reference.
    """

    def __init__(self, cfg: ModelConfig, width: int = 0):
        D = width or cfg.embed_dim
        widths = [D] + [2 * D] * (cfg.head_layers - 1) + [cfg.embed_dim]
        parts = []
        for before, after in zip(widths, widths[1:]):
            parts += [Linear(before, after), GELU()]
        super().__init__(*parts[:-1])


class WordHead(nn.Module):
    """Names the word at a place: Linear, GELU, LayerNorm, then the token embedding's transpose and
    a bias. Names as in fairseq's RobertaLMHead."""

    def __init__(self, cfg: ModelConfig, vocabulary_size: int):
        super().__init__()
        self.dense = Linear(cfg.embed_dim, cfg.embed_dim)
        self.layer_norm = nn.LayerNorm(cfg.embed_dim, LAYER_NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (M, C), embedding (V, C) -> logits (M, V)."""
        x = self.layer_norm(kernels.gelu(self.dense(x)))
        return F.linear(x, embedding, self.bias)


@torch.no_grad()
def init_weights(module: nn.Module):
    """BERT's start: N(0, 0.02) for Linear and Embedding, zero for biases and PAD's row."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        module.weight[module.padding_idx].zero_()


class Data2VecText(nn.Module):
    """The student: encoder and regression head, and a head for words if the objective asks for it.

    The teacher is an `Encoder` of its own, made by `ema.make_teacher`.
    """

    def __init__(self, cfg: ModelConfig, vocabulary_size: int):
        super().__init__()
        self.encoder = Encoder(cfg, vocabulary_size)
        self.regression_head = RegressionHead(cfg) if cfg.objective == "data2vec" else None
        self.lm_head = WordHead(cfg, vocabulary_size) if cfg.predicts_words else None
        self.apply(init_weights)

    @record_function("student")
    def forward(self, source: Tensor, masked: Tensor, padded: bool = True) -> Tensor:
        """source (B, T) with `<mask>` at the flat places masked (M,) -> predictions (M, C).

        With a head for words, its logits (M, V) instead, or both. In the autocast type.
        """
        x, _ = self.encoder(source, padded, places=masked)
        if self.lm_head is None:
            return self.regression_head(x)  # (M, C)
        logits = self.lm_head(x, self.encoder.embed_tokens.weight)  # (M, V)
        return logits if self.regression_head is None else (self.regression_head(x), logits)


# ------------------------------------------------------------------------------ targets and losses


@torch.no_grad()
@record_function("teacher")
def teacher_targets(teacher: Encoder, batch, cfg: ModelConfig) -> Tensor:
    """What the student has to predict: the mean of the teacher's last layer targets, each
    normalized (paper, 3.3).

    batch: a `data.Batch` on the teacher's device. Returns (M, C) float32.
    """
    if cfg.norms_over_places:
        return targets_over_places(teacher, batch, cfg)
    top_k = cfg.average_top_k_layers
    _, layers = teacher(batch.target, batch.target_padded, top_k, batch.target_places)
    return mean_of_layers(layers, None, cfg)  # (M, C)


def targets_over_places(teacher: Encoder, batch, cfg: ModelConfig) -> Tensor:
    """`teacher_targets` with norms whose statistics run over the places of a block or a batch, the
    padded ones included as in the reference."""
    target, padded, places = batch.target, batch.target_padded, batch.target_places
    U, width = target.shape[1], batch.source.shape[1]
    if U < width:
        # The teacher's input is squeezed. One padded place stands for all that the reference has,
        # since the pads of a block are all alike.
        target, padded = F.pad(target, (0, 1), value=PAD), True
        places = places + places // U
    pads = target == PAD
    repeats = (width - (~pads).sum(1, keepdim=True)) / pads.sum(1, keepdim=True).clamp(min=1)
    weight = torch.where(pads, repeats, torch.ones_like(repeats))[:, :, None]  # (B, U or U + 1, 1)

    _, layers = teacher(target, padded, cfg.average_top_k_layers)
    y = mean_of_layers(layers, weight, cfg)  # (B, U or U + 1, C)
    return at_places(y, places)  # (M, C)


def mean_of_layers(layers: list[Tensor], weight: Tensor | None, cfg: ModelConfig) -> Tensor:
    """The layers' targets, normalized as asked for and averaged; (B, T, C) -> float32 (B, T, C).

    weight (B, T, 1): how many times a place counts in statistics over places. Without such norms
    the targets may be (M, C), and weight None.
    """
    y = torch.stack(layers).float()  # (K, B, T, C)
    if cfg.batch_norm_target_layer:
        y = standardize(y, weight, (-3, -2))
    if cfg.instance_norm_target_layer:
        y = standardize(y, weight, (-2,))
    if cfg.layer_norm_target_layer:
        y = F.layer_norm(y, y.shape[-1:])
    y = y.mean(0)  # (B, T, C)
    if cfg.layer_norm_targets:
        y = F.layer_norm(y, y.shape[-1:])
    if cfg.instance_norm_targets:
        y = standardize(y, weight, (-2,))
    return y


def standardize(y: Tensor, weight: Tensor, dims: tuple) -> Tensor:
    """Zero mean and unit (biased) variance of y (..., B, T, C) over the axes `dims`, counted from
    the end; each place counts weight (B, T, 1) times."""
    count = weight.sum(dims, keepdim=True)
    mean = (y * weight).sum(dims, keepdim=True) / count
    variance = ((y - mean).square() * weight).sum(dims, keepdim=True) / count
    return (y - mean) * torch.rsqrt(variance + 1e-5)


def data2vec_loss(prediction: Tensor, target: Tensor, cfg: ModelConfig) -> Tensor:
    """Smooth L1 of prediction and target (M, C), summed and scaled; float32, ().

    Squared error for loss_beta 0.
    """
    prediction = prediction.float()
    # mean of nothing would be NaN; the sum of nothing is 0, with gradients of 0
    if cfg.loss_beta == 0:
        loss = F.mse_loss(prediction, target, reduction="sum")
    else:
        loss = F.smooth_l1_loss(prediction, target, reduction="sum", beta=cfg.loss_beta)
    scale = cfg.loss_scale if cfg.loss_scale > 0 else 1 / math.sqrt(prediction.shape[-1])
    return loss * scale


# --------------------------------------------------------------------------- the language model


def places_of(batch, cfg: ModelConfig) -> Tensor:
    """The flat places (M,) of a batch that enter the loss."""
    return batch.chosen if cfg.objective == "mlm" else batch.masked


def words_of(batch, cfg: ModelConfig) -> Tensor:
    """The tokens (M,) that were there before masking; with objective=mlm the blocks are whole."""
    places = batch.chosen if cfg.objective == "mlm" else batch.target_places
    return at_places(batch.target, places)


def word_loss(logits: Tensor, words: Tensor) -> Tensor:
    """Cross-entropy of logits (M, V) and words (M,), in nats, summed; float32, ()."""
    return F.cross_entropy(logits.float(), words, reduction="sum")


def loss_with_words(student, teacher, batch, cfg: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Masked language modelling, alone or beside data2vec: the paper's other column (table 4).

    Returns the loss () of a batch on the device, and prediction and target (M, C) of its data2vec
    part: of no place, if it has none. Source: Liu et al. 2019, 'RoBERTa' (arXiv 1907.11692).
    """
    if cfg.objective == "mlm":
        logits = student(batch.source, batch.chosen, batch.source_padded)  # (M, V)
        none = logits.new_zeros(0, cfg.embed_dim)
        return word_loss(logits, words_of(batch, cfg)), none, none
    target = teacher_targets(teacher, batch, cfg)  # (M, C)
    prediction, logits = student(batch.source, batch.masked, batch.source_padded)
    loss = data2vec_loss(prediction, target, cfg)
    loss = loss + cfg.mlm_weight * word_loss(logits, words_of(batch, cfg))
    return loss, prediction, target
