"""fairseq's checkpoints: one of ours as fairseq would have saved it, and back.

    python convert.py --ckpt CHECKPOINT --to fairseq FILE
    python convert.py --ckpt FAIRSEQ.pt --to native FILE

Both ways keep weights, teacher, optimizer and the position in the data bit for bit.
"""

from collections import OrderedDict

from config import InputError
from formats import fairseq_config, fairseq_v2, fairseq_v2_config
from formats.fairseq_names import FIELDS, OUR_ENTRY, TEACHER, from_reference, ours_in, to_reference
from run.checkpoint import MOMENTS, Loaded, checked_moments

# The groups of fairseq's config, and the settings in them that we write, under its names. Its
# loader fills in a missing group, but fails on an empty one.
OF_A_MACHINE = {"tensorboard_logdir", "distributed_world_size"}
GROUPS = {
    group: [name for name in names.split() if name not in OF_A_MACHINE]
    for group, names in fairseq_config.GROUPS.items()
    if group != "distributed_training"
}
GROUPS["criterion"] = []
TRAINING_GROUPS = ("optimization", "optimizer", "lr_scheduler")
# A fairseq file that we wrote has an entry in its extra_state with what fairseq has no place for
# (fairseq_names.ours_in), and a file of ours that was made from one of fairseq's has this one.
THEIRS = "fairseq"


# ------------------------------------------------------------------------------------- to fairseq


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
            node = node.setdefault(part, {"_name": fairseq_config.CLASSES.get(part)})
        for name in names:
            node[name] = spelled[name] if name in spelled else flat[name]
    tree["common"]["user_dir"] = "examples/data2vec"
    if flat["objective"] == "data2vec2":
        tree |= fairseq_v2_config.spelled(flat)
        tree["task"] |= dict(skip_masking=True, d2v2_multi=True, include_index=True)
        return tree
    tree["model"]["max_positions"] = flat["tokens_per_sample"]
    transformer = tree["model"]["transformer"]
    transformer.update(layernorm_embedding=True, no_scale_embedding=True)
    transformer["encoder"]["learned_pos"] = True
    # the model has no decoder, but the loader looks up its defaults, and in the wrong place
    transformer["decoder"] = dict(input_dim=flat["embed_dim"], output_dim=flat["embed_dim"])
    return tree


def optimizer_names(model: dict) -> list[str]:
    """The parameters of a model of fairseq's, in the order in which its optimizer counts them."""
    teachers = (TEACHER, fairseq_v2.TEACHER)
    names = [k for k in model if k not in teachers and not k.endswith(".version")]
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    # a module's weight, then its bias
    return sorted(names, key=lambda name: modules.index(name.rpartition(".")[0]))


def to_fairseq(content: dict, lr: float) -> dict:
    """The content of a checkpoint of ours as fairseq's trainer would have saved it.

    lr: of its next update.
    """
    config = content["config"]
    names = optimizer_names(to_reference(content["student"], {}))
    if THEIRS in content:
        file = dict(content[THEIRS])
        group = file.pop("param_group")
    else:
        file = _new_file(content)
        group = dict(
            lr=lr,
            betas=config["adam_betas"],
            eps=config["adam_eps"],
            weight_decay=config["weight_decay"],
            amsgrad=False,
            params=list(range(len(names))),
        )
    file["model"] = OrderedDict(to_reference(content["student"], content["teacher"]))
    last = dict(state=_their_moments(content, names), param_groups=[group])
    if config["objective"] == "data2vec2":
        last = fairseq_v2.split_optimizer(last, [file["model"][name] for name in names])
    if content["scaler"]:
        last["loss_scale"] = content["scaler"]["scale"]
    file["last_optimizer_state"] = last
    return file


def _new_file(content: dict) -> dict:
    """A file of fairseq's without weights and moments, and with our own entries."""
    config, progress = content["config"], content["progress"]
    optimizer, schedule = "FairseqAdam", {"best": None}
    if config["objective"] == "data2vec2":
        optimizer = "FairseqCompositeOptimizer"
        schedule = {group: {"best": None} for group in fairseq_v2.GROUPS}
    history = dict(
        criterion_name="ModelCriterion",
        optimizer_name=optimizer,
        lr_scheduler_state=schedule,
        num_updates=progress["num_updates"],
    )
    place = dict(epoch=progress["epoch"], iterations_in_epoch=progress["batches"])
    elsewhere = ("format", "student", "teacher", "optimizer", THEIRS)
    ours = {k: v for k, v in content.items() if k not in elsewhere}
    ours["param_groups"] = content["optimizer"]["param_groups"]
    extra = dict(
        metrics=OrderedDict(),
        previous_training_time=0.0,
        train_iterator=dict(version=2, **place, shuffle=True),
        val_loss=progress["best_loss"],
        best=progress["best_loss"],
    )
    return dict(
        args=None,
        cfg=reference_config(config),
        criterion=None,
        optimizer_history=[history],
        task_state={},
        extra_state={**extra, OUR_ENTRY: ours},
    )


def _their_moments(content: dict, names: list) -> dict:
    """Adam's state under the numbers that fairseq gives to the parameters `names`."""
    states = content["optimizer"]["state"]
    if not states:
        return {}
    rows = {i: {"step": int(states[0]["step"])} for i in range(len(names))}
    for moment in MOMENTS:
        ours = {name: states[i][moment] for i, name in enumerate(content["student"])}
        theirs = to_reference(ours, {})
        for i, name in enumerate(names):
            rows[i][moment] = theirs[name]
    return rows


# ----------------------------------------------------------------------------------- from fairseq


def from_fairseq(content: dict, template: dict, path) -> dict:
    """What a fairseq checkpoint holds besides the weights, as entries of one of ours.

    template: a student's state dict, for its names and shapes. Raises InputError for moments that
    do not fit the model, KeyError and the like for a file that another optimizer made.
    """
    extra = content["extra_state"]
    last = content["last_optimizer_state"]
    if fairseq_v2.GROUPS[0] in last:
        weights = [content["model"][name] for name in optimizer_names(content["model"])]
        last = fairseq_v2.join_optimizer(last, weights)
    updates = content["optimizer_history"][-1]["num_updates"]
    best = extra.get("best")  # in old files a number of numpy's, which is not loaded
    state = _our_moments(last["state"], content["model"], template, path)
    ours = dict(ours_in(content))
    if ours and ours["progress"]["num_updates"] == updates:
        optimizer = {"state": state, "param_groups": ours.pop("param_groups")}
        return {"optimizer": optimizer, **ours}
    progress = dict(
        num_updates=updates,
        teacher_updates=max(0, updates - 1),  # fairseq's has not followed the last update
        skipped=updates - int(state[0]["step"]) if state else updates,
        epoch=extra["train_iterator"]["epoch"],
        batches=extra["train_iterator"]["iterations_in_epoch"],
        world_size=content["cfg"]["distributed_training"]["distributed_world_size"],
        best_loss=best if isinstance(best, (int, float)) else None,
        data={},  # no fingerprint, so a resume accepts the data it finds
    )
    entries = dict(
        optimizer={"state": state, "param_groups": []},
        scaler={"scale": float(last["loss_scale"])} if "loss_scale" in last else {},
        progress=progress,
    )
    # on the way back fairseq gets its own entries again, unless its moments were one vector
    if len(last["state"]) == len(optimizer_names(content["model"])):
        rest = {k: v for k, v in content.items() if k not in ("model", "last_optimizer_state")}
        entries[THEIRS] = {**rest, "param_group": last["param_groups"][0]}
    return entries


def _our_moments(states: dict, model: dict, template: dict, path) -> dict:
    """fairseq's Adam state as ours, checked and in memory of its own."""
    if not states:
        return {}
    names = optimizer_names(model)
    rows = {i: {"step": int(states[0]["step"])} for i in range(len(template))}
    for moment in MOMENTS:
        parts = {names[i]: state[moment] for i, state in states.items()}
        if len(parts) == 1:  # fairseq's fp16 optimizer keeps all parameters in one vector
            vectors = states[0][moment].split([model[name].numel() for name in names])
            parts = {name: part.view(model[name].shape) for name, part in zip(names, vectors)}
        ours, _ = from_reference(parts, path)
        for i, name in enumerate(template):
            rows[i][moment] = ours[name]
    return checked_moments(rows, list(template.values()), path)


def settings_of(loaded: Loaded, path) -> tuple[dict, str]:
    """The settings in a checkpoint of any kind, and why those of its training are not among them.

    The reason is empty where they are.
    """
    if loaded.kind != "fairseq":
        return loaded.config, ""
    ours = ours_in(loaded.content)
    if isinstance(ours.get("config"), dict):
        return ours["config"], ""
    values = {k: v for k, v in loaded.config.items() if k != "data_path"}  # on another machine
    tree = loaded.content.get("cfg") or {}
    # the model's group says of which version the others are
    groups = (*TRAINING_GROUPS, "model")
    training = {group: tree[group] for group in groups if group in tree}
    try:
        return {**values, **fairseq_config.from_reference(training, FIELDS, str(path))[0]}, ""
    except InputError as e:
        return values, str(e)
