"""The README.md of an exported model, which Hugging Face calls its model card.

It says what the checkpoint tells. What no file tells, such as the licence, is marked TO FILL IN.
"""

from config import VERSION, printable

SHAPE = "layers embed_dim ffn_embed_dim attention_heads activation_fn max_source_positions".split()
OF_TRAINING = """objective mlm_weight tokens_per_sample sample_break_mode max_tokens batch_size
update_freq lr warmup_updates max_update weight_decay dropout mask_prob average_top_k_layers
ema_decay ema_end_decay ema_anneal_end_step seed fairseq_exact""".split()
OF_VERSION_2 = "clone_batch decoder_dim decoder_kernel decoder_layers decoder_groups".split()

CARD = """---
library_name: transformers
pipeline_tag: {task}
tags: [data2vec-text]
license: unknown  # TO FILL IN, and `language:` beside it
---

# {name}

A text encoder{after}, exported by data2vec-text {version}.

**Licence:** TO FILL IN. It depends on the text that the model was trained on, too.

**Corpus:** TO FILL IN: what the text is, where it comes from, its languages.

## Settings

| setting | value |
| --- | --- |
{settings}
"""


def text(name: str, task: str, content: dict) -> str:
    """The card of the folder `name`. task: a pipeline of transformers; content: of a checkpoint."""
    config, updates = content["config"], content["progress"]["num_updates"]
    names, after = SHAPE, ""
    if updates:  # else the file does not tell how it was trained
        names = SHAPE + OF_TRAINING
        after = f" after {updates:,} updates of pretraining"
        if config["objective"] == "data2vec2":
            names = names + OF_VERSION_2
    rows = [f"| `{setting}` | {config[setting]} |" for setting in names]
    named = dict(name=printable(name), task=task, after=after, version=VERSION)
    return CARD.format(**named, settings="\n".join(rows))
