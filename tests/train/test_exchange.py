"""Export to transformers and nanoGPT, and import from them."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from trainings import changed, settings

from autotune.cli import run
from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.errors import CheckpointError, ConfigError
from autotune.model.checkpoint import TrainState, save_checkpoint
from autotune.model.gpt import GPT
from autotune.model.step import TrainStep, build
from autotune.train.exchange import export, load_initial
from autotune.train.trainer import train

CPU = torch.device("cpu")
SHAPE = Shape(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=50304)
TOKENS = torch.randint(0, 50257, (3, 16), generator=torch.Generator().manual_seed(0))


def new_step(shape: Shape) -> TrainStep:
    recipe = Recipe(shape=shape, global_batch_size=3)
    return build(Candidate(recipe=recipe, plan=Plan(micro_batch_size=3, compile="off", dtype="float32")), CPU)


def checkpoint_of(shape: Shape, directory: Path) -> tuple[TrainStep, Path]:
    """A model after a few steps, so that every weight differs from its initial value."""
    step = new_step(shape)
    with torch.no_grad():
        for parameter in step.model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    tokens = TOKENS % shape.vocab_size
    for _ in range(2):
        step.step([(tokens, tokens, 1.0)], 1e-3)
    state = TrainState(iteration=2, tokens=96, candidate=step.candidate, best_validation_loss=3.5)
    return step, save_checkpoint(directory, step, state)


def logits(model: GPT, tokens: Tensor = TOKENS) -> Tensor:
    """(B, T, V)"""
    with torch.no_grad():
        return F.linear(model.eval().hidden(tokens), model.wte.weight)


@pytest.mark.parametrize("bias", [False, True])
def test_transformers_computes_the_same_logits(bias: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    step, checkpoint = checkpoint_of(replace(SHAPE, bias=bias), tmp_path / "checkpoints")
    assert export(checkpoint, "hf", tmp_path / "hf") == ""
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        difference = theirs.eval()(TOKENS).logits - logits(step.model)
    assert difference.abs().max() < 1e-4
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.encode("Measure, do not guess.") == [47384, 11, 466, 407, 4724, 13]
    other = new_step(replace(SHAPE, bias=bias)).model if bias else new_step(replace(SHAPE, bias=True)).model
    load_initial(tmp_path / "hf", other)
    assert (logits(other) - logits(step.model)).abs().max() < 1e-5


def test_weights_as_openai_published_them_start_a_training(tmp_path: Path) -> None:
    """Without name prefix, with attention masks, 50257 words, 24 positions and the tanh GELU."""
    step, checkpoint = checkpoint_of(replace(SHAPE, bias=True, block_size=24, vocab_size=50257), tmp_path / "c")
    export(checkpoint, "hf", tmp_path / "gpt2")
    weights = {n.removeprefix("transformer."): t for n, t in load_file(tmp_path / "gpt2/model.safetensors").items()}
    save_file(weights | {"h.0.attn.bias": torch.ones(1, 1, 24, 24)}, tmp_path / "gpt2/model.safetensors")
    config = json.loads((tmp_path / "gpt2/config.json").read_text()) | {"activation_function": "gelu_new"}
    (tmp_path / "gpt2/config.json").write_text(json.dumps(config))
    other = new_step(replace(SHAPE, bias=True))
    notes = load_initial(tmp_path / "gpt2", other.model)
    assert notes[1:] == ("its activation is gelu_new, replaced by the exact gelu",)
    found = logits(other.model)
    assert torch.allclose(found[..., :50257], logits(step.model), atol=1e-5)
    words = step.model.wte.weight.detach()
    assert torch.equal(other.model.wte.weight[50257:], words.mean(0, keepdim=True).expand(47, -1))


def test_nanogpts_file_has_what_its_scripts_read(tmp_path: Path) -> None:
    """As train.py saves and resumes it and sample.py reads it: the names of its modules, AdamW's state in the order
    of its configure_optimizers (matrices, then vectors), its own keys of the config; loaded with weights_only."""
    step, checkpoint = checkpoint_of(replace(SHAPE, bias=True), tmp_path / "checkpoints")
    assert export(checkpoint, "nanogpt", tmp_path / "out") == ""
    saved = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert saved.keys() == {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 50304}
    args = sizes | {"bias": True, "dropout": 0.0}
    assert (saved["model_args"], saved["iter_num"], saved["best_val_loss"]) == (args, 2, 3.5)
    names = {f"transformer.{name}" for name, _ in step.model.named_parameters()}
    assert saved["model"].keys() == names | {"lm_head.weight"}
    assert torch.equal(saved["model"]["lm_head.weight"], step.model.wte.weight)
    assert saved["config"]["eval_interval"] == 250
    parameters = [*step.model.parameters()]
    ordered = [p for p in parameters if p.dim() >= 2] + [p for p in parameters if p.dim() < 2]
    groups = [{"params": ordered[:10], "weight_decay": 0.1}, {"params": ordered[10:], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=1e-3)
    theirs.load_state_dict(saved["optimizer"])
    for parameter in parameters:
        assert torch.equal(theirs.state[parameter]["exp_avg"], step.optimizer.state[parameter]["exp_avg"])
    other = new_step(replace(SHAPE, bias=True))
    load_initial(tmp_path / "out" / "ckpt.pt", other.model)
    assert torch.equal(logits(other.model), logits(step.model))


def test_a_training_starts_where_another_ended(
    candidate: Candidate, whole: tuple[Path, object], tmp_path: Path
) -> None:
    export(whole[0], "nanogpt", tmp_path / "out")
    short = changed(candidate, max_iters=1, warmup_iters=0, learning_rate=1e-6, min_lr=0.0, eval_interval=1)
    losses = []
    for number, path in enumerate((tmp_path / "out" / "ckpt.pt", whole[0])):
        summary = train(settings(short, tmp_path / f"train-{number}", init_from=path))
        assert summary is not None
        losses.append(summary.validation_loss)
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(whole[1].validation_loss, abs=1e-3)  # type: ignore[attr-defined]
    assert f'init_from = "{whole[0]}"' in (tmp_path / "train-1" / "recipe.toml").read_text()


def test_mistakes_leave_nothing(tmp_path: Path) -> None:
    _, checkpoint = checkpoint_of(replace(SHAPE, vocab_size=256), tmp_path / "checkpoints")
    with pytest.raises(ConfigError, match=r"--to = 'huggingface' is not known; allowed: hf, nanogpt"):
        export(checkpoint, "huggingface", tmp_path / "x")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        export(tmp_path / "nowhere", "hf", tmp_path / "x")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export(checkpoint, "hf", tmp_path / "checkpoints")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out .*x cannot be written"):
        export(checkpoint, "nanogpt", tmp_path / "file" / "x")
    assert "no tokenizer was written" in export(checkpoint, "hf", tmp_path / "small")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "file", "small"}


def test_foreign_files_that_do_not_fit_are_refused_with_advice(tmp_path: Path) -> None:
    _, checkpoint = checkpoint_of(SHAPE, tmp_path / "checkpoints")
    deeper, wider, biased = (replace(SHAPE, **change) for change in ({"n_layer": 3}, {"n_embd": 64}, {"bias": True}))
    with pytest.raises(CheckpointError, match=r"h\.2\.ln_1\.weight is missing, .* is \(32,\); set n_layer = 2 in \[mo"):
        load_initial(checkpoint, new_step(deeper).model)
    with pytest.raises(CheckpointError, match=r"wte\.weight is \(50304, 32\), .* \(50304, 64\); set n_embd = 32 in"):
        load_initial(checkpoint, new_step(wider).model)
    _, with_bias = checkpoint_of(biased, tmp_path / "biased")
    with pytest.raises(CheckpointError, match=r"the recipe has no h\.0\.attn\.c_attn\.bias; set bias = true in"):
        load_initial(with_bias, new_step(SHAPE).model)
    with pytest.raises(CheckpointError, match=r"it has 2 heads; set model\.n_head = 2"):
        load_initial(checkpoint, new_step(replace(SHAPE, n_head=4)).model)
    with pytest.raises(CheckpointError, match=r"wpe\.weight is \(16, 32\), .* is \(24, 32\); set block_size = 16 in"):
        load_initial(checkpoint, new_step(replace(SHAPE, block_size=24)).model)
    with pytest.raises(CheckpointError, match=r"gpt2-xl does not exist; give a ckpt\.pt of nanoGPT, a downloaded"):
        load_initial(Path("gpt2-xl"), new_step(SHAPE).model)


class Trap:
    """Unpickled, it would leave a trace."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("trace",)


def test_nothing_in_a_foreign_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Trap()}, "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"ckpt\.pt holds Python objects \(posix\.mkdir\), which could") as caught:
        load_initial(Path("ckpt.pt"), new_step(SHAPE).model)
    assert "weights_only" not in str(caught.value)
    assert str(caught.value).isprintable()
    assert not Path("trace").exists()
    torch.save([1, 2], "ckpt.pt")
    with pytest.raises(CheckpointError, match="it has no table `model`"):
        load_initial(Path("ckpt.pt"), new_step(SHAPE).model)
    whole = Path("ckpt.pt").read_bytes()
    for content in (b"", b"hello " * 50, b"PK\x03\x04 and no more", whole[: len(whole) // 2]):
        Path("ckpt.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"ckpt\.pt is damaged, or not a file of torch\.save") as caught:
            load_initial(Path("ckpt.pt"), new_step(SHAPE).model)
        assert str(caught.value).isprintable()


TINY = replace(SHAPE, vocab_size=256)


def tiny_weights() -> tuple[GPT, dict[str, Tensor]]:
    """A model, and its weights by nanoGPT's names."""
    model = new_step(TINY).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    weights = {f"transformer.{name}": tensor.detach().clone() for name, tensor in model.named_parameters()}
    return model, weights | {"lm_head.weight": weights["transformer.wte.weight"]}


def loaded(path: Path) -> GPT:
    model = new_step(TINY).model
    load_initial(path, model)
    return model


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."])
def test_name_components_of_wrappers_are_ignored(prefix: str, tmp_path: Path) -> None:
    model, weights = tiny_weights()
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16), "transformer.h.1.attn.masked_bias": torch.ones(1)}
    torch.save({"model": {prefix + name: t for name, t in (weights | masks).items()}}, tmp_path / "ckpt.pt")
    assert torch.equal(logits(loaded(tmp_path / "ckpt.pt"), TOKENS % 256), logits(model, TOKENS % 256))
    inner = {name.replace("h.0.", "h.0._orig_mod."): t for name, t in weights.items()}
    torch.save({"model": inner}, tmp_path / "ckpt.pt")
    assert torch.equal(logits(loaded(tmp_path / "ckpt.pt"), TOKENS % 256), logits(model, TOKENS % 256))


def test_a_checkpoint_with_numpys_numbers_is_read(tmp_path: Path) -> None:
    model, weights = tiny_weights()
    kinds = (np.float64, np.float32, np.float16, np.int64, np.int32, np.uint8, np.bool_)
    torch.save({"model": weights, "values": [kind(1) for kind in kinds]}, tmp_path / "ckpt.pt")
    assert torch.equal(logits(loaded(tmp_path / "ckpt.pt"), TOKENS % 256), logits(model, TOKENS % 256))


def test_the_head_is_the_embedding(tmp_path: Path) -> None:
    model, weights = tiny_weights()
    head, words = weights.pop("lm_head.weight"), weights.pop("transformer.wte.weight")
    for saved in (weights | {"lm_head.weight": head}, weights | {"transformer.wte.weight": words}):
        torch.save({"model": saved}, tmp_path / "ckpt.pt")
        assert torch.equal(loaded(tmp_path / "ckpt.pt").wte.weight, model.wte.weight)
    torch.save({"model": weights | {"lm_head.weight": head + 1, "transformer.wte.weight": words}}, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"its lm_head\.weight is not its wte\.weight"):
        loaded(tmp_path / "ckpt.pt")


def test_weights_of_half_precision(tmp_path: Path) -> None:
    model, weights = tiny_weights()
    for kind in (torch.float16, torch.bfloat16):
        torch.save({"model": {name: tensor.to(kind) for name, tensor in weights.items()}}, tmp_path / "ckpt.pt")
        found = loaded(tmp_path / "ckpt.pt")
        assert torch.equal(found.wte.weight, model.wte.weight.to(kind).float())
    torch.save({"model": {name: tensor.to(torch.int8) for name, tensor in weights.items()}}, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"is torch\.int8, weights are floating-point tensors"):
        loaded(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("name", ["transformer.h.1.mlp.c_fc.weight", "lm_head.weight", "transformer.ln_f.weight"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_that_are_not_finite_are_refused_by_name(name: str, value: str, tmp_path: Path) -> None:
    _, weights = tiny_weights()
    weights[name] = weights[name].clone()
    weights[name].view(-1)[3] = float(value)
    torch.save({"model": weights}, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=rf"{name.removeprefix('transformer.')} holds NaN or infinity \(1 of "):
        loaded(tmp_path / "ckpt.pt")


def test_our_own_checkpoint_with_nan_is_refused(tmp_path: Path) -> None:
    step, _ = checkpoint_of(TINY, tmp_path / "good")
    with torch.no_grad():
        step.model.ln_f.weight[0] = float("nan")
    state = TrainState(iteration=3, tokens=144, candidate=step.candidate)
    checkpoint = save_checkpoint(tmp_path / "bad", step, state)
    for to in ("hf", "nanogpt"):
        with pytest.raises(CheckpointError, match=r"ln_f\.weight holds NaN or infinity \(1 of 32 values\)"):
            export(checkpoint, to, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"ln_f\.weight holds NaN"):
        loaded(checkpoint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["safetensors", "safetensors in shards", "bin", "bin in shards"])
def test_every_form_of_a_transformers_directory(form: str, tmp_path: Path) -> None:
    step, checkpoint = checkpoint_of(TINY, tmp_path / "checkpoints")
    path = tmp_path / "hf"
    export(checkpoint, "hf", path)
    weights = load_file(path / "model.safetensors")
    name = "model.safetensors" if form.startswith("safetensors") else "pytorch_model.bin"
    (path / "model.safetensors").unlink()
    parts = {name: weights}
    if form.endswith("shards"):
        names = sorted(weights)
        parts = {f"{half}-of-2.{name.partition('.')[2]}": {n: weights[n] for n in names[half::2]} for half in (0, 1)}
        listed = {"metadata": {}, "weight_map": {n: file for file, part in parts.items() for n in part}}
        (path / f"{name}.index.json").write_text(json.dumps(listed))
    for file, part in parts.items():
        save_file(part, path / file) if file.endswith("safetensors") else torch.save(part, path / file)
    other = new_step(replace(TINY, bias=True)).model
    load_initial(path, other)
    assert torch.allclose(logits(other, TOKENS % 256), logits(step.model, TOKENS % 256), atol=1e-6)
    (path / file).unlink()
    said = rf"{file} is missing, which {name}\.index\.json lists" if len(parts) > 1 else "it has neither model"
    with pytest.raises(CheckpointError, match=said):
        load_initial(path, other)
    if len(parts) > 1:
        (path / f"{name}.index.json").write_text(json.dumps({"weight_map": {"wte.weight": "../../elsewhere"}}))
        with pytest.raises(CheckpointError, match="has no weight_map of files in its directory"):
            load_initial(path, other)


def test_another_model_of_the_same_weights_is_refused(tmp_path: Path) -> None:
    _, checkpoint = checkpoint_of(TINY, tmp_path / "checkpoints")
    export(checkpoint, "hf", tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"scale_attn_by_inverse_layer_idx": True}))
    with pytest.raises(CheckpointError, match="its scale_attn_by_inverse_layer_idx is True"):
        loaded(tmp_path / "hf")
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"n_head": 4}))
    with pytest.raises(CheckpointError, match=r"it has 4 heads; set model\.n_head = 4"):
        load_initial(tmp_path / "hf", new_step(replace(TINY, bias=True)).model)


def test_the_padding_can_be_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    step, checkpoint = checkpoint_of(SHAPE, tmp_path / "checkpoints")
    assert run(["export", str(checkpoint), "--to", "hf", "--out", str(tmp_path / "hf"), "--cut-vocab"]) == 0
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.config.vocab_size == len(transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")) == 50257
    assert (theirs.generation_config.bos_token_id, theirs.generation_config.eos_token_id) == (50256, 50256)
    with torch.no_grad():
        found = theirs.eval()(TOKENS).logits
    assert found.shape == (3, 16, 50257)
    assert (found - logits(step.model)[..., :50257]).abs().max() < 1e-4
    with pytest.raises(ConfigError, match="--cut-vocab needs --to hf"):
        export(checkpoint, "nanogpt", tmp_path / "x", cut_vocab=True)
    _, small = checkpoint_of(TINY, tmp_path / "small")
    with pytest.raises(ConfigError, match="a vocabulary of 256 is not GPT-2's 50257 padded"):
        export(small, "hf", tmp_path / "x", cut_vocab=True)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_user_asks_for(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        _, checkpoint = checkpoint_of(TINY, tmp_path / "checkpoints")
        for to in ("hf", "nanogpt"):
            export(checkpoint, to, tmp_path / to)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 7
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {path.name: mode for path in files}


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"PK\x03\x04", b"\x80\x02.", b"(", b"{}", b"\x80\x05K\x01.", b"cos\nsystem\n.", b"N."]
)
def test_a_pt_file_of_any_content_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"ckpt\.pt (cannot be read: |is damaged|holds Python objects)") as caught:
        load_initial(tmp_path / "ckpt.pt", new_step(SHAPE).model)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_a_table_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"transformer.wte.weight": 5}}, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"wte\.weight is int, weights are floating-point"):
        load_initial(tmp_path / "ckpt.pt", new_step(SHAPE).model)
