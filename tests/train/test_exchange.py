"""Weights out to transformers and nanoGPT, and back."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from trainings import settings

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
    """A model whose every weight differs from its initial one, a few steps old."""
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


def test_gpt2_as_openai_has_it_begins_a_training(tmp_path: Path) -> None:
    """Names without prefix, masks among them, 50257 words, 24 positions, the other GELU."""
    step, checkpoint = checkpoint_of(replace(SHAPE, bias=True, block_size=24, vocab_size=50257), tmp_path / "c")
    export(checkpoint, "hf", tmp_path / "gpt2")
    weights = {n.removeprefix("transformer."): t for n, t in load_file(tmp_path / "gpt2/model.safetensors").items()}
    save_file(weights | {"h.0.attn.bias": torch.ones(1, 1, 24, 24)}, tmp_path / "gpt2/model.safetensors")
    config = json.loads((tmp_path / "gpt2/config.json").read_text()) | {"activation_function": "gelu_new"}
    (tmp_path / "gpt2/config.json").write_text(json.dumps(config))
    other = new_step(replace(SHAPE, bias=True))
    notes = load_initial(tmp_path / "gpt2", other.model)
    assert notes[1:] == ("its activation is gelu_new, it goes on with the exact gelu",)
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


def test_a_training_begins_where_another_ended(recipe: Recipe, whole: tuple[Path, object], tmp_path: Path) -> None:
    export(whole[0], "nanogpt", tmp_path / "out")
    short = replace(recipe, max_iters=1, warmup_iters=0, learning_rate=1e-6, min_lr=0.0, eval_interval=1)
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


def test_foreign_files_that_do_not_fit_are_told(tmp_path: Path) -> None:
    _, checkpoint = checkpoint_of(SHAPE, tmp_path / "checkpoints")
    deeper, wider, biased = (replace(SHAPE, **change) for change in ({"n_layer": 3}, {"n_embd": 64}, {"bias": True}))
    with pytest.raises(CheckpointError, match=r"h\.2\.ln_1\.weight is missing, the recipe's is \(32,\); change"):
        load_initial(checkpoint, new_step(deeper).model)
    with pytest.raises(CheckpointError, match=r"wte\.weight is \(50304, 32\), the recipe's is \(50304, 64\)"):
        load_initial(checkpoint, new_step(wider).model)
    _, with_bias = checkpoint_of(biased, tmp_path / "biased")
    with pytest.raises(CheckpointError, match=r"the recipe has no h\.0\.attn\.c_attn\.bias; change"):
        load_initial(with_bias, new_step(SHAPE).model)


class Trap:
    """Unpickled, it would leave a trace."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("trace",)


def test_nothing_in_a_foreign_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Trap()}, "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"ckpt\.pt cannot be read: Weights only load failed"):
        load_initial(Path("ckpt.pt"), new_step(SHAPE).model)
    assert not Path("trace").exists()
    torch.save([1, 2], "ckpt.pt")
    with pytest.raises(CheckpointError, match="it has no table `model`"):
        load_initial(Path("ckpt.pt"), new_step(SHAPE).model)


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"PK\x03\x04", b"\x80\x02.", b"(", b"{}", b"\x80\x05K\x01.", b"cos\nsystem\n.", b"N."]
)
def test_a_pt_file_of_any_content_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"ckpt\.pt cannot be read: ") as caught:
        load_initial(tmp_path / "ckpt.pt", new_step(SHAPE).model)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_a_table_that_holds_no_tensors_is_told(tmp_path: Path) -> None:
    torch.save({"model": {"transformer.wte.weight": 5}}, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"wte\.weight is no tensor"):
        load_initial(tmp_path / "ckpt.pt", new_step(SHAPE).model)
