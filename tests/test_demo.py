"""The demo: what it reads, what it trains, and that its verdict can be a bad one."""

import dataclasses
import math
import re
import sys

import pytest
import torch

import tandem_attn
from tandem_attn import cli
from tandem_attn.bench import UserError
from tandem_attn.demo import display, model, plot, session, text, train
from tandem_attn.demo.generate import Passage, compare, generate

SMALL = model.Shape(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, context=16)


class Silent:
    """In place of display.Progress."""

    def line(self, *_):
        pass

    advance = line


@pytest.fixture(autouse=True)
def one_thread():
    """Other work on the machine must not slow these down (see session._one_thread)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def demo(tmp_path):
    """Run `tandem-attn demo --quick` with more options; its exit status."""

    def run(*options: str) -> int:
        return cli.main(
            ["demo", "--quick", "--device", "cpu", "--output", str(tmp_path / "out.png"), *options]
        )

    return run


# The text


def test_python_carries_a_text_without_repeated_paragraphs():
    found = text.language_reference()
    paragraphs = found.split(b"\n\n")
    assert len(found) > 200_000
    assert len(paragraphs) == len(set(paragraphs))
    assert b"statement" in found


def test_a_file_is_bytes_and_its_end_is_held_out(tmp_path):
    data = "Grüße, 世界!\n".encode() * 20
    path = tmp_path / "text"
    path.write_bytes(data)
    found = text.load(str(path), context=16)
    assert bytes(found.train.tolist() + found.held_out.tolist()) == data
    assert len(found.held_out) == len(data) // 10
    assert f"{len(data):,} bytes" in str(found)


def test_a_text_may_be_just_long_enough(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(170))
    found = text.load(str(path), context=16)
    text.even_windows(found.held_out, 3, 16)
    path.write_bytes(bytes(169))
    with pytest.raises(UserError, match=r"169 bytes; supported: at least 170"):
        text.load(str(path), context=16)


def test_targets_are_the_bytes_that_follow():
    tokens = torch.arange(50, dtype=torch.uint8)
    inputs, targets = text.windows(tokens, torch.tensor([3, 40]), 8)
    assert inputs.tolist() == [[*range(3, 11)], [*range(40, 48)]]
    assert torch.equal(targets, inputs + 1)
    inputs, targets = text.even_windows(tokens, 5, 8)
    assert inputs[0, 0] == 0
    assert targets[-1, -1] == 49
    generator = torch.Generator().manual_seed(0)
    inputs, targets = text.random_windows(tokens, 2000, 8, generator)
    assert inputs.min() == 0
    assert targets.max() == 49  # the first and the last byte are used, and none beyond


# The model


@pytest.mark.parametrize("attention", [model.tandem, model.sdpa])
def test_no_byte_sees_a_later_one(attention):
    transformer = model.Transformer(SMALL, attention, seed=0)
    tokens = torch.randint(256, (2, 16))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    before, after = transformer(tokens), transformer(changed)
    assert before.shape == (2, 16, 256)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=0)
    assert ((before - after).abs().amax(-1) > 1e-4)[:, 9:].all()  # and every later one sees it


def test_position_matters():
    """Without RoPE, attention sees earlier bytes as a set."""
    transformer = model.Transformer(SMALL, model.tandem, seed=0)
    a, b = transformer(torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]]))[:, -1]
    assert (a - b).abs().max() > 1e-4


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    cos, sin = model.rotation(16, 8)
    x, y = torch.randn(2, 1, 1, 1, 8)
    x, y = (model.rotate(one.expand(1, 16, 1, 8), cos, sin)[0, :, 0] for one in (x, y))
    torch.testing.assert_close(x.norm(dim=-1), x[:1].norm(dim=-1).expand(16))
    torch.testing.assert_close(x[5] @ y[2], x[13] @ y[10])
    assert not torch.isclose(x[5] @ y[2], x[5] @ y[3])


def test_a_seed_gives_the_same_weights_whatever_the_attention():
    one, two, three = (
        torch.nn.utils.parameters_to_vector(model.Transformer(SMALL, attention, seed).parameters())
        for attention, seed in ((model.tandem, 0), (model.sdpa, 0), (model.tandem, 1))
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


@pytest.mark.parametrize("recipe", [train.CPU, train.QUICK, train.GPU, train.GPU_QUICK])
def test_recipes_are_questions_that_attention_can_answer(recipe):
    shape = recipe.shape
    assert shape.heads % shape.kv_heads == 0
    assert shape.heads > shape.kv_heads, "grouped heads are worth showing"
    assert shape.head_dim % 8 == 0
    if recipe in (train.GPU, train.GPU_QUICK):
        assert shape.head_dim in (64, 128), "what the Hopper kernels have"
    assert len(text.language_reference()) >= text.HELD_OUT * (shape.context + 1)


# Training


def trained(attention, steps=12, **changes):
    recipe = dataclasses.replace(train.QUICK, shape=SMALL, steps=steps, **changes)
    tokens = text.load(None, SMALL.context)
    transformer = model.Transformer(SMALL, attention, seed=0)
    return train.train(transformer, tokens, recipe, 0, Silent()), transformer


def test_training_repeats_and_evaluates_on_the_way():
    one, two = (trained(model.tandem)[0] for _ in range(2))
    assert one.losses == two.losses
    assert len(one.losses) == 12
    assert [step for step, _ in one.held_out] == [0, 2, 4, 6, 8, 10, 12]
    assert one.held_out[-1][1] < one.held_out[0][1] - 0.5
    assert one.losses[0] == pytest.approx(math.log(256), abs=0.1)  # nothing is known yet


def test_the_learning_rate_rises_and_falls():
    assert train.schedule(0.05) == pytest.approx(0.5)
    assert train.schedule(0.1) == pytest.approx(1.0)
    assert train.schedule(0.55) == pytest.approx(0.525)
    assert train.schedule(1.0) == pytest.approx(0.05)


def test_gradients_tell_a_slightly_wrong_attention():
    def too_sharp(q, k, v):
        return model.sdpa(q * 1.01, k, v)

    _, ours = trained(model.tandem)
    batch = text.even_windows(text.load(None, 16).held_out, 8, 16)
    right = model.Transformer(SMALL, model.sdpa, seed=1)  # other weights: they are replaced
    wrong = model.Transformer(SMALL, too_sharp, seed=0)
    assert train.gradient_difference(ours, right, *batch) < train.CPU.gradients / 10
    assert train.gradient_difference(ours, wrong, *batch) > train.CPU.gradients * 2


# Writing


def test_each_byte_is_drawn_from_the_model_after_all_before_it():
    transformer = model.Transformer(SMALL, model.tandem, seed=0)
    transformer.head.weight.data *= 5000  # sure of itself: drawing is choosing the likeliest
    prompt, passages = b"a prompt", []
    written = bytes(generate(transformer, prompt, 9, 0, passages))
    assert len(written) == 9
    whole = prompt + written
    for place in range(len(prompt), len(whole)):
        assert transformer(torch.tensor([list(whole[:place])]))[0, -1].argmax() == whole[place]
    (passage,) = passages
    assert bytes(passage.seen) == whole[:-1]


@pytest.mark.parametrize("length", [1, 16, 40])
def test_a_full_cache_is_filled_anew(length):
    transformer = model.Transformer(SMALL, model.tandem, seed=0)
    prompt, passages = bytes(range(length)), []
    whole = prompt + bytes(generate(transformer, prompt, 30, 0, passages))
    end = length
    for i, passage in enumerate(passages):
        seen = passage.seen
        assert len(seen) <= 16
        end += len(passage.logits)
        assert bytes(seen) == whole[end - 1 - len(seen) : end - 1]
        if i:
            assert len(seen) - len(passage.logits) + 1 == 8, "the first pass sees half of a context"
    assert end == len(whole)
    match = compare(transformer, passages)
    assert match.places == match.same_choice == 30
    assert match.within(1e-5)


def test_what_is_apart_is_seen_and_nan_is_far():
    transformer = model.Transformer(SMALL, model.tandem, seed=0)
    tokens = [*b"some text"]
    right = transformer(torch.tensor([tokens]))[0].detach()
    moved = right + 0.25 * torch.eye(9, 256)
    assert compare(transformer, [Passage(tokens, [*moved[4:]])]).apart == pytest.approx(0.25)
    moved[8, 3] = math.nan
    match = compare(transformer, [Passage(tokens[:3], [*right[:3]]), Passage(tokens, [*moved[4:]])])
    assert (match.places, match.apart, match.within(1e9)) == (8, math.inf, False)


def test_a_seed_writes_the_same_again():
    transformer = model.Transformer(SMALL, model.tandem, seed=0)
    one, two, three = (bytes(generate(transformer, b"x", 20, seed)) for seed in (0, 0, 1))
    assert one == two != three


# All of it


def test_the_demo_from_end_to_end(demo, tmp_path, capsys, monkeypatch):
    drawn = []
    draw = plot.draw
    monkeypatch.setattr(plot, "draw", lambda *args: drawn.append(args) or draw(*args))
    assert demo() == 0
    path = tmp_path / "out.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    _, ours, other, _ = drawn[0]
    for history in (ours, other):
        assert len(history.losses) == train.QUICK.steps
        assert history.recent < history.losses[0] - 1.5
        assert history.held_out[-1][1] < history.held_out[0][1] - 1.5
    printed = capsys.readouterr().out
    assert f"loss curves: {path}\n" in printed
    assert "answered by torch" in printed
    assert re.search(r"60 steps in [\d.]+ s: [\d,]+ tokens/s; loss in nats per byte 5\.\d+ -> 3\.", printed)
    assert re.search(r"60 tokens in [\d.]+ s: \d+ tokens/s, by flash_attn_with_kvcache", printed)
    assert re.search(r"logits apart .* a pass without a cache +\d\.\de-0[5-9], the largest is", printed)
    assert "the likeliest byte is the same at 60 of 60 places" in printed
    assert "the same: decoding continues what a whole pass computes" in printed
    assert re.search(r"loss curves +\d\.\de-\d+ nats at step \d+ \(tolerance 0.01", printed)
    assert "the same: tandem_attn trains as torch does" in printed


def not_causal(q, k, v):
    """A wrong attention that shows in the losses."""
    return torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True
    ).transpose(1, 2)


def too_sharp(q, k, v, right=model.sdpa):
    """A wrong attention that shows in the gradients."""
    return right(q * 1.05, k, v)


def nan(q, k, v, right=model.sdpa):
    """A broken attention."""
    return right(q, k, v) * math.nan


@pytest.mark.parametrize("wrong", [not_causal, too_sharp, nan])
def test_a_torch_that_disagrees_is_exit_status_1(demo, monkeypatch, capsys, wrong):
    monkeypatch.setattr(model, "sdpa", wrong)
    assert demo("--steps", "30") == 1
    assert "NOT the same" in capsys.readouterr().out


DECODED = {
    "positions from 0 on": dict(rotary_seqlens=torch.zeros(1, dtype=torch.int32)),
    "pairs of neighbours": dict(rotary_interleaved=True),
    "one key not seen": dict(cache_leftpad=torch.ones(1, dtype=torch.int32)),
    "another scale": dict(softmax_scale=0.3),
}


@pytest.mark.parametrize("mistake", DECODED)
def test_decoding_that_disagrees_is_exit_status_1(demo, monkeypatch, capsys, mistake):
    right = tandem_attn.flash_attn_with_kvcache

    def wrong(*args, **kwargs):
        return right(*args, **kwargs | DECODED[mistake])

    monkeypatch.setattr(tandem_attn, "flash_attn_with_kvcache", wrong)
    assert demo("--steps", "5", "--no-compare") == 1
    assert "NOT the same" in capsys.readouterr().out


def test_without_comparison_torch_is_not_asked(demo, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(model, "sdpa", None)
    assert demo("--steps", "2", "--no-compare") == 0
    assert (tmp_path / "out.png").exists()
    assert "scaled_dot_product_attention" not in capsys.readouterr().out


def test_the_second_training_ends_in_time(demo, monkeypatch, capsys):
    monkeypatch.setattr(session, "TIME_LIMIT", 0.0)
    assert demo("--steps", "35") == 0
    assert "compared over the first 30 of 35 steps" in capsys.readouterr().out


def test_without_matplotlib_there_is_no_picture(demo, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert demo("--steps", "2", "--no-compare") == 0
    assert "no loss curves: matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "out.png").exists()


def test_another_text_and_prompt_and_seed(demo, capsys, tmp_path):
    path = tmp_path / "text"
    path.write_text("Fünf Äpfel. " * 100)
    assert (
        demo("--text", str(path), "--prompt", "Ä\n\udcff", "--seed", "3", "--steps", "40", "--no-compare")
        == 0
    )
    printed = capsys.readouterr().out
    assert "  | Ä\n  | " in printed
    assert "seed 3" in printed
    assert float(re.search(r"-> ([\d.]+)\n", printed).group(1)) < 2  # held out: more of the same


def test_threads_are_as_before(demo):
    torch.set_num_threads(2)
    assert demo("--steps", "1", "--no-compare") == 0
    assert torch.get_num_threads() == 2


MISTAKES = {
    "--text /no/such/file": "/no/such/file cannot be read (No such file or directory)",
    "--text /": "/ cannot be read (Is a directory)",
    "--text /dev/null": "/dev/null has 0 bytes; supported: at least 650",
    "--steps 0": "at least 1",
    "--seed -1": "supported: 0 up to 2**63 - 1",
    "--prompt=": "--prompt is empty",
    "--device tpu": "supported: cpu, cuda, cuda:N",
    "--device cuda:99": "torch sees",
    "--output /no/such/folder/x.png": "there is no folder /no/such/folder",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_one_line_and_exit_status_2(demo, capsys, words):
    try:
        status = demo(*words.split())
    except SystemExit as error:  # argparse
        status = error.code
    assert status == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert MISTAKES[words] in line
    assert captured.out == ""


# What a person sees


def test_control_characters_do_not_reach_the_terminal():
    assert display.printable("a\x1b[2Jb\r\n\t\ufffdé") == "a·[2Jb·\n·\ufffdé"


def test_a_terminal_without_unicode_gets_question_marks(monkeypatch, tmp_path):
    with open(tmp_path / "out", "w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        display.say("é·")
    assert (tmp_path / "out").read_text() == "??\n"


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch, capsys):
    with display.Progress(4) as progress:
        progress.advance(1, torch.tensor(2.5))
        progress.line(2, 2.0, 3.0, 1234.0)
    line = " ".join(capsys.readouterr().out.split())
    assert line == "step 2 of 4 train 2.000 held out 3.000 1,234 tokens/s"
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with display.Progress(4) as progress:
        progress.advance(1, torch.tensor(2.5))
        assert progress.bar.tasks[0].completed == 1
        assert "2.500" in progress.bar.tasks[0].description
        progress.line(2, 2.0, 3.0, 1234.0)
        assert progress.bar.tasks[0].completed == 2
    assert "held out 3.000" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich", None)
    assert display.Progress(4).bar is None
