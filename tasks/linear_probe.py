"""Frozen features and a linear classifier on them: `finetune.py --freeze`."""

from config import InputError, RunError
from hardware.device import Device
from model import PAD
from tasks.classifier import figures_of, mean_state, outputs_of
from tasks.data import Data

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DECAYS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # weight decays to try
STEPS = 200  # of L-BFGS, which needs far fewer


def minimize(weight: Tensor, bias: Tensor, outputs, labels: np.ndarray, decay: float, what: str):
    """Move weight and bias to the least mean loss of outputs() (N, K) plus decay / 2 * sum of the squared weights.

    labels: class numbers or scores (N,). Cross-entropy, or squared error. Raises RunError, which says what has this
    loss, if it is not finite.
    """
    y = torch.from_numpy(labels)
    moved = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(moved, max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        out = outputs()
        loss = F.mse_loss(out.view(-1), y) if y.is_floating_point() else F.cross_entropy(out, y)
        loss = loss + decay / 2 * weight.square().sum()
        if not loss.isfinite():
            raise RunError(f"{what} is {loss.item()}; are the scores too large?")
        loss.backward()
        return loss

    optimizer.step(closure)


def fit(features: Tensor, labels: np.ndarray, outputs: int, decay: float) -> nn.Linear:
    """The Linear with the least mean loss plus decay / 2 * sum of its squared weights, for standardized features.

    features (N, C) float32 on the CPU; labels: class numbers or scores (N,). Cross-entropy, or squared error.
    """
    if len(features) < 2:
        raise InputError("--freeze: one training example; a linear probe needs more")
    mean, scale = features.mean(0), features.std(0).clamp(min=1e-6)
    x = (features - mean) / scale
    linear = nn.Linear(x.shape[1], outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    what = "--freeze: the loss of the linear probe"
    minimize(linear.weight, linear.bias, lambda: linear(x), labels, decay, what)
    with torch.no_grad():  # the same function of features as they come
        linear.weight /= scale
        linear.bias -= linear.weight @ mean
    return linear


def probe(model, device: Device, data: Data, cfg, metric: str, name: str, write, save) -> dict:
    """Compute the features of model.encoder once, and fit model.head with each weight decay; `valid` decides.

    write(row) takes rows of the log; save() keeps the model. Returns the best one's figures.
    """
    model, best = model.eval(), None

    def features(tokens: Tensor, padded: bool) -> Tensor:
        return mean_state(model.encoder(tokens, padded)[0], tokens != PAD)

    train, *valid = (
        outputs_of(features, device, x, cfg, sort=True) for x in (data.train, *data.valid.values())
    )
    for decay in DECAYS:
        linear = fit(train, data.train.labels, data.outputs, decay)
        with torch.no_grad():
            found = {
                k: figures_of(linear(x), data.valid[k], data.names)
                for k, x in zip(data.valid, valid)
            }
        write(
            dict(
                decay=decay,
                **{
                    f"{split}_{k}": v
                    for split, figures in found.items()
                    for k, v in figures.items()
                },
            )
        )
        shown = f"valid loss {found['valid']['loss']:.4f}, {metric} {found['valid'][metric]:.4f}"
        print(f"{name}: weight decay {decay:g}: {shown}")
        if best is None or found["valid"][metric] > best["valid"][metric]:
            best = dict(decay=decay, **found)
            model.head.out_proj.load_state_dict(linear.state_dict())
            save()
    return best
