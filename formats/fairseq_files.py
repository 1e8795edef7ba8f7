"""Reads the files that torch.save wrote, fairseq's of any age, without running code from them.

Files of older fairseq releases hold objects of its own classes (argparse's Namespace, OmegaConf's
containers). Each is replaced by an inert object that only keeps its state.
"""

import collections
import operator
import pickle
import types

from run import checkpoint

import torch

STORAGES = "Float Double Half BFloat16 Long Int Short Char Byte Bool".split()


def load(path, mmap: bool):
    """What torch.save wrote at `path`: tensors, plain Python values, and in place of any other
    object an Inert whose class has its name.

    Settings, which old fairseq files store as objects, become dicts. Raises whatever torch raises
    for a damaged or foreign file.
    """
    # torch's own reader refuses every class that is not on its list
    try:
        return checkpoint.load_plain(path, mmap)
    except pickle.UnpicklingError:
        options = dict(map_location="cpu", mmap=mmap, pickle_module=INERT_PICKLE)
        return _plain(torch.load(str(path), weights_only=False, **options), {}, keep=True)


def without_objects(content):
    """The same content with None in place of each Inert, so that torch.save can write it."""
    return _plain(content, {}, keep=False)


class Inert:
    """Replaces an object whose class must not run: it keeps the state, and ignores all else that
    a pickle does to it."""

    state = None

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def ignore(self, *args, **kwargs):
        return self

    # what a pickle's opcodes call, apart from setting the state
    __call__ = __setitem__ = append = extend = add = ignore


class _InertUnpickler(pickle._Unpickler):
    """The unpickler written in Python, since one in C has no load_build to override."""

    # what may be called: it makes tensors and dicts
    ALLOWED = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    }
    ALLOWED |= {("torch", f"{kind}Storage"): getattr(torch, f"{kind}Storage") for kind in STORAGES}
    ALLOWED |= {(known.__module__, known.__name__): known for known in checkpoint.NPU}

    def load_build(self):
        # pickle's own sets attributes of whatever it is told to, torch's functions among them
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].state = state

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}

    def find_class(self, module, name):
        allowed = self.ALLOWED.get((module, name))
        # a class of the same name, for _settings and for messages
        return allowed or type(name[:100], (Inert,), {"__module__": module})


INERT_PICKLE = types.SimpleNamespace(
    __name__="inert_pickle",
    Unpickler=_InertUnpickler,
    load=lambda file, **options: _InertUnpickler(file, **options).load(),
)


def _plain(node, seen: dict, keep: bool):
    """`node` with every inert object replaced by the settings that it holds, if any.

    keep: whether the others stay, else they become None. seen: id -> result, so that shared parts
    stay shared and a cycle ends.
    """
    if id(node) in seen:
        return seen[id(node)]
    if isinstance(node, Inert):
        seen[id(node)] = node if keep else None  # for a node that holds itself
        settings = _settings(node)
        if settings is not node:
            seen[id(node)] = _plain(settings, seen, keep)
    elif isinstance(node, dict):
        is_ordered = isinstance(node, collections.OrderedDict)
        seen[id(node)] = copy = collections.OrderedDict() if is_ordered else {}
        for key, value in node.items():
            if not isinstance(key, Inert):
                copy[key] = _plain(value, seen, keep)
    elif isinstance(node, list):
        seen[id(node)] = copy = []
        copy.extend(_plain(value, seen, keep) for value in node)
    elif isinstance(node, tuple):
        parts = tuple(_plain(value, seen, keep) for value in node)
        # torch.save writes an object once, however often it occurs
        seen[id(node)] = node if all(map(operator.is_, parts, node)) else parts
    else:
        return None if isinstance(node, type) else node
    return seen[id(node)]


def _settings(node: Inert):
    """What a Namespace, or one of OmegaConf's containers and nodes, holds; else the node itself."""
    if not isinstance(node.state, dict):
        return node
    if type(node).__name__ == "Namespace":
        return node.state
    for key in ("_content", "_val"):
        if key in node.state:
            return node.state[key]
    return node
