"""The spellings of fairseq's data2vec 2.0 (config/v2/base_text_only_task.yaml) for text.

`OURS` and `BUILT_IN` are as in fairseq_config.py, which reads them: other names of our settings,
and what is built in. Of three modalities in a checkpoint's config only the text counts.
"""

from config import InputError

TEXT = "model.modalities.text."
ADAM = "optimizer.groups.default.optimizer."
SCHEDULE = "optimizer.groups.default.lr_scheduler."

OURS = {
    "model.depth": "layers",
    "model.num_heads": "attention_heads",
    "model.layer_norm_first": "normalize_before",
    "model.encoder_dropout": "dropout",
    f"{TEXT}mask_length": "mask_multiple_length",
    f"{TEXT}decoder.projection_layers": "head_layers",
    "optimizer.groups.default.lr_float": "lr",
}
# groups, and what is in them under our names
GROUPS = {
    "model.": """clone_batch embed_dim attention_dropout activation_dropout average_top_k_layers
        loss_beta loss_scale batch_norm_target_layer instance_norm_target_layer
        layer_norm_target_layer layer_norm_targets instance_norm_targets ema_decay ema_end_decay
        ema_anneal_end_step""",
    TEXT: "mask_prob mask_noise_std max_source_positions",
    f"{TEXT}decoder.": "decoder_dim decoder_kernel decoder_layers decoder_groups decoder_residual",
    ADAM: "adam_betas adam_eps weight_decay",
    SCHEDULE: "warmup_updates",
}
OURS |= {group + name: name for group, names in GROUPS.items() for name in names.split()}
# settings of the task that this model does not read
UNREAD = ("task.mask_prob", "task.mask_multiple_length", "task.mask_stdev")
# what the code takes where a file is silent, and our defaults are version 1's or the release's
DEFAULTS = dict(
    objective="data2vec2",
    layers=8,
    average_top_k_layers=8,
    mask_prob=0.7,
    clone_batch=1,
    decoder_dim=384,
    decoder_kernel=5,
    decoder_layers=5,
    decoder_groups=16,
    decoder_residual=True,
    head_layers=1,
    loss_beta=0.0,
    loss_scale=0.0,
    layer_norm_target_layer=False,
)
# the same, where it is not the one value that is built in here
UNLIKE = {"model.norm_eps": "1e-06", f"{TEXT}prenet_depth": "4", f"{TEXT}mask_length": "5"}
# one setting here
DROPOUTS = {
    "model.encoder_dropout": "0.1",
    "model.post_mlp_drop": "0.1",
    f"{TEXT}dropout": "0.1",
    f"{TEXT}decoder.input_dropout": "0.1",
}
READ_TOGETHER = (*DROPOUTS, "model.mlp_ratio")
# the one value that is built in here
BUILT_IN = {
    "model": "data2vec_multi",
    "model._name": "data2vec_multi",
    "model.norm_eps": 1e-5,
    "model.end_of_block_targets": False,
    "model.supported_modality": "TEXT",
    "optimizer": "composite",
    "optimizer._name": "composite",
    "lr_scheduler": "pass_through",
    "lr_scheduler._name": "pass_through",
    f"{ADAM}_name": "adam",
    f"{SCHEDULE}_name": "cosine",
    f"{TEXT}decoder.projection_ratio": 2,
    f"{TEXT}local_grad_mult": 1,
    f"{TEXT}type": "TEXT",
    "model.d2v_loss": 1,
}
# what is on, and off, in the release for text, in the whole model and in its text's part
ON = "model.norm_affine model.ema_encoder_only task.skip_masking task.d2v2_multi".split()
ON_OF_TEXT = ("learned_pos", "no_scale_embedding", "layernorm_embedding")
ZERO = (
    "layerdrop dropout_input start_drop_path_rate end_drop_path_rate cls_loss recon_loss mae_init"
    " skip_ema decoder_group"
).split()
ZERO_OF_TEXT = (
    "prenet_depth num_extra_tokens mask_prob_adjust keep_masked_pct mask_dropout mask_channel_prob"
    " use_alibi_encoder inverse_mask add_masks remove_masks ema_local_encoder"
    " no_token_positional_embeddings decoder.add_positions_masked decoder.add_positions_all"
).split()
BUILT_IN |= {f"model.{name}": 0 for name in ZERO}
BUILT_IN |= {f"{TEXT}{name}": 0 for name in ZERO_OF_TEXT}
BUILT_IN |= {f"{TEXT}{name}": True for name in ON_OF_TEXT}
BUILT_IN |= dict.fromkeys(ON, True)


def spelled(flat: dict) -> dict:
    """Our settings as the groups `model`, `optimizer`, `lr_scheduler` of a config of fairseq's."""
    entries = {name: flat[ours] for name, ours in OURS.items()}
    entries |= {name: value for name, value in BUILT_IN.items() if "." in name}
    entries |= dict.fromkeys(DROPOUTS, flat["dropout"])
    entries["model.mlp_ratio"] = flat["ffn_embed_dim"] / flat["embed_dim"]
    # a list, where version 1 has the text of a tuple
    entries[f"{ADAM}adam_betas"] = list(flat["adam_betas"])
    entries["optimizer.dynamic_groups"] = True
    entries["model.max_update"] = flat["max_update"]
    entries["model.seed"] = flat["seed"]
    # from names with dots to groups in groups
    tree = {}
    for name, value in entries.items():
        node = tree
        *groups, last = name.split(".")
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    del tree["task"]  # which fairseq_state writes
    return tree


def finish(values: dict, flat: dict, where: str):
    """Complete the values of our fields from the entries `flat`, {name: (value, text)}, of a tree.

    Raises InputError for what cannot be expressed.
    """
    # fairseq has four dropouts after the same kind of places
    dropouts = {name: flat.get(name, (None, text))[1] for name, text in DROPOUTS.items()}
    if len({float(text) for text in dropouts.values()}) > 1:
        listed = ", ".join(f"{name}={text}" for name, text in dropouts.items())
        raise InputError(f"{where}: {listed}: here they are one setting, --dropout")
    for name, value in UNLIKE.items():
        if name not in flat:
            what = f"without {name} it is {value}; only {BUILT_IN.get(name, 1)} is built in"
            raise InputError(f"{where}: {what}")
    if "max_update" in values:
        values.setdefault("ema_anneal_end_step", values["max_update"])
    ratio = float(flat.get("model.mlp_ratio", (None, "4"))[1])
    values["ffn_embed_dim"] = int(ratio * values.get("embed_dim", 768))
    for name, value in DEFAULTS.items():
        values.setdefault(name, value)
