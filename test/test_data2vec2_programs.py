"""data2vec 2.0 in the other programs: forms of checkpoints, fairseq's YAML, evaluation,
fine-tuning."""

import json
import re

import config
import eval as evaluation
import finetune
import train
from config import InputError
from formats import fairseq_names
from run import checkpoint
from tasks import pretrained
from test.converting import run
from test.helpers import call, compare_checkpoints, config_of, golden, hidden_states, rows_of
from test.test_data2vec2 import FOLDER, LAST, argv_of, blocks_of, few2, settings
from test.test_finetune import flags as finetune_flags
from text.binarized import PAD

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def saved2(tmp_path_factory, corpus_dir):
    folder = tmp_path_factory.mktemp("saved2")
    argv = "--max_update 3 --average_top_k_layers 2 --instance_norm_target_layer true"
    call(train.main, *few2(corpus_dir, folder, *argv.split()))
    return folder / LAST


def shapes_of(state: dict) -> dict:
    return {k: shapes_of(v) if isinstance(v, dict) else list(v.shape) for k, v in state.items()}


def test_a_checkpoint_goes_to_fairseqs_form_and_back_bit_for_bit(saved2, tmp_path):
    run(saved2, "fairseq", tmp_path / "fairseq.pt")
    run(tmp_path / "fairseq.pt", "native", tmp_path / "native.pt")
    compare_checkpoints(saved2, tmp_path / "native.pt")
    file = torch.load(tmp_path / "fairseq.pt", weights_only=False)
    # names, shapes and settings are found again where no entry of ours tells
    del file["extra_state"][fairseq_names.OUR_ENTRY]
    file["cfg"]["distributed_training"] = dict(distributed_world_size=1)
    torch.save(file, tmp_path / "plain.pt")
    run(tmp_path / "plain.pt", "native", tmp_path / "again.pt")
    ours, again = (checkpoint.load(p).content for p in (saved2, tmp_path / "again.pt"))
    a, b = (content["optimizer"]["state"] for content in (ours, again))
    assert list(a) == list(b)
    assert all(torch.equal(a[i][name], b[i][name]) for i in a for name in checkpoint.MOMENTS)
    elsewhere = {"data_path", "save_dir", "device", "amp", *config.FAIRSEQ_EXACT, "fairseq_exact"}
    for name in set(ours["config"]) - elsewhere:
        assert ours["config"][name] == again["config"][name], name
    assert again["config"]["fairseq_exact"] and again["config"]["teacher_input"] == "full"


@golden
def test_names_shapes_and_config_are_those_of_the_recorded_checkpoint(tmp_path):
    recorded = json.loads((FOLDER / "checkpoint.json").read_text())
    argv = dict(save_dir=tmp_path, disable_validation=True, device="cpu", max_update=1)
    call(train.main, *argv_of("small", **argv))
    run(tmp_path / LAST, "fairseq", tmp_path / "fairseq.pt")
    file = torch.load(tmp_path / "fairseq.pt", weights_only=False)
    assert set(file) == set(recorded["top_level"])
    assert shapes_of(file["model"]) == recorded["model"]
    assert list(file["model"])[:-1] == list(recorded["model"])[:-1]  # the optimizer counts so
    for name, group in recorded["last_optimizer_state"].items():
        ours = file["last_optimizer_state"][name]
        assert len(ours["state"]) == group["param_groups"][0]["params"]
        assert list(ours["state"][0]["exp_avg"].shape) == group["state_of_first"]["exp_avg"]
    recorded["cfg"]["task"].pop("mask_prob")  # not read there
    of_run = {"max_update", "min_target_var", "min_pred_var"}

    def same(ours: dict, theirs: dict):
        for name in set(ours) & set(theirs) - of_run:
            if isinstance(theirs[name], dict):
                same(ours[name], theirs[name])
            else:
                assert ours[name] == theirs[name], name

    same(file["cfg"], recorded["cfg"])
    assert len(set(recorded["cfg"]["model"]) - set(file["cfg"]["model"])) <= 5


@golden
@torch.no_grad()
def test_fine_tuning_reads_whole_text_as_the_recorded_classifier_does():
    recorded = np.load(FOLDER / "small" / "features.npz")
    source = pretrained.load(FOLDER / "small" / "init.pt", attention_heads=4)
    encoder = source.encoder(untrained=False, dropout=0.0).eval()
    tokens, real = torch.from_numpy(recorded["source"]).long(), ~recorded["pad"]
    states = hidden_states(encoder, tokens)
    for ours, theirs in zip(states[1:], recorded["hidden"], strict=True):
        assert np.allclose(ours[real], theirs[real], atol=1e-6)


@torch.no_grad()
def test_transformers_computes_the_encoders_hidden_states(saved2, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    run(saved2, "hf", tmp_path / "hf")
    assert "| `clone_batch` | 3 |" in (tmp_path / "hf" / "README.md").read_text()
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.from_numpy(blocks_of(20, 13, 2).target)
    theirs = model(tokens, attention_mask=(tokens != PAD).long(), output_hidden_states=True)
    encoder = pretrained.load(saved2).encoder(untrained=False, dropout=0.0).eval()
    real = tokens != PAD
    ours = hidden_states(encoder, tokens)
    for a, b in zip(ours, theirs.hidden_states, strict=True):
        assert torch.allclose(a[real], b[real], atol=1e-5)


def test_it_is_evaluated_and_gives_features(saved2, corpus_dir, tmp_path):
    where = ["--ckpt", saved2, "--data_path", corpus_dir, "--device", "cpu", "--json"]
    result = json.loads(call(evaluation.main, *where, "--untrained", "--probe"))
    valid = rows_of(saved2.parent, "valid_loss")[-1]
    assert result["loss"] == pytest.approx(valid["valid_loss"], rel=1e-5)
    assert {"r2", "r2_block", "gain_position"} <= set(result)
    assert result["probe"]["valid_places"] > 100
    (tmp_path / "text").write_text("w1 w2\nw3\n")
    call(evaluation.main, *where, "--features", tmp_path / "text", "--out", tmp_path / "f.npy")
    assert np.load(tmp_path / "f.npy").shape == (2, 16)


@pytest.mark.parametrize(
    "flag",
    ["teacher_input masked", "mask_multiple_length 2", "fixed_masks yes", "mlm_weight 0.5"]
    + ["ema_transformer_layers_only no", "leave_unmasked_prob 0.1", "decoder_groups 5"],
)
def test_what_has_no_meaning_is_refused_in_one_line(flag):
    name, value = flag.split()
    with pytest.raises(InputError, match=f"--{name}") as error:
        settings(**{name: value})
    assert "\n" not in str(error.value)


# what the release's file sets
RELEASED = """
common: {fp16: true, log_format: json, log_interval: 200, fp16_no_flatten_grads: true}
checkpoint: {no_epoch_checkpoints: true, save_interval_updates: 50000}
task:
  {_name: masked_lm, sample_break_mode: none, tokens_per_sample: 512, include_index: true,
  include_target_tokens: true, skip_masking: true, d2v2_multi: true}
criterion: {_name: model, log_keys: [ema_decay, masked_pct]}
dataset: {batch_size: 4}
optimization: {clip_norm: 1, lr: [2.0e-4], max_update: 1000000, update_freq: [1]}
optimizer:
  _name: composite
  dynamic_groups: true
  groups:
    default:
      lr_float: 2.0e-4
      optimizer: {_name: adam, adam_betas: [0.9, 0.98], adam_eps: 1.0e-6, weight_decay: 0.01}
      lr_scheduler: {_name: cosine, warmup_updates: 4000}
lr_scheduler: pass_through
model:
  _name: data2vec_multi
  depth: 12
  embed_dim: 768
  norm_eps: 1.0e-5
  layerdrop: 0
  loss_beta: 0
  loss_scale: 1
  clone_batch: 8
  ema_decay: 0.9999
  ema_end_decay: 0.99999
  ema_anneal_end_step: 100000
  ema_encoder_only: true
  average_top_k_layers: 12
  layer_norm_target_layer: false
  instance_norm_target_layer: true
  supported_modality: TEXT
  modalities:
    text:
      mask_prob: 0.48
      mask_length: 1
      mask_noise_std: 0.01
      prenet_depth: 0
      decoder:
        {input_dropout: 0.1, decoder_dim: 768, decoder_groups: 1, decoder_kernel: 9,
        decoder_layers: 5, decoder_residual: false, projection_layers: 2, projection_ratio: 2.0}
"""


def read_yaml(text: str, folder, *argv) -> dict:
    """The settings of a run with this file."""
    pytest.importorskip("yaml", reason="PyYAML is optional")
    (folder / "base_text_only_task.yaml").write_text(text)
    where = ["--config-dir", folder, "--config-name", "base_text_only_task"]
    return config_of(*where, "task.data=x", *argv).flat()


def test_fairseqs_yaml_gives_the_preset_and_its_words_change_it(tmp_path, capsys):
    preset = config_of("--config_name", "base_v2", "--data_path", "x").flat()
    del preset["min_pred_var"]  # the code's own, which no YAML has
    ours = read_yaml(RELEASED, tmp_path)
    assert {name: ours[name] for name in preset} == preset
    assert "input_dropout" not in capsys.readouterr().err  # not ignored
    words = ["model.clone_batch=4", "model.modalities.text.decoder.decoder_kernel=5", "--depth", 12]
    ours = read_yaml(RELEASED, tmp_path, *words)
    assert (ours["clone_batch"], ours["decoder_kernel"]) == (4, 5)
    # what it does not say is as in the code
    lines = re.sub(r"\n *(depth: 12|average_top_k_layers|ema_anneal_end_step).*", "", RELEASED)
    silent = read_yaml(lines, tmp_path)
    assert (silent["layers"], silent["ema_anneal_end_step"]) == (8, silent["max_update"])


@pytest.mark.parametrize(
    ("line", "other", "fact"),
    [
        ("norm_eps: 1.0e-5", "norm_eps: 1.0e-6", "model.norm_eps"),
        ("projection_ratio: 2.0", "projection_ratio: 3", "projection_ratio"),
        ("input_dropout: 0.1", "input_dropout: 0.2", "--dropout"),
        ("mask_length: 1", "mask_length: 3", "--mask_multiple_length"),
        ("prenet_depth: 0", "prenet_depth: 1", "prenet_depth"),
        ("layerdrop: 0", "end_of_block_targets: true", "end_of_block_targets"),
        ("_name: adam,", "_name: adafactor,", "adam"),
        # what the code takes there is another model
        ("norm_eps: 1.0e-5", "", "norm_eps it is 1e-06; only 1e-05"),
        ("prenet_depth: 0", "", "prenet_depth it is 4; only 0"),
        ("mask_length: 1", "", "mask_length it is 5; only 1"),
    ],
)
def test_a_yaml_of_another_model_is_refused(tmp_path, line, other, fact):
    with pytest.raises(InputError, match=fact):
        read_yaml(RELEASED.replace(line, other), tmp_path)


def test_a_fine_tuned_model_of_fairseqs_gives_its_encoder_and_head(saved2, tmp_path):
    run(saved2, "fairseq", tmp_path / "fairseq.pt")
    file = torch.load(tmp_path / "fairseq.pt", weights_only=False)
    names = [name for name in file["model"] if "decoder" not in name and name != "_ema"]
    weights = {f"model.{name}": file["model"][name] for name in names}
    head = {"dense.weight": torch.ones(16, 16), "dense.bias": torch.ones(16)}
    head |= {"out_proj.weight": torch.ones(3, 16), "out_proj.bias": torch.ones(3)}
    place = "classification_heads.sentence_classification_head"
    weights |= {f"{place}.{name}": value for name, value in head.items()}
    model = dict(_name="data2vec_text_classification", pretrained_model_args=file["cfg"])
    torch.save(dict(model=weights, cfg=dict(model=model)), tmp_path / "classifier.pt")
    first, second = (pretrained.load(p) for p in (saved2, tmp_path / "classifier.pt"))
    assert second.shape == first.shape and second.head.weights.keys() == head.keys()
    assert all(torch.equal(first.weights[k], v) for k, v in second.weights.items())


def test_it_is_fine_tuned(saved2, corpus_dir, place, tmp_path):
    own = dict(ckpt=saved2, dict=corpus_dir / "dict.txt", max_epoch=1)
    call(finetune.main, *finetune_flags(place, tmp_path, **own))
    assert (tmp_path / "checkpoint_best.pt").is_file()
