"""Does a device compute what the CPU does? `python bench.py --check` trains a few updates on both.

From the same weights, on the same batches, without dropout: here as a run would, and on the CPU in
float32 with torch's own kernels. The only file of this room that stands above train.py.
"""

import dataclasses
import functools

from config import Config, RunError
from data import Corpus
from hardware import kernels
from hardware.device import CPU, LOWEST_LOSS_SCALE, Device
from train import Run, turns, update

import torch

# Largest difference, relative to the CPU's value, by the type of the device's matmuls; weights: of
# how far they have moved. What a CPU has is in docs/ascend.md; these are guesses until a card is
# measured.
BOUNDS = {
    None: dict(forward=2e-5, gradient=1e-4, loss=2e-5, norm=1e-3, weights=0.01),
    torch.float16: dict(forward=5e-3, gradient=0.01, loss=2e-3, norm=0.01, weights=0.05),
    torch.bfloat16: dict(forward=0.03, gradient=0.05, loss=0.01, norm=0.05, weights=0.2),
}


def check(cfg: Config, device: Device, corpus: Corpus, updates: int) -> dict:
    """Compare the same updates here and on the CPU.

    In the order in which an update makes them: each layer's output, the targets and predictions,
    the loss, and the gradients from the last layer to the first, all of update 1; then loss and
    gradient norm of every update, and the weights after the last one.

    Returns the largest of each kind (what, its difference, its bound), and what is beyond first.
    """
    # no dropout; a warm-up so short that weights move; no clipping, or one wrong gradient would
    # change all that Adam sees
    off = dict(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    off["mask_noise_std"] = 0.0  # each kind of device draws noise of its own
    warmup = min(2, cfg.train.warmup_updates)
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, **off),
        optim=dataclasses.replace(cfg.optim, clip_norm=0),
        train=dataclasses.replace(cfg.train, compile=False, warmup_updates=warmup),
    )
    with kernels.plain():
        theirs = record(cfg, CPU, corpus, updates)
    ours = record(cfg, device, corpus, updates)

    largest, beyond = {}, []
    for name, a in ours.items():
        first = name.split()[0]
        kind = first if first in BOUNDS[None] else "forward"
        bound = BOUNDS[device.amp][kind]
        b = theirs[name]
        difference = float((a - b).norm() / b.norm().clamp(min=1e-30))
        # written so that NaN is the largest, and beyond any bound
        if kind not in largest or not difference <= largest[kind][1]:
            largest[kind] = name, difference, bound
        if not difference <= bound:
            beyond.append(name)
    return dict(largest=largest, beyond=len(beyond), first=beyond[0] if beyond else None)


def record(cfg: Config, device: Device, corpus: Corpus, updates: int) -> dict:
    """{name: float32 tensor on the host} in the order in which `check` compares them."""
    run = Run(cfg, device, len(corpus.dictionary))
    run.load(spread(run.student), spread(run.teacher), "")
    outputs, start = watch_layers(run), weights_of(run)
    rows = {}
    source = endless(run, corpus)
    for number in range(1, updates + 1):
        batches = next(source)
        done = None
        while done is None:  # again with half the loss scale where float16 overflowed
            if run.optimizer.loss_scale < LOWEST_LOSS_SCALE:
                raise RunError("--check: float16 overflows at any loss scale")
            done = update(run, batches)
        if number == 1:
            prediction, target = done.last_batch
            rows |= outputs | {"targets": on_host(target), "predictions": on_host(prediction)}
        rows[f"loss {number}"] = on_host(done.step.loss)
        if number == 1:
            # Adam's first moment is now the gradient times 1 - its decay; last weights first
            names = [name for name, _ in run.student.named_parameters()]
            for i, moments in reversed(run.optimizer.state()["state"].items()):
                rows[f"gradient of {names[i]}"] = on_host(moments["exp_avg"])
        rows[f"norm of the gradients {number}"] = on_host(done.step.gnorm)
    source.close()
    return rows | {name: end - start[name] for name, end in weights_of(run).items()}


def endless(run: Run, corpus: Corpus):
    """The batches of each update, epoch after epoch."""
    for turn in turns(run, corpus):
        yield turn.batches
        run.epoch += turn.ends_epoch


def spread(module: torch.nn.Module) -> dict:
    """Its weights, the matrices so large that a layer keeps its input's size.

    At a run's own start they are so small that every GELU is almost a straight line and every
    attention a plain mean: much could be wrong and not be seen.
    """
    state = {name: p.cpu() for name, p in module.state_dict().items()}
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Linear):
            weight = state[f"{name}.weight"]
            state[f"{name}.weight"] = weight / weight.std() * weight.shape[1] ** -0.5
    return state


def watch_layers(run: Run) -> dict:
    """{name: a layer's last output}, filled by each update in the order in which it computes."""
    outputs = {}

    def keep(name, layer, inputs, results):
        outputs[name] = on_host(results[0])

    for who, encoder in (("teacher", run.teacher), ("student", run.student.encoder)):
        for i, layer in enumerate(encoder.layers):
            layer.register_forward_hook(functools.partial(keep, f"{who}'s layer {i}"))
    return outputs


def weights_of(run: Run) -> dict:
    """All of the student's weights in one vector, and all of the teacher's."""
    vectors = {}
    for name, network in (("student", run.student), ("teacher", run.teacher)):
        weights = [on_host(p).flatten() for p in network.parameters()]
        vectors[f"weights of the {name}"] = torch.cat(weights)
    return vectors


def on_host(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to("cpu", torch.float32, copy=True)  # a moment changes with the next update


def print_check(result: dict):
    """The largest difference of each kind, then the verdict."""
    print(f"{'compared':10} {'largest':>9} {'bound':>8}  where")
    for kind, (name, difference, bound) in result["largest"].items():
        print(f"{kind:10} {difference:9.2g} {bound:8.2g}  {name}")
    first = result["first"]
    print("as the CPU computes" if first is None else f"beyond its bound first: {first}")
