"""How the weights lie: each by itself, or those of a model in two long vectors (or four).

Two vectors are for an NPU, where launching a kernel costs more than running it at small batches,
and where several of torch's operators for lists of tensors are loops. The gradient's norm, the
optimizer, the sum over workers, the teacher's average and the cast to 16 bits then take one launch
each instead of hundreds. The numbers are those of separate weights under autocast; test/test_npu.py
compares them.
"""

import itertools

import torch
from torch import nn
from torch.func import functional_call

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam


class Separate:
    """Every weight by itself, as the modules have them."""

    def __init__(self, student: nn.Module, teacher: nn.Module, amp, spares_vectors: bool = False):
        """spares_vectors: weights of one dimension, biases and norms, are not decayed."""
        weights = list(student.parameters())
        spared = [i for i, p in enumerate(weights) if spares_vectors and p.ndim == 1]
        decayed = [i for i in range(len(weights)) if i not in set(spared)]
        self.groups = [decayed, spared]  # the numbers of the student's weights
        self.order = decayed + spared
        self.parameters = [weights[i] for i in self.order]  # what the optimizer moves
        self.decayed = len(decayed)  # so many of these, the first ones, are decayed
        self.averaged = teacher, student.encoder  # what `ema.step` reads: (teacher's, student's)

    def split_state(self, state: dict) -> dict:
        """An optimizer's state of `parameters` -> its state of the student's parameters."""
        return dict(sorted((self.order[i], moments) for i, moments in state.items()))

    def join_state(self, state: dict) -> dict:
        """The reverse of `split_state`."""
        return {i: state[number] for i, number in enumerate(self.order) if number in state}


class LongVectors:
    """The weights of student and teacher in two long vectors each; same names as `Separate`."""

    def __init__(self, student: nn.Module, teacher: nn.Module, amp, spares_vectors: bool = False):
        """amp: the type in which autocast lets layers compute, or None. `spares_vectors` as above,
        for which biases and norms get vectors of their own."""
        self.student = _Vectors(student, amp, spares_vectors)
        self.teacher = _Vectors(teacher, amp, spares_vectors)
        self.parameters = self.student.vectors
        self.decayed = len(self.parameters) // 2 if spares_vectors else len(self.parameters)
        order, names = self.student.order, self.student.names
        parts = names[: self.decayed], names[self.decayed :]
        self.groups = [sorted(order[name] for part in of for name in part) for of in parts]
        self.averaged = _Stretches(self.teacher), _Stretches(self.student, "encoder.")

    def split_state(self, state: dict) -> dict:
        student, out = self.student, {}
        # one entry a vector -> one a weight, under the numbers that torch's AdamW would give
        for i, moments in state.items():
            for name in student.names[i]:
                out[student.order[name]] = dict(step=torch.tensor(float(moments["step"])))
            for key in MOMENTS:
                for name, part in student.split(student.names[i], moments[key]).items():
                    out[student.order[name]][key] = part
        return dict(sorted(out.items()))

    def join_state(self, state: dict) -> dict:
        if not state:  # of an optimizer that has done no step
            return {}
        out = {}
        for i, names in enumerate(self.student.names):
            parts = [state[self.student.order[name]] for name in names]
            out[i] = {key: torch.cat([part[key].flatten() for part in parts]) for key in MOMENTS}
            out[i]["step"] = parts[0]["step"]
        return out


class _Vectors:
    """The weights of one module in `vectors`.

    Its parameters become views of them, and its `forward` reads them there.
    """

    def __init__(self, module: nn.Module, amp: torch.dtype | None, spares_vectors: bool):
        self.amp = amp
        layers = [part for part in module.modules() if isinstance(part, (nn.Linear, nn.Conv1d))]
        linear = {id(p) for part in layers for p in part.parameters()}
        named = dict(module.named_parameters())
        # the numbers that an optimizer's state has
        self.order = {name: i for i, name in enumerate(named)}
        self.shapes = {name: p.shape for name, p in named.items()}
        # what autocast casts, and the rest; a model's names begin with its encoder's in both
        cast = [name for name, p in named.items() if id(p) in linear]
        self.names = [cast, [name for name in named if name not in set(cast)]]
        if spares_vectors:
            flat = {name for name, p in named.items() if p.ndim == 1}
            matrices = [[name for name in names if name not in flat] for names in self.names]
            vectors = [[name for name in names if name in flat] for names in self.names]
            self.names = matrices + vectors
        self.vectors = []
        for names in self.names:
            vector = torch.cat([named[name].detach().flatten() for name in names])
            for name, part in self.split(names, vector).items():
                named[name].data = part
            self.vectors.append(nn.Parameter(vector, requires_grad=named[names[0]].requires_grad))
        # whoever calls the module gets the weights of the vectors, cast once
        self.inner = _ClassForward(module)
        module.forward = self.forward

    def split(self, names: list, vector: torch.Tensor) -> dict:
        """A vector -> {name: its part in the weight's shape}; views."""
        parts = vector.split([self.shapes[name].numel() for name in names])
        return {name: part.view(self.shapes[name]) for name, part in zip(names, parts)}

    def forward(self, *inputs, **named):
        weights = {}
        for i, vector in enumerate(self.vectors):
            if self.amp is not None and i % 2 == 0:
                vector = vector.to(self.amp)  # one cast here, and one of the gradient
            parts = self.split(self.names[i], vector)
            weights |= {f"module.{name}": part for name, part in parts.items()}
        return functional_call(self.inner, weights, inputs, named)


class _ClassForward(nn.Module):
    """Calls the forward of the module's class, whatever the instance's own has become."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **named):
        return type(self.module).forward(self.module, *inputs, **named)


class _Stretches:
    """The vectors, cut where the first part of the weights' names changes, for `ema.step`.

    So what is averaged, or copied, together is one piece, with the name of its first weight. Only
    weights whose names begin with `prefix`, and without it.
    """

    def __init__(self, weights: _Vectors, prefix: str = ""):
        self.parts = []
        for names, vector in zip(weights.names, weights.vectors):
            runs = itertools.groupby(names, lambda name: name.removeprefix(prefix).split(".")[0])
            groups = [list(run) for _, run in runs]
            sizes = [sum(weights.shapes[name].numel() for name in group) for group in groups]
            for (name, *_), part in zip(groups, vector.detach().split(sizes)):
                if name.startswith(prefix):
                    self.parts.append((name.removeprefix(prefix), part))

    def named_parameters(self):
        return iter(self.parts)

    def parameters(self):
        return (part for _, part in self.parts)
