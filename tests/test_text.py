"""Prompt cleaning, tokenising, the umT5 encoder against an oracle, and its cache."""

import json
import logging
import math
import socket
import subprocess
import sys
from html.entities import html5

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcv_core.config import TextConfig
from lcv_core.errors import CheckpointError, InputError
from lcv_core.text import prompt as cleaning
from lcv_core.text.encoder import TextEncoder, TextStates, build_text_model, load_tokenizer
from lcv_core.text.prompt import DEFAULT_NEGATIVE_PROMPT, clean_prompt, tokenize
from lcv_core.weights.init import text_state, write_tokenizer

CONFIG = TextConfig(vocab_size=2048, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def weights():
    return text_state(CONFIG, seed=1)


@pytest.fixture
def model(weights):
    model = build_text_model(CONFIG, dtype=torch.float32)
    model.load_state_dict(weights, strict=True, assign=True)
    return model


@pytest.fixture
def calls(model, monkeypatch):
    """Batch sizes of the model's forward calls."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _m, _a, kw: seen.append(len(kw["input_ids"])), with_kwargs=True)
    return seen


# cleaning


@pytest.mark.parametrize(
    "raw, clean",
    [
        ("a red ball", "a red ball"),
        ("  a \t red\n\n ball\u00a0 \u3000rolls ", "a red ball rolls"),
        ("cats &amp; dogs", "cats & dogs"),
        ("cats &amp;amp; dogs", "cats & dogs"),
        ("<b> &amp;amp;amp; dogs", "<b> &amp; dogs"),  # ftfy leaves markup alone; then exactly two unescapes
        ("&nbsp; left &amp;nbsp;", "left"),
        ("schÃ¶n", "schön"),
        ("“quoted” ﬁlm", '"quoted" film'),
        ("一只猫 🎬", "一只猫 🎬"),
        ("", ""),
        ("\ud800", "\ufffd"),
    ],
)
def test_clean_prompt(raw, clean):
    assert clean_prompt(raw) == clean


def test_clean_prompt_refuses_other_types():
    with pytest.raises(InputError, match="must be text, got list"):
        clean_prompt(["a"])  # type: ignore[arg-type]


def test_negative_prompt_survives_cleaning():
    assert clean_prompt(DEFAULT_NEGATIVE_PROMPT) == DEFAULT_NEGATIVE_PROMPT
    assert DEFAULT_NEGATIVE_PROMPT.startswith("Bright tones, overexposed, static, blurred details, subtitles, style,")
    assert DEFAULT_NEGATIVE_PROMPT.endswith("three legs, many people in the background, walking backwards")
    assert len(DEFAULT_NEGATIVE_PROMPT.split(", ")) == 28


@pytest.fixture
def without_ftfy(monkeypatch):
    """clean_prompt on a machine that lacks ftfy; the function that warns forgets that it did."""
    cleaning._warn_no_ftfy.cache_clear()

    def clean(text):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "ftfy", None)
            return clean_prompt(text)

    yield clean
    cleaning._warn_no_ftfy.cache_clear()


ASCII = [chr(i) for i in range(128)]
PIECES = [
    *ASCII, "a red ball", "&amp;", "&lt;", "&gt;", "&amp;amp;", "&AMP;", "&EXCL;", "&SZLIG;", "&nTILDE;", "&quot",
    "&#10;", "&#x7;", "&#38;", "&nbsp;", "&NewLine;", "&fjlig;", "&FJLIG;", "<b>", "\r\n", "\x1b[", "\x1b[31m",
    "\x1b[0;1m", "\x1b]0;", "&notanentity;", "&;", "&#;", "&#xZZ;",
]  # fmt: skip


@pytest.mark.parametrize("text", [*PIECES, "<" + "".join(PIECES), "".join(reversed(PIECES)), DEFAULT_NEGATIVE_PROMPT])
def test_ascii_is_cleaned_the_same_without_ftfy(without_ftfy, caplog, text):
    assert without_ftfy(text) == clean_prompt(text)
    assert not caplog.records


@settings(max_examples=500)
@given(text=st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_any_ascii_is_cleaned_the_same_without_ftfy(text):
    warned = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ftfy", None)
        patch.setattr(cleaning, "_warn_no_ftfy", lambda: warned.append(True))
        got = clean_prompt(text)
    assert got == clean_prompt(text) or warned
    assert not warned or "&" in text  # pieces may make up an entity of another character


def test_every_entity_is_cleaned_the_same_or_warned_about(monkeypatch):
    warned = []
    monkeypatch.setattr(cleaning, "_warn_no_ftfy", lambda: warned.append(True))
    silent = 0
    for name in [*html5, *(name.upper() for name in html5), *(f"#{i};" for i in range(300))]:
        text = f"a &{name} b"
        expected = clean_prompt(text)
        warned.clear()
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "ftfy", None)
            got = clean_prompt(text)
        assert got == expected or warned, text
        silent += not warned
    assert silent > 500


def test_other_text_is_cleaned_as_far_as_possible_with_one_warning(without_ftfy, caplog):
    with caplog.at_level(logging.WARNING):
        assert without_ftfy("  sch\u00f6n &amp;amp; \x1b[31mred\x07\u3000 \u4e00 ") == "sch\u00f6n & red \u4e00"
        assert (
            without_ftfy("half a pair \ud800, a whole one \ud83d\ude00") == "half a pair \ufffd, a whole one \U0001f600"
        )
        assert without_ftfy("caf&eacute;") == "caf\u00e9"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "`pip install ftfy`" in record.getMessage()


def test_ftfy_itself_is_never_warned_about(caplog):
    cleaning._warn_no_ftfy.cache_clear()
    assert clean_prompt("sch\u00c3\u00b6n") == "sch\u00f6n"
    assert not caplog.records


# tokenising


def test_tokenize_shapes_mask_and_padding(tokenizer, caplog):
    ids, mask = tokenize(tokenizer, ["A red ball rolls slowly.", "", DEFAULT_NEGATIVE_PROMPT])
    assert ids.shape == mask.shape == (3, 512)
    assert ids.dtype == mask.dtype == torch.int64
    assert mask.sum(1).tolist() == [7, 1, len(tokenizer(DEFAULT_NEGATIVE_PROMPT)["input_ids"])]
    assert ids[1, 0] == 1  # the empty prompt is eos alone
    for row, keep in zip(ids, mask.bool(), strict=True):
        assert row[keep][-1] == 1  # eos
        assert (row[~keep] == 0).all()  # pad
        assert not (row[keep] == 0).any()
    assert not caplog.records


def test_tokenize_truncates_with_eos_and_says_so(tokenizer, caplog, recwarn):
    words = ["red"] * 500 + ["blue"] * 11 + ["green", "yellow", "orange", "purple", "violet", "pink"]
    with caplog.at_level(logging.WARNING):
        ids, mask = tokenize(tokenizer, [" ".join(words), "short"])
    (record,) = caplog.records
    assert record.name == "lcv_core" and record.levelno == logging.WARNING
    message = record.getMessage()
    assert "518 tokens" in message and "only 512" in message
    assert '"green yellow orange purple violet ..."' in message
    assert not recwarn.list
    assert mask[0].sum() == 512 and ids[0, -1] == 1
    blue = tokenizer("blue")["input_ids"][0]
    assert ids[0, -2] == blue  # 511 words kept


def test_tokenize_exactly_at_the_limit_is_silent(tokenizer, caplog):
    ids, mask = tokenize(tokenizer, [" ".join(["red"] * 511)])
    assert mask.sum() == 512 and ids[0, -1] == 1 and not caplog.records
    tokenize(tokenizer, [" ".join(["red"] * 512)])
    assert len(caplog.records) == 1


def test_tokenize_validates(tokenizer):
    with pytest.raises(InputError, match="at least one prompt"):
        tokenize(tokenizer, [])
    with pytest.raises(InputError, match="max_length"):
        tokenize(tokenizer, ["a"], max_length=0)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_unicode_tokenises_without_unk(tokenizer, text):
    ids, mask = tokenize(tokenizer, [clean_prompt(text)], max_length=2048)
    row = ids[0][mask[0].bool()].tolist()
    assert 3 not in row and row[-1] == 1


def test_tokenizer_round_trip(tokenizer):
    for text in ["A red ball, rolling left; 3 of 10!", "Größe 一只猫 🎬 naïve", DEFAULT_NEGATIVE_PROMPT]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer("red ball moving left")["input_ids"]) == 5  # whole words, not letters


def test_tokenizer_loads_with_auto_tokenizer(folder, tokenizer):
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    assert (auto.pad_token_id, auto.eos_token_id, auto.bos_token_id, auto.unk_token_id) == (0, 1, 2, 3)
    for text in ["A red ball.", "", "Größe 猫"]:
        assert auto(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_load_tokenizer_never_connects(folder, monkeypatch):
    def refuse(*_a, **_k):
        raise AssertionError("a network connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load_tokenizer(folder)(["red"])["input_ids"][0][-1] == 1


def test_load_tokenizer_reads_token_objects(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5Tokenizer", "pad_token": {"content": "<s>", "special": True}})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token_id == 2 and tokenizer.eos_token_id == 1


def test_load_tokenizer_names_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*spiece\.model"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a readable tokenizer"):
        load_tokenizer(tmp_path)


def test_load_tokenizer_from_sentencepiece(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["a red ball rolls left", "a blue cube spins slowly"] * 20),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    ids, mask = tokenize(tokenizer, ["a red cube", ""], max_length=16)
    expected = [*pieces.EncodeAsIds("a red cube"), 1]
    assert ids[0][mask[0].bool()].tolist() == expected and ids[1, :2].tolist() == [1, 0]
    assert tokenizer.decode(expected[:-1]) == "a red cube"
    (tmp_path / "spiece.model").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)


# the model


def oracle(weights, config, ids, mask):
    """The umT5 encoder in plain torch, from the specification: states [B, L, C]."""
    heads, buckets = config.num_heads, config.relative_attention_num_buckets

    def norm(x, name):
        return weights[name] * x / (x.pow(2).mean(-1, keepdim=True) + config.layer_norm_epsilon).sqrt()

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def bucket(distance):  # key position minus query position
        half = buckets // 2
        exact, n = half // 2, abs(distance)
        if n >= exact:
            span = math.log(config.relative_attention_max_distance / exact)
            n = min(exact + int(math.log(n / exact) / span * (half - exact)), half - 1)
        return n + (half if distance > 0 else 0)

    B, L = ids.shape
    table = torch.tensor([[bucket(k - q) for k in range(L)] for q in range(L)])
    x = weights["shared.weight"][ids]
    for i in range(config.num_layers):
        name = f"encoder.block.{i}.layer"
        h = norm(x, f"{name}.0.layer_norm.weight")
        q, k, v = (
            (h @ weights[f"{name}.0.SelfAttention.{p}.weight"].T).view(B, L, heads, -1).transpose(1, 2) for p in "qkv"
        )
        scores = q @ k.transpose(-1, -2)  # not scaled
        scores = scores + weights[f"{name}.0.SelfAttention.relative_attention_bias.weight"][table].permute(2, 0, 1)
        scores = scores.masked_fill(mask[:, None, None] == 0, -math.inf)
        h = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, L, -1)
        x = x + h @ weights[f"{name}.0.SelfAttention.o.weight"].T
        h = norm(x, f"{name}.1.layer_norm.weight")
        wi_0, wi_1, wo = (weights[f"{name}.1.DenseReluDense.{w}.weight"] for w in ("wi_0", "wi_1", "wo"))
        x = x + (gelu(h @ wi_0.T) * (h @ wi_1.T)) @ wo.T
    return norm(x, "encoder.final_layer_norm.weight")


def test_model_equals_the_oracle(model, weights):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(4, CONFIG.vocab_size, (2, 150), generator=g)  # beyond the largest bucket's 128
    mask = torch.ones_like(ids)
    mask[1, 40:] = 0
    with torch.no_grad():
        ours = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(ours, oracle(weights, CONFIG, ids, mask), rtol=1e-5, atol=1e-5)


def test_relative_bias_is_per_layer(model, weights):
    """Each layer's own table counts, and swapping the two changes the result."""
    ids, mask = torch.arange(4, 24)[None], torch.ones(1, 20, dtype=torch.int64)
    names = [f"encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight" for i in range(2)]
    with torch.no_grad():
        base = model(input_ids=ids, attention_mask=mask).last_hidden_state
        for replaced in ({names[0]: names[1]}, {names[1]: names[0]}):
            changed = weights | {to: weights[source] for to, source in replaced.items()}
            other = build_text_model(CONFIG, dtype=torch.float32)
            other.load_state_dict(changed, strict=True, assign=True)
            ours = other(input_ids=ids, attention_mask=mask).last_hidden_state
            assert (ours - base).abs().max() > 1e-2
            torch.testing.assert_close(ours, oracle(changed, CONFIG, ids, mask), rtol=1e-5, atol=1e-5)


def test_full_size_on_meta():
    model = build_text_model(TextConfig())
    assert sum(p.numel() for p in model.parameters()) == 5_680_910_336
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in model.parameters())
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert len(model.state_dict()) == 24 * 10 + 2


@pytest.mark.parametrize("stored", ["shared", "both", "copy"])
def test_tied_embedding_in_every_form(weights, stored):
    state = dict(weights)
    if stored != "shared":
        state["encoder.embed_tokens.weight"] = state["shared.weight"].clone()
    if stored == "copy":
        del state["shared.weight"]
    keys = set(state)
    model = build_text_model(CONFIG, dtype=torch.float32)
    model.load_state_dict(state, strict=True, assign=True)
    assert set(state) == keys  # the caller's dict is left alone
    assert not any(p.is_meta for p in model.parameters())
    assert model.encoder.embed_tokens is model.shared
    torch.testing.assert_close(model.shared.weight, weights["shared.weight"], rtol=0, atol=0)
    model.to(torch.bfloat16)
    assert model.encoder.embed_tokens.weight.dtype == torch.bfloat16


def test_strict_load_refuses_a_gap(weights):
    state = {k: v for k, v in weights.items() if not k.endswith("final_layer_norm.weight")}
    with pytest.raises(RuntimeError, match="final_layer_norm"):
        build_text_model(CONFIG, dtype=torch.float32).load_state_dict(state, strict=True, assign=True)


# the encoder


def test_encode_equals_a_direct_call(model, tokenizer, weights):
    from transformers import UMT5Config, UMT5EncoderModel

    direct = UMT5EncoderModel(UMT5Config(**{k: v for k, v in CONFIG.to_dict().items() if k != "architectures"})).eval()
    direct.load_state_dict(weights | {"encoder.embed_tokens.weight": weights["shared.weight"]}, strict=True)
    batch = tokenizer(["a red ball", ""], padding="max_length", max_length=512, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = direct(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    text = TextEncoder(model, tokenizer).encode(["  a red   ball", ""])
    assert text.states.shape == (2, 512, 32) and text.states.dtype == torch.float32
    assert text.mask is not None and text.mask.dtype == torch.int64
    torch.testing.assert_close(text.mask, batch["attention_mask"])
    torch.testing.assert_close(text.states, expected, rtol=1e-6, atol=1e-6)
    assert text.states[0, 100].abs().max() > 0.1  # pads are not zeroed


def test_encode_keeps_the_dtype_of_the_model(model, tokenizer):
    text = TextEncoder(model.to(torch.bfloat16), tokenizer, max_length=16).encode("a red ball")
    assert text.states.dtype == torch.bfloat16 and text.states.shape == (1, 16, 32)


def test_cache_hits_do_not_call_the_model(model, tokenizer, calls):
    encoder = TextEncoder(model, tokenizer, max_length=32)
    first = encoder.encode(["a red ball", "blue sky"])
    assert calls == [2]
    again = encoder.encode(["blue sky", " a  red ball ", "blue sky"])
    assert calls == [2]
    assert torch.equal(again.states, first.states[[1, 0, 1]]) and torch.equal(again.mask, first.mask[[1, 0, 1]])
    encoder.encode(["blue sky", "a cube", "a cube"])
    assert calls == [2, 1]  # only what is new, once
    again.states.zero_()  # what a caller does to its copy is not remembered
    assert torch.equal(encoder.encode("blue sky").states, first.states[1:])
    model.to(torch.bfloat16)
    assert encoder.encode("blue sky").states.dtype == torch.bfloat16
    assert calls == [2, 1, 1]


def test_cache_is_bounded_and_drops_the_oldest(model, tokenizer, calls):
    encoder = TextEncoder(model, tokenizer, max_length=8, cache_size=2)
    batch = encoder.encode(["red", "green", "blue"])  # more than the cache holds
    assert batch.batch == 3 and len(encoder._cache) == 2 and calls == [3]
    encoder.encode("green")  # used again: blue is now the oldest
    encoder.encode("pink")
    encoder.encode("green")
    assert calls == [3, 1]
    encoder.encode("blue")
    assert calls == [3, 1, 1]


def test_batch_equals_single(model, tokenizer):
    prompts = ["a red ball", "", DEFAULT_NEGATIVE_PROMPT]
    together = TextEncoder(model, tokenizer).encode(prompts)
    for i, prompt in enumerate(prompts):
        alone = TextEncoder(model, tokenizer).encode(prompt)
        torch.testing.assert_close(together.select(i).states, alone.states, rtol=1e-5, atol=1e-5)
        assert torch.equal(together.select(i).mask, alone.mask)


def test_encode_validates(model, tokenizer):
    with pytest.raises(InputError, match="at least one prompt"):
        TextEncoder(model, tokenizer).encode([])
    with pytest.raises(InputError, match="must be text"):
        TextEncoder(model, tokenizer).encode([None])  # type: ignore[list-item]


# text states


def test_text_states():
    states, mask = torch.randn(2, 1, 5, 3), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    text = TextStates(states, mask)
    assert text.states.shape == (2, 5, 3) and text.batch == 2
    twice = text.repeat(2)
    assert torch.equal(twice.states, states[[0, 0, 1, 1], 0]) and torch.equal(twice.mask, mask[[0, 0, 1, 1]])
    last = text.select(-1)
    assert last.batch == 1 and torch.equal(last.states, states[1]) and torch.equal(last.mask, mask[1:])
    half = text.to("cpu", torch.bfloat16)
    assert half.states.dtype == torch.bfloat16 and half.mask.dtype == torch.int64
    bare = TextStates(states[:, 0])
    assert bare.mask is None and bare.repeat(3).mask is None and bare.select(0).to("cpu").mask is None


@pytest.mark.parametrize(
    "states, mask, message",
    [
        (torch.zeros(5, 3), None, r"\[B, L, C\]"),
        (torch.zeros(2, 2, 5, 3), None, r"\[B, L, C\]"),
        (torch.zeros(0, 5, 3), None, r"\[B, L, C\]"),
        (torch.zeros(2, 5, 3, dtype=torch.int64), None, "floating"),
        (torch.zeros(2, 5, 3), torch.ones(2, 4, dtype=torch.int64), r"must be \[2, 5\], got \[2, 4\]"),
        (torch.zeros(2, 5, 3), torch.ones(1, 5, dtype=torch.bool), r"must be \[2, 5\], got \[1, 5\]"),
        (torch.zeros(2, 5, 3), torch.ones(2, 5), "integer or bool"),
    ],
)
def test_text_states_refuses(states, mask, message):
    with pytest.raises(InputError, match=message):
        TextStates(states, mask)


def test_text_states_indices():
    text = TextStates(torch.zeros(2, 5, 3))
    with pytest.raises(InputError, match="no entry 2"):
        text.select(2)
    with pytest.raises(InputError, match="at least 1"):
        text.repeat(0)


def test_importing_does_not_import_transformers():
    code = (
        "import sys, lcv_core.text.encoder, lcv_core.weights.init;"
        "sys.exit(any(m in sys.modules for m in ('transformers', 'tokenizers', 'sentencepiece', 'ftfy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
