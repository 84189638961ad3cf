"""Hostile files, made up: adapters, plans, settings, moments and archives that are nearly, or not at all, sound."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from hostile import LIMIT, Case
from hostile_bytes import CONFIG, KEYS, LAYER, NAMES, peft, safetensors_bytes, sound, tensors
from hypothesis import strategies as st
from safetensors.torch import save

INTEGERS = st.sampled_from([0, 1, 2, 3, 4, 5, 8, -1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**9, 10**30, 10**400])
NUMBERS = INTEGERS | st.floats() | st.sampled_from([0.5, 1e-300, 1e300])
WORDS = st.sampled_from(
    [
        "",
        "q_proj",
        LAYER,
        ".*",
        "(",
        "(a+)+$",
        "x" * 300,
        "\x1b[2J",
        "\ud800",
        "../../etc",
        "\0",
        "LORA",
        "none",
        "é",
        "#1",
    ]
) | st.text(max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=8,
)
FIELDS = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "modules_to_save",
    "target_parameters", "use_rslora", "use_dora", "bias", "lora_bias", "init_lora_weights", "peft_type",
    "base_model_name_or_path", "task_type", "init_r", "kasa_config", "layers_to_transform", "layer_replication",
    "trainable_token_indices", "fan_in_fan_out",
)  # fmt: skip
RAW_JSON = st.sampled_from(
    [
        b"",
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"r": 1e400, "lora_alpha": 1}',
        b'{"r": ' + b"9" * 5000 + b"}",
        b'{"r": 2, "r": 4, "lora_alpha": 4}',
        b'{"r": NaN, "lora_alpha": -Infinity}',
        b"null",
        b"[]",
        b'"text"',
    ]
) | st.binary(max_size=30)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A safetensors file whose header has been tampered with."""
    form = draw(st.sampled_from(sorted(KEYS)))
    raw = sound(form)
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    for _ in range(draw(st.integers(0, 3))):
        key = draw(st.sampled_from(sorted(header)))
        what = draw(st.sampled_from(["dtype", "shape", "data_offsets", "entry", "key", "metadata"]))
        if what == "key":
            header[draw(WORDS)] = header.pop(key)
        elif what == "entry":
            header[key] = draw(VALUES)
        elif what == "metadata":
            header["__metadata__"] = draw(VALUES | st.dictionaries(WORDS, WORDS, max_size=3))
        elif isinstance(header[key], dict):
            values = {
                "dtype": st.sampled_from(["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "", "X"]),
                "shape": st.lists(INTEGERS, max_size=4),
                "data_offsets": st.lists(INTEGERS, max_size=3),
            }
            header[key][what] = draw(values[what] | VALUES)
    text = json.dumps(header).encode()
    length = draw(st.sampled_from([None, None, 0, 1, 8, 2**62, 2**64 - 1, 100_000_001]))
    made = safetensors_bytes(
        text, data[: draw(st.sampled_from([len(data), len(data), 0, 1, len(data) - 1]))], length=length
    )
    return draw(mutated(made))


@st.composite
def mutated(draw: st.DrawFn, raw: bytes) -> bytes:
    """The same with a few bytes changed, removed or added; more often than not as it is."""
    data = bytearray(raw)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2, 5]))):
        if data:
            place = draw(st.integers(0, len(data) - 1))
            data[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(data)


@st.composite
def shapes(draw: st.DrawFn) -> bytes:
    """Sound files of odd shapes and dtypes: everything that fits the format, whatever it may mean."""
    form = draw(st.sampled_from(sorted(KEYS)))
    dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool])
    sizes = st.sampled_from([0, 1, 2, 3, 4, 9])
    found: dict[str, torch.Tensor] = {}
    for number in range(draw(st.integers(1, 3))):
        rank = draw(st.sampled_from([1, 2, 2, 2, 4, 300, 20_000]))
        name = NAMES[form].replace("0", str(number), 1)
        down, up = (key.format(name) for key in KEYS[form])
        kernel = draw(st.lists(sizes, max_size=2))
        dtype = draw(dtypes)
        found[down] = torch.ones(rank, draw(sizes), *kernel).to(dtype)
        found[up] = torch.ones(draw(sizes), rank, *(1 for _ in kernel)).to(
            draw(st.sampled_from([dtype, torch.float32]))
        )
        if draw(st.booleans()):
            value = draw(st.sampled_from([0.0, 1.0, -1.0, 1e30, float("inf"), float("nan")]))
            found[f"{name}.alpha"] = torch.full(draw(st.sampled_from([(), (1,), (2,), (0,)])), value).to(draw(dtypes))
        for extra in draw(st.lists(st.sampled_from(EXTRAS), max_size=2)):
            found[extra.format(name)] = torch.ones(draw(st.lists(sizes, max_size=4))).to(draw(dtypes))
    return save(found, metadata={"format": "pt"})


EXTRAS = (
    "{}.lora_mid.weight",
    "{}.dora_scale",
    "{}.hada_w1_a",
    "base_model.model.{}.lora_magnitude_vector",
    "base_model.model.{}.lora_B.bias",
    "base_model.model.{}.lora_embedding_A",
    "base_model.model.{}.base_layer.lora_A.weight",
    "base_model.model.{}.base_layer.out_proj.lora_A.weight",
    "base_model.model.{}.lora_A.other.weight",
    "base_model.model.lm_head.weight",
    "unet.other.lora.down.weight",
    "loose",
)


@st.composite
def cases_of_headers(draw: st.DrawFn) -> Case:
    raw = draw(headers() | shapes())
    if draw(st.booleans()):
        return {"lora.safetensors": raw}
    return peft({**CONFIG, "r": draw(st.sampled_from([1, 2, 4, 300, 20_000]))}, raw)


@st.composite
def cases_of_configurations(draw: st.DrawFn) -> Case:
    if draw(st.integers(0, 5)) == 0:
        return peft(draw(RAW_JSON))
    changed = draw(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3))
    patterns = st.dictionaries(WORDS, NUMBERS, max_size=3)
    if draw(st.booleans()):
        changed["rank_pattern"] = draw(patterns)
    if draw(st.booleans()):
        changed["alpha_pattern"] = draw(patterns)
    return peft({**CONFIG, **changed})


KOHYA_FIELDS = (
    "ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_network_module", "ss_base_model_version",
    "sshs_model_hash", "modelspec.hash_sha256", "sshs_legacy_hash", "lora_squeeze", "lora_adapter_metadata",
    "modelspec.architecture",
)  # fmt: skip


@st.composite
def cases_of_metadata(draw: st.DrawFn) -> Case:
    """kohya's and diffusers' metadata, and the project's own: texts, often of JSON."""
    texts = WORDS.filter(lambda word: "\ud800" not in word) | VALUES.map(json.dumps) | RAW_JSON.map(_as_text)
    fields = st.dictionaries(st.sampled_from(KOHYA_FIELDS), texts, max_size=4)
    metadata = {key: value.encode(errors="replace").decode() for key, value in draw(fields).items()}
    form = draw(st.sampled_from(sorted(KEYS)))
    if form == "diffusers" and draw(st.booleans()):
        named = {f"unet.{field}": draw(VALUES) for field in draw(st.lists(st.sampled_from(FIELDS[:4]), max_size=3))}
        metadata["lora_adapter_metadata"] = json.dumps({"unet.r": 2, "unet.lora_alpha": 2, **named})
    raw = sound(form, metadata)
    return peft(CONFIG, raw) if form == "peft" else {"lora.safetensors": raw}


@st.composite
def cases_of_plans(draw: st.DrawFn) -> Case:
    layers = [LAYER, LAYER.replace("0", "1")]
    plan = {"record": "Ranks", "policy": draw(WORDS), "by_layer": {layer: draw(INTEGERS | VALUES) for layer in layers}}
    plan.update(draw(st.dictionaries(st.sampled_from(["record", "policy", "by_layer", "x"]), VALUES, max_size=2)))
    return {**peft(), "ranks.json": draw(st.just(json.dumps(plan).encode()) | RAW_JSON)}


TOML_KEYS = (
    "adapter_path", "min_variance_retention", "source_rank", "target_ranks", "output_path", "compress_to",
    "device", "by", "method", "dtype", "policy", "min_rank", "max_rank", "multiple_of", "steps", "rank_for",
    "equal", "runtime", "max_lora_rank", "overwrite", "unknown",
)  # fmt: skip
TOML_VALUES = st.sampled_from(
    [
        '"adapter"', '"out-1/x"', '""', "0", "1", "-1", "2", "1e400", "nan", "0.5", "9" * 5000, "[]", "[1, 2]",
        "[0]", "{}", '["qkv"]', '["("]', "{ q_proj = 1 }", '{ "(" = 1 }', "true", "1979-05-27", '"cpu"',
        '"cuda:99"', '"energy=0.5"',
        '"size=1e400MB"', '"fixed=-1"', '"params=nan"', '"worst"', '"f16"', '"vllm"', "[" * 3000,
        '"\\uD800"', '"\\u0000"',
        '"/nonexistent/x"', '"adapter/inside"', '"."',
    ]
)  # fmt: skip


@st.composite
def cases_of_settings(draw: st.DrawFn) -> Case:
    keys = {"adapter_path": '"adapter"'}
    keys.update(draw(st.dictionaries(st.sampled_from(TOML_KEYS), TOML_VALUES, max_size=4)))
    text = "[squeeze]\n" + "\n".join(f"{key} = {value}" for key, value in keys.items())
    return {**peft(), "squeeze.toml": draw(st.just(text.encode()) | mutated(text.encode()) | RAW_JSON)}


RUN_KEYS = (
    "seeds", "conditions", "max_steps", "parallel", "max_workers", "executor", "retries", "summary_args", "model",
    "lora_rank", "method", "seed", "lr", "batch_size", "save_every", "alpha", "target_modules", "schedule",
    "target_rank", "ranks", "lr_by_rank", "source", "columns", "eval_fraction", "type", "pattern", "advantage_mode",
    "log_dir", "report_to", "wandb_project", "name", "from", "adapter_path", "policy", "unknown",
)  # fmt: skip
RUN_SECTIONS = (
    "campaign", "campaign.conditions", "model", "lora", "training", "optimizer", "algorithm", "data", "reward",
    "in_squeeze", "logging", "resume", "squeeze", "unknown",
)  # fmt: skip
RUN_VALUES = TOML_VALUES | st.sampled_from(
    [
        '"sft"', '"grpo"', '"minimum=5"', '"64@0, 4@999%"', '"4@0, 64@5"', '"cont=0"', '"os.system"', '"a/b"', "[[]]",
        "[{ lr = 1 }, { lr = 1 }]", '[{ data = { source = "x" } }]', "{ 4 = 1e-3, x = 2 }", "[42, 42]", '["x"]',
        '"builtin:sums:5"', '"builtin:sums:-1"', '"../../x"',
    ]
)  # fmt: skip


@st.composite
def cases_of_trainings(draw: st.DrawFn) -> Case:
    """Runs and campaigns, of which nothing is carried out: `--explain`."""
    lines = []
    for section in draw(st.lists(st.sampled_from(RUN_SECTIONS), max_size=5, unique=True)):
        brackets = draw(st.sampled_from(["[{}]", "[{}]", "[{}]", "[[{}]]"]))
        keys = draw(st.dictionaries(st.sampled_from(RUN_KEYS), RUN_VALUES, max_size=3))
        lines += [brackets.format(section), *(f"{key} = {value}" for key, value in keys.items())]
    text = "\n".join(lines).encode()
    return {"run.toml": draw(st.just(text) | mutated(text) | RAW_JSON)}


@st.composite
def cases_of_moments(draw: st.DrawFn) -> Case:
    """Moments of a sound adapter, some of them tampered with."""
    numbers = st.sampled_from([1.0, 1.0, 0.0, -1.0, 1e300, float("nan"), float("inf")])
    sizes = st.sampled_from([2, 2, 2, 0, 1, 3, 300])
    names = [LAYER, LAYER.replace("0", "1", 1)]
    found: dict[str, torch.Tensor] = {}
    for name in draw(st.sampled_from([names, names, names[:1], [*names, "other"]])):
        for side in draw(st.sampled_from([("down",), ("down", "up"), ("up",)])):
            shape = draw(st.sampled_from([(2, 2), (2, 2), (draw(sizes), draw(sizes)), (2,)]))
            dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.float32, torch.int32]))
            found[f"{name}.{side}"] = (
                (torch.eye(2) if shape == (2, 2) else torch.ones(shape))
                .mul(draw(numbers))
                .nan_to_num_(draw(numbers))
                .to(dtype)
            )
    stated: dict[str, Any] = {
        "version": "0.1.0", "adapter_sha256": "", "base_model": "m", "tokens": draw(st.sampled_from([5, 0, -1])),
        "rows": dict.fromkeys(names, 5), "seen": [{"source": "x", "sha256": "0" * 64, "examples": 1}],
    }  # fmt: skip
    stated.update(draw(st.dictionaries(st.sampled_from(sorted(stated)), VALUES, max_size=2)))
    metadata = {"lora_squeeze_moments": draw(st.just(json.dumps(stated)) | RAW_JSON.map(_as_text))}
    return {**peft(), "moments.safetensors": draw(mutated(save(found, metadata=metadata)))}


def _as_text(raw: bytes) -> str:
    return raw[:20_000].decode(errors="replace")


@st.composite
def cases_of_pickles(draw: st.DrawFn) -> Case:
    found: dict[str, Any] = dict(tensors("peft"))
    for key in draw(st.lists(st.sampled_from(sorted(found)), max_size=1)):
        found[key] = draw(
            st.sampled_from(
                [
                    torch.zeros(1).expand(100_000, 1_000_000),
                    torch.zeros(2, 5).to_sparse(),
                    torch.zeros(2, 5, dtype=torch.complex128),
                    torch.zeros(2, 5, device="meta"),
                    "text",
                    Path("x"),
                    [torch.zeros(2, 5)],
                ]
            )
        )
    file = io.BytesIO()
    torch.save(found, file)
    weights = draw(mutated(file.getvalue()))
    return {"adapter/adapter_config.json": json.dumps(CONFIG).encode(), "adapter/adapter_model.bin": weights}


ARCHIVED = (
    "adapter_config.json", "sub/adapter_model.safetensors", "../out", "/tmp/lora-squeeze-fuzz", "a/../../b", "..", ".",
    "", "C:\\\\x", "a\\\\..\\\\b", "a\0b", "con", "x" * 300, "a/" * 200 + "b", "é", "\x1b[2J", "a", "a/b",
)  # fmt: skip


KINDS = (
    tarfile.REGTYPE, tarfile.REGTYPE, tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE,
    tarfile.CHRTYPE, tarfile.FIFOTYPE,
)  # fmt: skip


@st.composite
def cases_of_archives(draw: st.DrawFn) -> Case:
    names = st.lists(st.sampled_from(ARCHIVED), min_size=1, max_size=4)
    content = st.sampled_from([b"", b"{}", bytes(2 * LIMIT), bytes(LIMIT)])
    file = io.BytesIO()
    if draw(st.booleans()):
        with warnings.catch_warnings(), zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            warnings.simplefilter("ignore")  # a name that comes twice
            for name in draw(names):
                entry_ = zipfile.ZipInfo(name)
                entry_.external_attr = draw(st.sampled_from([0, 0o120777 << 16, 0o010644 << 16, 0o100644 << 16]))
                archive.writestr(entry_, draw(content))
    else:
        with tarfile.open(fileobj=file, mode=draw(st.sampled_from(["w", "w:gz"]))) as archive:
            for name in draw(names):
                member = tarfile.TarInfo(name)
                member.type = draw(st.sampled_from(KINDS))
                member.linkname = draw(st.sampled_from(ARCHIVED))
                data = draw(content)
                member.size = len(data) if member.isreg() else 0
                archive.addfile(member, io.BytesIO(data) if member.isreg() else None)
    return {"archive": draw(mutated(file.getvalue()))}


TARGETS = {
    "safetensors headers": cases_of_headers(),
    "adapter configurations": cases_of_configurations(),
    "metadata": cases_of_metadata(),
    "plans of ranks": cases_of_plans(),
    "settings": cases_of_settings(),
    "trainings": cases_of_trainings(),
    "moments": cases_of_moments(),
    "pickles": cases_of_pickles(),
    "archives": cases_of_archives(),
}
