"""fairseq's checkpoints: one of ours as fairseq would have saved it, and optimizer and position
from one of its own.

    python convert.py --ckpt CHECKPOINT --to fairseq FILE
    python convert.py --ckpt FAIRSEQ.pt --to native FILE

Both ways keep weights, teacher, optimizer and the position in the data bit for bit.
"""

import dataclasses
from collections import OrderedDict

from config import PARTS, InputError, TrainConfig
from eval import saved_settings
from formats import fairseq_config, integrity
from formats.fairseq_names import TEACHER, from_reference, to_reference
from run.checkpoint import MOMENTS, Loaded, checked_moments
from train import lr_at

# The groups of fairseq's config, and the settings in them that we write, under its names. Its
# loader fills in a missing group, but fails on an empty one.
OF_A_MACHINE = {"tensorboard_logdir", "distributed_world_size"}
GROUPS = {
    group: [name for name in names.split() if name not in OF_A_MACHINE]
    for group, names in fairseq_config.GROUPS.items()
    if group != "distributed_training"
} | {"criterion": []}
TRAINING_GROUPS = ("optimization", "optimizer", "lr_scheduler")
# in extra_state of a fairseq file that we wrote: our entries that fairseq has no place for
OURS = "data2vec_text"
# names that a conversion takes over
KNOWN = r"encoder\.(sentence_encoder|regression_head|lm_head\.\d+|_ema$)"
THEIRS = (
    "fairseq"  # in a file of ours made from one of fairseq's: its entries that we have no place for
)


def reference_config(flat: dict) -> dict:
    """Our settings as fairseq's config tree."""
    tree = {"_name": None, "scoring": None, "bpe": None, "tokenizer": None}
    spelled = dict(
        data=flat["data_path"],
        lr=[flat["lr"]],
        update_freq=[flat["update_freq"]],
        adam_betas=str(tuple(flat["adam_betas"])),
        batch_size=flat["batch_size"] or None,
    )
    for group, names in GROUPS.items():
        node = tree
        for part in group.split("."):
            node = node.setdefault(part, {"_name": fairseq_config.BUILT_IN_NAMES.get(part)})
        node.update((name, spelled[name] if name in spelled else flat[name]) for name in names)
    tree["common"]["user_dir"] = "examples/data2vec"
    tree["model"]["max_positions"] = flat["tokens_per_sample"]
    tree["model"]["transformer"].update(layernorm_embedding=True, no_scale_embedding=True)
    tree["model"]["transformer"]["encoder"]["learned_pos"] = True
    # the model has no decoder, but the loader looks up the decoder's defaults, and in the wrong
    # place
    tree["model"]["transformer"]["decoder"] = {
        "input_dim": flat["embed_dim"],
        "output_dim": flat["embed_dim"],
    }
    return tree


def optimizer_names(model: dict) -> list[str]:
    """The parameters in a model of fairseq's, in the order in which its optimizer numbers them."""
    names = [k for k in model if k != TEACHER and not k.endswith(".version")]
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    return sorted(
        names, key=lambda name: modules.index(name.rpartition(".")[0])
    )  # a module's weight, then its bias


def to_fairseq(content: dict, flat: dict) -> dict:
    """The content of a checkpoint of ours as fairseq's trainer would have saved it. flat: its
    settings, including those that this command's flags changed."""
    student, progress, states = (
        content["student"],
        content["progress"],
        content["optimizer"]["state"],
    )
    names, moments = optimizer_names(to_reference(student, {})), {}
    for moment in MOMENTS if states else ():
        moments[moment] = to_reference({k: states[i][moment] for i, k in enumerate(student)}, {})
    train = TrainConfig(
        **{field.name: flat[field.name] for field in dataclasses.fields(TrainConfig)}
    )
    group = dict(
        lr=lr_at(progress["num_updates"], train),
        betas=flat["adam_betas"],
        eps=flat["adam_eps"],
        weight_decay=flat["weight_decay"],
        amsgrad=False,
        params=list(range(len(names))),
    )
    made = dict(
        args=None,
        cfg=reference_config(flat),
        criterion=None,
        optimizer_history=[
            dict(
                criterion_name="ModelCriterion",
                optimizer_name="FairseqAdam",
                lr_scheduler_state={"best": None},
                num_updates=progress["num_updates"],
            )
        ],
        task_state={},
        extra_state=dict(
            metrics=OrderedDict(),
            previous_training_time=0.0,
            train_iterator=dict(
                version=2,
                epoch=progress["epoch"],
                iterations_in_epoch=progress["batches"],
                shuffle=True,
            ),
            val_loss=progress["best_loss"],
            best=progress["best_loss"],
        ),
    )
    if THEIRS in content and flat == content["config"]:
        made = dict(content[THEIRS])
        group = made.pop("param_group")
    else:
        kept = {
            k: v
            for k, v in content.items()
            if k not in ("format", "student", "teacher", "optimizer", THEIRS)
        }
        made["extra_state"][OURS] = {**kept, "param_groups": content["optimizer"]["param_groups"]}
    step = int(states[0]["step"]) if states else 0
    made["model"] = OrderedDict(to_reference(student, content["teacher"]))
    made["last_optimizer_state"] = dict(
        state={
            i: {"step": step, **{m: moments[m][k] for m in MOMENTS}}
            for i, k in enumerate(names)
            if states
        },
        param_groups=[group],
    )
    if content["scaler"]:
        made["last_optimizer_state"]["loss_scale"] = content["scaler"]["scale"]
    return made


def from_fairseq(content: dict, template: dict, path) -> dict:
    """What a fairseq checkpoint holds besides the weights (optimizer, position and so on), as
    entries of one of ours.

    template: a student's state dict, for its names and shapes. Raises KeyError, TypeError and the
    like for a file that another optimizer made, and InputError for moments that do not fit the
    model.
    """
    extra, last = content["extra_state"], content["last_optimizer_state"]
    states, updates = last["state"], content["optimizer_history"][-1]["num_updates"]
    model, names, moments = content["model"], optimizer_names(content["model"]), {}
    for moment in MOMENTS if states else ():
        parts = {names[i]: state[moment] for i, state in states.items()}
        if len(parts) == 1:  # fairseq's fp16 optimizer keeps all parameters in one vector
            vectors = states[0][moment].split([model[name].numel() for name in names])
            parts = {name: vector.view(model[name].shape) for name, vector in zip(names, vectors)}
        moments[moment], _ = from_reference(parts)
    step = int(states[0]["step"]) if states else 0
    state = {
        i: {"step": step, **{m: moments[m][name] for m in MOMENTS}}
        for i, name in enumerate(template)
        if states
    }
    state = checked_moments(state, [tensor.shape for tensor in template.values()], path)
    if OURS in extra and extra[OURS]["progress"]["num_updates"] == updates:
        kept = dict(extra[OURS])
        return {"optimizer": {"state": state, "param_groups": kept.pop("param_groups")}, **kept}
    place = extra["train_iterator"]
    rest = {k: v for k, v in content.items() if k not in ("model", "last_optimizer_state")}
    rest["param_group"] = last["param_groups"][0]
    return dict(
        optimizer={"state": state, "param_groups": []},
        scaler={"scale": float(last["loss_scale"])} if "loss_scale" in last else {},
        progress=dict(
            num_updates=updates,
            teacher_updates=max(
                0, updates - 1
            ),  # fairseq's teacher has not followed the last update
            skipped=updates - step,
            epoch=place["epoch"],
            batches=place["iterations_in_epoch"],
            world_size=content["cfg"]["distributed_training"]["distributed_world_size"],
            best_loss=extra.get("best"),
            data={},  # no fingerprint, so a resume accepts the data it finds
        ),
        **({THEIRS: rest} if len(states) == len(names) else {}),
    )


def settings_of(loaded: Loaded, path) -> tuple[dict, str]:
    """The settings in a checkpoint of any kind, and, if those of its training cannot be read, why
    not."""
    if loaded.kind != "fairseq":
        return loaded.config, ""
    extra = loaded.content.get("extra_state")
    kept = extra.get(OURS) if isinstance(extra, dict) else None
    if isinstance(kept, dict) and "config" in kept:  # we wrote it
        if not integrity.fits(kept["config"], integrity.ENTRIES["config"]):
            raise InputError(f"{path}: damaged: its config is not what a run writes there")
        return dict(kept["config"]), ""
    values, tree = saved_settings(loaded, path), loaded.content.get("cfg") or {}
    fields = {field.name: field for part in PARTS for field in dataclasses.fields(part)}
    training = {group: tree[group] for group in TRAINING_GROUPS if group in tree}
    try:
        return {**values, **fairseq_config.from_reference(training, fields, str(path))[0]}, ""
    except InputError as e:
        return values, str(e)
