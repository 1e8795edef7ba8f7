"""Does a device compute what the CPU does? `python bench.py --check` trains the same few updates on both.

From the same weights, on the same batches, without dropout: here as a run would, and on the CPU in float32 with torch's
own kernels (`hardware.kernels.plain`). Compared are, in the order in which an update makes them, each layer's output, the
targets and predictions, the loss, and the gradients from the last layer to the first, all of update 1; then loss and
gradient norm of every update, and the weights after the last one.
"""

import contextlib
import dataclasses

import config
import train
from config import RunError
from data import Corpus
from hardware import kernels
from hardware.device import Device

import torch

# Largest difference, relative to the CPU's value, by the type in which the device's matmuls run. weights: how far they
# have moved. Some three to thousand times what a CPU has, which docs/ascend.md lists: guesses until a card is measured.
BOUNDS = {
    None: dict(forward=2e-5, gradient=1e-4, loss=2e-5, norm=1e-3, weights=0.01),
    torch.float16: dict(forward=5e-3, gradient=0.01, loss=2e-3, norm=0.01, weights=0.05),
    torch.bfloat16: dict(forward=0.03, gradient=0.05, loss=0.01, norm=0.05, weights=0.2),
}


def check(cfg: config.Config, device: Device, corpus: Corpus, updates: int) -> dict:
    """Train on both. largest: by kind (what, its difference, its bound); first: the first beyond its bound, or None."""
    model = dataclasses.replace(
        cfg.model, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0
    )
    warmup = min(2, cfg.train.warmup_updates)  # so that the weights move
    optim = dataclasses.replace(
        cfg.optim, clip_norm=0
    )  # else one wrong gradient changes all that Adam sees
    settings = dataclasses.replace(cfg.train, compile=False, warmup_updates=warmup)
    cfg = dataclasses.replace(cfg, model=model, optim=optim, train=settings)
    with kernels.plain():
        theirs = record(cfg, Device(torch.device("cpu"), "CPU", None), corpus, updates)
    ours = record(cfg, device, corpus, updates)
    largest, beyond = {}, []
    for (name, a), (other, b) in zip(ours, theirs, strict=True):
        assert name == other, (name, other)
        kind, found = kind_of(name), difference(a, b)
        bound = BOUNDS[device.amp][kind]
        if (
            kind not in largest or not found <= largest[kind][1]
        ):  # NaN is the largest, and beyond any bound
            largest[kind] = name, found, bound
        if not found <= bound:
            beyond.append(name)
    return dict(largest=largest, beyond=len(beyond), first=beyond[0] if beyond else None)


def kind_of(name: str) -> str:
    first = name.split()[0]
    return first if first in BOUNDS[None] else "forward"


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The norm of a - b, relative to that of b."""
    return float((a - b).norm() / b.norm().clamp(min=1e-30)) if a.shape == b.shape else float("inf")


def spread(module: torch.nn.Module) -> dict:
    """Its weights, the matrices so large that a layer keeps its input's size. At a run's own start they are so small
    that every GELU is almost a straight line and every attention a plain mean: much could be wrong and not be seen."""
    state = {k: v.cpu() for k, v in module.state_dict().items()}
    matrices = [
        f"{name}.weight"
        for name, part in module.named_modules()
        if isinstance(part, torch.nn.Linear)
    ]
    return state | {
        name: state[name] / state[name].std() * state[name].shape[1] ** -0.5 for name in matrices
    }


def on_host(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to("cpu", torch.float32, copy=True)  # a moment changes with the next update


def weights_of(run: train.Run) -> list:
    """Of the student and of the teacher, each in one vector."""
    return [
        torch.cat([on_host(p).flatten() for p in module.parameters()])
        for module in (run.student, run.teacher)
    ]


def record(cfg: config.Config, device: Device, corpus: Corpus, updates: int) -> list:
    """[(name, float32 tensor on the host), ...] in the order that the docstring of this file has."""
    run = train.Run(cfg, device, len(corpus.dictionary))
    run.load(*map(spread, (run.student, run.teacher)), "")
    begin, found, layers_out, hooks = weights_of(run), [], {}, []
    for who, layers in (("teacher", run.teacher.layers), ("student", run.student.encoder.layers)):
        for i, layer in enumerate(layers):

            def keep(layer, inputs, outputs, name=f"{who}'s layer {i}"):
                layers_out[name] = on_host(outputs[0])

            hooks.append(layer.register_forward_hook(keep))
    with contextlib.closing(train.turns(run, corpus)) as source:
        for number in range(1, updates + 1):
            turn = next(source)
            for _ in range(40):
                done = train.update(run, turn.batches)
                if done is not None:  # else float16 overflowed: again, with half the loss scale
                    break
            else:
                raise RunError(
                    f"--check: float16 overflows in update {number} on {device.type} at any loss scale"
                )
            run.epoch += turn.ends_epoch
            for hook in hooks:
                hook.remove()
            found += layers_out.items() if number == 1 else []
            if number == 1 and not cfg.model.predicts_words:
                prediction, target = done.last_batch
                found += [("targets", on_host(target)), ("predictions", on_host(prediction))]
            found.append((f"loss {number}", on_host(done.loss)))
            if number == 1:  # Adam's first moment is then the gradient times 1 - its decay
                state = run.optimizer.state()["state"]
                names = [name for name, _ in run.student.named_parameters()]
                found += [
                    (f"gradient of {name}", on_host(state[i]["exp_avg"]))
                    for i, name in enumerate(names)
                ][::-1]
            found.append((f"norm of the gradients {number}", on_host(done.gnorm)))
    moved = [after - before for after, before in zip(weights_of(run), begin)]
    return [*found, ("weights of the student", moved[0]), ("weights of the teacher", moved[1])]


def print_check(result: dict):
    """The largest difference of each kind, then the verdict."""
    print(f"{'compared':10} {'largest':>9} {'bound':>8}  where")
    for kind, (name, found, bound) in result["check"]["largest"].items():
        print(f"{kind:10} {found:9.2g} {bound:8.2g}  {name}")
    first = result["check"]["first"]
    print("as the CPU computes" if first is None else f"beyond its bound first: {first}")
