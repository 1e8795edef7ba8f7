"""How few kernels: all weights of a model in two long vectors, so that what concerns every weight is one launch and not
hundreds.

For an NPU, where starting a kernel costs more than running it at small batches, and where several of torch's operators
for lists of tensors are loops. The optimizer, the gradient's norm, the sum over workers, the teacher's average and the
cast to 16 bits then work on vectors. The numbers are those of the separate weights under autocast.
"""

import itertools
import math

import torch
from torch import nn
from torch.func import functional_call


class Flat:
    """Calls `module` with weights taken from `vectors`, which hold them; the module's own parameters become views."""

    def __init__(self, module: nn.Module, amp: torch.dtype | None):
        """amp: the type in which autocast lets Linear layers compute, or None."""
        self.module, self.amp = module, amp
        linear = {id(p) for part in module.modules() if isinstance(part, nn.Linear) for p in part.parameters()}
        named = dict(module.named_parameters())
        self.order = {name: i for i, name in enumerate(named)}  # the numbers that an optimizer's state has
        self.shapes = {name: p.shape for name, p in named.items()}
        # what autocast casts, and the rest; a model's names begin with its encoder's in both
        self.names = [[name for name, p in named.items() if (id(p) in linear) == cast] for cast in (True, False)]
        self.vectors = []
        for names in self.names:
            vector = torch.cat([named[name].detach().flatten() for name in names])
            for name, part in self._split(names, vector):
                named[name].data = part
            self.vectors.append(nn.Parameter(vector, requires_grad=named[names[0]].requires_grad))

    def _split(self, names: list, vector: torch.Tensor) -> list:
        parts = vector.split([math.prod(self.shapes[name]) for name in names])
        return [(name, part.view(self.shapes[name])) for name, part in zip(names, parts, strict=True)]

    def __call__(self, *inputs):
        linear, rest = self.vectors
        linear = linear if self.amp is None else linear.to(self.amp)  # one cast here, and one of the gradient
        return functional_call(
            self.module, dict(self._split(self.names[0], linear) + self._split(self.names[1], rest)), inputs
        )

    def split_state(self, state: dict) -> dict:
        """The state of an optimizer of `vectors` as that of one of the module's parameters, which any device can load;
        views."""
        out = {}
        for i, moments in state.items():
            parts = {k: dict(self._split(self.names[i], v)) for k, v in moments.items() if k != "step"}
            for name in self.names[i]:
                step = torch.tensor(float(moments["step"]))
                out[self.order[name]] = {"step": step, **{k: part[name] for k, part in parts.items()}}
        return dict(sorted(out.items()))

    def join_state(self, state: dict) -> dict:
        """The reverse."""
        out = {}
        for i, names in enumerate(self.names if state else []):
            parts = [state[self.order[name]] for name in names]
            out[i] = {k: torch.cat([part[k].flatten() for part in parts]) for k in parts[0] if k != "step"}
            out[i]["step"] = parts[0]["step"]
        return out


class Stretches:
    """The vectors of a `Flat`, cut where the first part of the weights' names changes; each piece under the name of its
    first weight. Only those whose names begin with `prefix`, and without it."""

    def __init__(self, flat: Flat, prefix: str = ""):
        self.parts = []
        for names, vector in zip(flat.names, flat.vectors):
            begin = 0
            for _, group in itertools.groupby(names, lambda name: name.removeprefix(prefix).split(".")[0]):
                group = list(group)
                size = sum(math.prod(flat.shapes[name]) for name in group)
                if group[0].startswith(prefix):
                    self.parts.append((group[0].removeprefix(prefix), vector.detach()[begin : begin + size]))
                begin += size

    def named_parameters(self):
        return iter(self.parts)

    def parameters(self):
        return (part for _, part in self.parts)
