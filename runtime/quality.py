"""What the loss cannot tell: figures of a run's predictions and targets, and the validation that reports them."""

import torch
import torch.nn.functional as F

from config import InputError
from data import BlockDataset
from model import data2vec_loss, teacher_targets


def moments(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Sums over the M places from which `quality` computes its figures, (6, C) float32; those of several batches add
    up."""
    p, t = prediction.float(), target.float()
    unit = F.normalize(t, dim=-1)
    cosine = F.normalize(p, dim=-1) * unit
    return torch.stack([x.sum(0) for x in (p, p.square(), t, t.square(), unit, cosine)])


def quality(sums: torch.Tensor, count: int) -> dict:
    """Variances over the masked places, averaged over channels: near 0 is a collapse.

    cosine: mean cosine of prediction and target; cosine_constant: what always predicting the mean target would get.
    """
    p, p2, t, t2, unit, cosine = (sums.cpu().double() / max(1, count)).unbind()
    constant = float((F.normalize(t, dim=0) * unit).sum())
    return dict(
        target_var=float((t2 - t.square()).clamp(min=0).mean()),
        pred_var=float((p2 - p.square()).clamp(min=0).mean()),
        cosine=float(cosine.sum()),
        cosine_constant=constant,
    )


@torch.no_grad()
def evaluate(run, dataset: BlockDataset) -> dict:
    """Validation loss per masked place and the figures of `quality`, over all workers, without dropout. run: a
    train.Run. Raises InputError if nothing is masked."""
    device, cfg = run.device, run.cfg.model
    run.student.eval()
    loss = torch.zeros((), device=device.torch_device)
    sums = torch.zeros(6, cfg.embed_dim, device=device.torch_device)
    sample_size = batches = 0
    for host in dataset.batches(dataset.epoch_batches(1, device.rank, device.world_size), 1):
        batch = device.upload(host)
        with device.autocast():
            target = teacher_targets(run.teacher, batch, cfg)
            prediction = run.student(batch.source, batch.masked, batch.source_padded)
            loss += data2vec_loss(prediction, target, cfg)
        sums += moments(prediction, target)
        sample_size, batches = sample_size + host.sample_size, batches + 1
    run.student.train()
    counts = torch.tensor([sample_size, batches], device=device.torch_device)
    for tensor in (loss, sums, counts):
        device.all_reduce(tensor)
    sample_size, batches = counts.tolist()
    if sample_size == 0:
        raise InputError(f"{dataset.stream.folder}: {dataset.split} has nothing masked; is --mask_prob too small?")
    return dict(loss=float(loss) / sample_size, sample_size=sample_size, batches=batches, **quality(sums, sample_size))
