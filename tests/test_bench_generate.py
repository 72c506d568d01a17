"""`bench generate`: what is compared, what is refused, what is written. Numbers themselves are not tested."""

import types

import pytest
import torch

import tandem_attn
from tandem_attn import cli
from tandem_attn.bench import UserError, decoders, generate, llama, report

TINY = llama.Shape("tiny", 128, 192, 8, 2, 32, 256, torch.float32)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The same on every machine, and in a moment."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(generate, "SMALL", TINY)


@pytest.fixture
def bench(tmp_path):
    """Run `tandem-attn bench generate` with more options; its exit status and document."""

    def run(*options: str) -> tuple[int, dict]:
        path = tmp_path / "out.json"
        options = ("--prompts", "7,40", "--repeats", "1", "--idle-ms", "0", "--json", str(path), *options)
        return cli.main(["bench", "generate", *options]), report.load(path)

    return run


def test_from_end_to_end(bench, capsys):
    status, document = bench("--prompts", "40,1k,7,40", "--layers", "3")
    assert status == 0
    assert document["kind"] == "generate"
    assert document["complete"]
    assert document["model"] == {"name": str(TINY), "layers": 3, "batch": 1, "capacity": 1025}
    assert [one["prompt"] for one in document["cases"]] == [7, 40, 1024]
    for one in document["cases"]:
        ours, peer = one["results"]["tandem"], one["results"]["sdpa"]
        for result in (ours, peer):
            assert result["tokens_per_second"] == pytest.approx(1e6 / result["median_us"])
        assert one["ratio"] == pytest.approx(ours["tokens_per_second"] / peer["tokens_per_second"])
    printed = capsys.readouterr().out
    assert printed.index("prompt 1k ") < printed.index("prompt 40 ") < printed.index("prompt 7 ")
    assert "3 layers of tiny: hidden 128, MLP 192, 8 query heads over 2 KV heads of 32, float32" in printed
    assert "tandem: reference: " in printed
    assert "no prefill was run" in printed


def test_lengths_double_from_512_to_64k():
    assert (generate.PROMPTS[0], generate.PROMPTS[-1], len(generate.PROMPTS)) == (512, 65536, 8)


# Right and wrong


def a_model(shape=TINY, layers=2, capacity=60):
    model = llama.Model(shape, layers, CPU)
    return model, decoders.decoders(model, capacity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 1, 33, 59])
def test_both_are_right(dtype, length):
    shape = llama.Shape("one", 256, 320, 8, 2, 64, 512, dtype)
    with torch.no_grad():
        _, found = a_model(shape, layers=4)
        oracle = generate.oracle_of(found["sdpa"], length)
        for one in found.values():
            answer = one.answer(one.at(length), length)
            assert decoders.what_is_wrong(answer, *oracle) == ""
            assert one.chosen == answer.logits.argmax()


def test_caches_hold_the_same_and_a_step_writes_one_token():
    _, found = a_model()
    ours, theirs = found["tandem"].attention, found["sdpa"].attention
    before = [x.clone() for x in (ours.k, ours.v)]
    for x, y in ((ours.k, theirs.k), (ours.v, theirs.v)):
        assert torch.equal(x[:, 0].transpose(1, 2), y)
    for one in found.values():
        one.at(20)()
    others = [slot for slot in range(60) if slot != 20]
    for x, y, old in ((ours.k, theirs.k, before[0]), (ours.v, theirs.v, before[1])):
        assert torch.equal(x[:, 0, others], old[:, 0, others])
        assert torch.equal(y[:, :, others], old[:, 0, others].transpose(1, 2))
        assert not torch.isclose(x[:, 0, 20], old[:, 0, 20]).any(-1).all()
        torch.testing.assert_close(x[:, 0, 20], y[:, :, 20])


def test_the_first_head_of_a_group_looks_at_its_own_token():
    """Else a kernel that forgets the new key would give the same logits."""
    model, _ = a_model()
    q, k, _ = model.layers[1].qkv.unflatten(0, (-1, 32)).split([8, 2, 2])
    assert torch.equal(k, q[[0, 4]] * llama.SHARPNESS)


def unseen(right, **call):
    right(**call)
    return right(**{name: x for name, x in call.items() if name not in ("k", "v")})


def unwritten(right, **call):
    return right(**call | {"k_cache": call["k_cache"].clone(), "v_cache": call["v_cache"].clone()})


def nan(right, **call):
    return right(**call).fill_(torch.nan)


def changed(**changes):
    return lambda right, **call: right(**call | {name: x(call) for name, x in changes.items()})


FAULTS = {
    "the new key is not seen": (unseen, "logits"),
    "the new key is not written": (unwritten, "keys"),
    "NaN": (nan, "logits"),
    "other pairs are rotated": (changed(rotary_interleaved=lambda call: True), "logits"),
    "positions are one off": (changed(rotary_seqlens=lambda call: call["cache_seqlens"] - 1), "keys"),
    "the length is one off": (changed(cache_seqlens=lambda call: call["cache_seqlens"] - 1), "logits"),
    "another scale": (changed(softmax_scale=lambda call: 0.18), "logits"),
    "some keys are not seen": (
        changed(cache_leftpad=lambda call: torch.full((1,), 3, dtype=torch.int32)),
        "logits",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_result_has_no_number_and_fails_the_run(bench, monkeypatch, capsys, fault):
    wrong, what = FAULTS[fault]
    right = tandem_attn.flash_attn_with_kvcache
    monkeypatch.setattr(tandem_attn, "flash_attn_with_kvcache", lambda **call: wrong(right, **call))
    status, document = bench()
    assert status == 1
    for one in document["cases"]:
        assert set(one["results"]["tandem"]) == {"label", "wrong"}
        assert one["results"]["tandem"]["wrong"].startswith(("logits", what))
        assert "tokens_per_second" in one["results"]["sdpa"]
        assert one["ratio"] is None
    printed = capsys.readouterr().out
    assert "prompt 7                 tokens/s: tandem WRONG, sdpa " in printed
    assert "tandem: WRONG: " in printed
    status, document = bench("--no-check")
    assert status == 0
    assert document["settings"]["checked"] is False


def test_a_wrong_peer_has_no_number_either(bench, monkeypatch, capsys):
    right = torch.nn.functional.scaled_dot_product_attention

    def wrong(q, k, v, **options):
        return right(q, k[..., 1:, :], v[..., 1:, :], **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", wrong)
    status, document = bench("--prompts", "7")
    assert status == 0
    (one,) = document["cases"]
    assert "tokens_per_second" in one["results"]["tandem"]
    assert set(one["results"]["sdpa"]) == {"label", "wrong"}
    assert one["ratio"] is None
    assert "sdpa: WRONG: logits" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["flash_attn_with_kvcache", "decode_workspace"])
def test_a_failure_is_reported_and_the_peer_goes_on(bench, monkeypatch, capsys, name):
    def fails(*args, **kwargs):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(tandem_attn, name, fails)
    status, document = bench()
    assert status == 1
    for one in document["cases"]:
        assert one["results"]["tandem"] == {"reason": "RuntimeError: out of luck"}
        assert "tokens_per_second" in one["results"]["sdpa"]
    assert "tandem: RuntimeError: out of luck  (all)" in capsys.readouterr().out


def test_a_length_that_cannot_be_checked_has_no_numbers(bench, monkeypatch):
    right = generate.oracle_of

    def too_large(theirs, prompt):
        if prompt == 40:
            raise torch.OutOfMemoryError("tried to allocate everything")
        return right(theirs, prompt)

    monkeypatch.setattr(generate, "oracle_of", too_large)
    status, document = bench()
    assert status == 1
    small, large = (one["results"] for one in document["cases"])
    assert all("tokens_per_second" in result for result in small.values())
    assert all("allocate" in result["reason"] for result in large.values())


def test_an_interrupted_run_leaves_what_it_measured(bench, monkeypatch):
    real, done = generate.measure_prompt, []

    def interrupted(*args):
        if done:
            raise KeyboardInterrupt
        done.append(args)
        return real(*args)

    monkeypatch.setattr(generate, "measure_prompt", interrupted)
    status, document = bench()
    assert status == 130
    assert document["complete"] is False
    assert [one["prompt"] for one in document["cases"]] == [40]


# Graphs and memory


def test_ours_needs_one_graph_and_a_fixed_length_one_each(monkeypatch):
    captured = []

    def capture(step):
        captured.append(step)
        return types.SimpleNamespace(replay=lambda: "replayed")

    monkeypatch.setattr(decoders, "_captured", capture)
    model, found = a_model()
    model.device = torch.device("cuda")
    for name, graphs in (("tandem", 1), ("sdpa", 3)):
        captured.clear()
        for length in (50, 30, 30, 10):
            assert found[name].at(length)() == "replayed"
        assert len(captured) == graphs
    assert found["tandem"].attention.length.tolist() == [10]


def test_as_many_layers_as_fit():
    shape, capacity = llama.CODELLAMA_34B, 65537
    model = llama.Model(TINY, 1, CPU)
    assert TINY.layer_bytes == sum(x.nbytes for x in model.layers[0] if x.dim() == 2)
    assert 30 < generate.layers_within(shape, None, capacity, 79 * 2**30) < generate.LAYERS, "an H100"
    assert generate.layers_within(shape, None, capacity, 139 * 2**30) == generate.LAYERS
    assert generate.layers_within(shape, 48, capacity, 139 * 2**30) == 48, "all of it on an H200"
    few = generate.layers_within(shape, None, capacity, 24 * 2**30)
    assert 1 <= few < generate.LAYERS
    assert generate.layers_within(shape, None, 4097, 24 * 2**30) > few
    assert generate.layers_within(shape, few, capacity, 24 * 2**30) == few
    with pytest.raises(UserError, match=rf"--layers {few + 1} .*24 GiB free: {few}, more with shorter"):
        generate.layers_within(shape, few + 1, capacity, 24 * 2**30)
    with pytest.raises(UserError, match="4 GiB free: 0"):
        generate.layers_within(shape, None, capacity, 4 * 2**30)
    assert generate.layers_for(TINY, None, capacity, CPU) == generate.CPU_LAYERS


MISTAKES = {
    "--prompts 512,many": "names 'many'; supported: lengths of at least 1",
    "--prompts 0": "names '0'; supported",
    "--prompts ,": "names ''; supported",
    "--layers 0": "at least 1",
    "--repeats 0": "at least 1",
    "--idle-ms -1": "at least 0",
    "--json /no/such/folder/x.json": "no folder /no/such/folder",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_one_line_and_exit_2(words, capsys):
    try:
        status = cli.main(["bench", "generate", *words.split()])
    except SystemExit as stop:  # argparse
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert MISTAKES[words] in line
