"""Reads the files that torch.save wrote, fairseq's of any age among them, without running code from
them.

Files of older fairseq releases hold objects of its own classes (argparse's Namespace, OmegaConf's
containers). Each is replaced by an inert object that only keeps its state.
"""

import collections
import pickle
import types

import torch


def load(path, is_archive: bool):
    """What torch.save wrote at `path`: tensors and plain Python values. Any other object becomes
    None, except the settings that old fairseq files store as objects. Raises whatever torch raises
    for a damaged or foreign file.

    Tensors of an archive are the file itself, mapped: copy what is to be kept. Unmapped, an older
    torch (such as 2.1) reads beyond a record that is shorter than the pickle says.
    """
    options = dict(map_location="cpu", mmap=is_archive)
    try:
        return torch.load(str(path), weights_only=True, **options)
    except pickle.UnpicklingError:
        return _plain(
            torch.load(str(path), weights_only=False, pickle_module=_INERT_PICKLE, **options), {}
        )


class _Inert:
    """Replaces an object whose class must not run: keeps the state and ignores everything else a
    pickle does to it."""

    state = None

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setitem__(self, key, value):
        pass

    def __call__(self, *args, **kwargs):
        return self

    def append(self, value):
        pass

    def extend(self, values):
        pass

    def add(self, value):
        pass


class _InertUnpickler(
    pickle._Unpickler
):  # the unpickler in C allocates as much memory as a damaged file asks for
    ALLOWED = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
        **{
            ("torch", f"{kind}Storage"): getattr(torch, f"{kind}Storage")
            for kind in (
                "Float",
                "Double",
                "Half",
                "BFloat16",
                "Long",
                "Int",
                "Short",
                "Char",
                "Byte",
                "Bool",
            )
        },
    }

    def load_build(
        self,
    ):  # pickle's own sets attributes of whatever it is told to, torch's functions among them
        state = self.stack.pop()
        if isinstance(self.stack[-1], _Inert):
            self.stack[-1].state = state

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}

    def find_class(self, module, name):
        return self.ALLOWED.get((module, name)) or type(
            name.rpartition(".")[2] or "Inert", (_Inert,), {}
        )


_INERT_PICKLE = types.SimpleNamespace(
    __name__="inert_pickle",
    Unpickler=_InertUnpickler,
    load=lambda file, **options: _InertUnpickler(file, **options).load(),
)


def _plain(node, seen: dict):
    """`node` with every inert object replaced: a Namespace and OmegaConf's containers and nodes by
    what they hold, the others by None. seen: id -> result, so that shared parts stay shared and a
    cycle ends."""
    if id(node) in seen:
        return seen[id(node)]
    if isinstance(node, _Inert):
        inner = node.state if isinstance(node.state, dict) else None
        if inner and type(node).__name__ != "Namespace":
            inner = next((inner[key] for key in ("_content", "_val") if key in inner), None)
        seen[id(node)] = None  # for a node that holds itself
        seen[id(node)] = _plain(inner, seen)
    elif isinstance(node, dict):
        seen[id(node)] = made = (
            collections.OrderedDict() if isinstance(node, collections.OrderedDict) else {}
        )
        made.update(
            (key, _plain(value, seen)) for key, value in node.items() if not isinstance(key, _Inert)
        )
    elif isinstance(node, list):
        seen[id(node)] = made = []
        made.extend(_plain(value, seen) for value in node)
    elif isinstance(node, tuple):
        seen[id(node)] = tuple(_plain(value, seen) for value in node)
    else:
        return None if isinstance(node, type) else node
    return seen[id(node)]
