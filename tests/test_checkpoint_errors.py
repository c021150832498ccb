"""Checkpoints that do not fit, are damaged or tampered with; trees that cannot be saved."""

import dataclasses
import json
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import qjax

MARKER = "_CHECKPOINT_METADATA"
# Orbax leaves coroutines behind when a read fails; Python reports each when it is collected.
quiet = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def quantized(**fields) -> qjax.QTensor:
    w = jax.random.normal(jax.random.key(0), (128, 8))
    return qjax.quantize(w, qjax.QuantConfig(**fields))


@pytest.fixture(scope="module")
def params():
    a = jax.random.normal(jax.random.key(1), (128, 32))
    return {"dense": {"kernel": quantized(), "lora_a": a, "lora_b": jnp.zeros((32, 8))}}


@pytest.fixture(scope="module")
def saved(params, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "x"
    qjax.save(path, params)
    return path


@pytest.fixture
def copy(saved, tmp_path):
    """A checkpoint that a test may spoil."""
    return shutil.copytree(saved, tmp_path / "x")


def changed(params, **dense):
    return {"dense": {**params["dense"], **dense}}


# --- not of the model that it is loaded into


@pytest.mark.parametrize(
    "dense, message",
    [
        (
            {"lora_a": jnp.zeros((128, 3))},
            r"dense/lora_a: expected float32\[128, 3\], found float32\[128, 32\]",
        ),
        (
            {"lora_a": jnp.zeros((128, 32), jnp.bfloat16)},
            r"lora_a: expected bfloat16\[128, 32\], found float32",
        ),
        ({"lora_a": np.zeros((128, 32))}, r"dense/lora_a: expected float64.*found float32"),
        ({"lora_a": 1.0}, r"dense/lora_a: expected float64\[\], found float32"),
        ({"lora_a": jax.random.key(0)}, r"dense/lora_a: expected key<fry>, found float32"),
        ({"bias": jnp.zeros(8)}, r"1 in `like` and not in the checkpoint: dense/bias"),
        ({"kernel": quantized(block_size=32)}, r"dense/kernel: expected block_size=32, found 64"),
        ({"kernel": quantized(format="fp4")}, r"dense/kernel: expected format=fp4, found nf4"),
        (
            {"kernel": quantized(double_quant=False)},
            r"not in the checkpoint: dense/kernel/scales; 3 in the checkpoint",
        ),
        (
            {"kernel": qjax.quantize(jnp.ones((8, 128)), contract_axes=(1,))},
            r"dense/kernel: expected slice_shape=\(8, 128\), found \(128, 8\)",
        ),
        (
            {"kernel": qjax.quantize(jnp.ones((128, 8), jnp.bfloat16))},
            r"dense/kernel: expected dtype=bfloat16, found float32",
        ),
        ({"kernel": jnp.ones((128, 8))}, r"in the checkpoint: dense/kernel; 4 in the checkpoint"),
    ],
)
def test_another_model_is_refused(params, saved, dense, message):
    like = changed(params, **dense)
    before = jax.tree.map(np.asarray, jax.tree.leaves({**like["dense"], "lora_a": None}))
    with pytest.raises(ValueError, match=message) as error:
        qjax.load(saved, like)
    assert str(saved) in str(error.value)
    after = jax.tree.map(np.asarray, jax.tree.leaves({**like["dense"], "lora_a": None}))
    assert all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))


def test_a_leaf_too_many_is_refused(params, saved):
    like = {"dense": {"kernel": params["dense"]["kernel"]}}
    with pytest.raises(ValueError, match=r"2 in the checkpoint and not in `like`: dense/lora_a"):
        qjax.load(saved, like)


def test_the_arrays_of_a_qtensor_do_not_fit_a_plain_dict(params, saved):
    q = params["dense"]["kernel"]
    scales = {name: getattr(q.scales, name) for name in ("codes", "absmax", "offset")}
    like = changed(params, kernel={"packed": q.packed, "scales": scales})
    with pytest.raises(ValueError, match=r"1 a QTensor in the checkpoint and not one in `like`"):
        qjax.load(saved, like)


def test_what_is_no_array_in_like(params, saved):
    with pytest.raises(TypeError, match=r"dense/lora_a of `like` must be an array.* got str"):
        qjax.load(saved, changed(params, lora_a="a"))


def test_adapters_need_a_model_with_adapters_and_a_base(params, tmp_path):
    qjax.save(tmp_path / "x", params, only="adapters")
    with pytest.raises(ValueError, match=r"`like` has none: add them first, with qjax.add_lora"):
        qjax.load(tmp_path / "x", like={"dense": {"kernel": params["dense"]["kernel"]}})
    with pytest.raises(
        ValueError, match=r"must hold the rest, and dense/kernel/packed is abstract"
    ):
        qjax.load(tmp_path / "x", like=jax.eval_shape(lambda: params))


# --- not a checkpoint of save


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing"):
        qjax.load(tmp_path / "nothing")


@quiet
def test_something_else_there(tmp_path):
    ocp.save(tmp_path / "plain", {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"plain has no qjax metadata: it was not written by qjax"):
        qjax.load(tmp_path / "plain")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    for name in ("folder", "file"):
        with pytest.raises(ValueError, match=f"{name} is not a complete Orbax checkpoint"):
            qjax.load(tmp_path / name)


def edit(path, change, checksum: bool = True) -> None:
    """Rewrite the JSON of a checkpoint, as someone would who knows of its checksum."""
    obj = json.loads((path / MARKER).read_text())
    header = obj["custom_metadata"]["qjax"]
    header.pop("crc32")
    old = zlib.crc32(json.dumps(header, sort_keys=True).encode())
    change(header)
    new = zlib.crc32(json.dumps(header, sort_keys=True).encode())
    header.setdefault("crc32", new if checksum else old)
    (path / MARKER).write_text(json.dumps(obj))


def test_a_newer_format_is_refused(copy):
    edit(copy, lambda q: q.update(format_version=2, something_new=True))
    with pytest.raises(
        ValueError, match=r"x: format version 2 is newer than this qjax reads \(1\): upgrade qjax"
    ):
        qjax.load(copy)


def test_a_changed_number_in_the_metadata(copy):
    edit(copy, lambda q: q["scalings"].update({"dense": 3.0}), checksum=False)
    with pytest.raises(ValueError, match="the qjax metadata are damaged: their CRC-32 is not"):
        qjax.load(copy)


LEAF, Q = "dense/lora_a", "dense/kernel"
TAMPERED = {
    "qjax.format_version must be positive": lambda q: q.update(format_version=0),
    "qjax.format_version has the wrong type: '1'": lambda q: q.update(format_version="1"),
    "qjax.format_version has the wrong type: True": lambda q: q.update(format_version=True),
    "qjax.format_version is missing": lambda q: q.pop("format_version"),
    "qjax.crc32 has the wrong type": lambda q: q.update(crc32="0"),
    "qjax has unknown fields ..code": lambda q: q.update(code="import os"),
    "qjax.kind must be one of": lambda q: q.update(kind="torch"),
    "qjax.only must be one of": lambda q: q.update(only="base"),
    "qjax.leaves has the wrong type": lambda q: q.update(leaves=[]),
    "qjax.leaves is missing": lambda q: q.pop("leaves"),
    "must be an object, got 3": lambda q: q["leaves"].update({LEAF: 3}),
    "in the stored arrays and not in the metadata: dense/lora_a": lambda q: q["leaves"].pop(LEAF),
    "in the metadata and not in the stored arrays: more": lambda q: q["leaves"].update(
        more=q["leaves"][LEAF]
    ),
    "'../../x': a key of a tree must be a plain name, got '..'": lambda q: q["leaves"].update(
        {"../../x": q["leaves"][LEAF]}
    ),
    r"lora_a'].shape must hold integers": lambda q: q["leaves"][LEAF].update(shape=[128, -2]),
    r"lora_a'\].shape must hold integers ": lambda q: q["leaves"][LEAF].update(shape=[128, 2.0]),
    r"lora_a'\].dtype is no dtype of an array: 'object'": lambda q: q["leaves"][LEAF].update(
        dtype="object"
    ),
    r"lora_a'\].dtype is no dtype of an array: 'f4,f4'": lambda q: q["leaves"][LEAF].update(
        dtype="f4,f4"
    ),
    r"lora_a'\].crc32 must be in": lambda q: q["leaves"][LEAF].update(crc32=2**32),
    r"lora_a'\].prng='fry' does not fit float32": lambda q: q["leaves"][LEAF].update(prng="fry"),
    r"lora_a'\] has unknown fields": lambda q: q["leaves"][LEAF].update(pickle="gASV"),
    r"dense/lora_a: expected float32\[32, 128\] by the metadata, found float32\[128, 32\]": (
        lambda q: q["leaves"][LEAF].update(shape=[32, 128])
    ),
    r"dense/lora_a: expected int32\[128, 32\] by the metadata, found float32": (
        lambda q: q["leaves"][LEAF].update(dtype="int32")
    ),
    "dense/lora_a was saved as .* with checksum 1, found": lambda q: q["leaves"][LEAF].update(
        crc32=1
    ),
    r"kernel'\].format must be one of": lambda q: q["qtensors"][Q].update(format="nf5"),
    r"kernel'\].block_size must be one of": lambda q: q["qtensors"][Q].update(block_size=48),
    r"kernel'\].layout must be one of": lambda q: q["qtensors"][Q].update(layout="columns"),
    r"kernel'\].contract_axes must be ascending axes": lambda q: q["qtensors"][Q].update(
        contract_axes=[2]
    ),
    r"kernel'\].contract_axes must be ascending": lambda q: q["qtensors"][Q].update(
        contract_axes=[]
    ),
    r"kernel'\].slice_shape must not be empty": lambda q: q["qtensors"][Q].update(
        slice_shape=[0, 8]
    ),
    r"kernel'\].dtype must be floating": lambda q: q["qtensors"][Q].update(dtype="int32"),
    r"kernel'\].dtype is missing": lambda q: q["qtensors"][Q].pop("dtype"),
    "dense/kernel: layout='flat' does not fit K=128": lambda q: q["qtensors"][Q].update(
        layout="flat"
    ),
    "dense/kernel: packed must be uint8": lambda q: q["qtensors"][Q].update(slice_shape=[128, 16]),
    r"dense/kernel: scales.codes must be uint8\[8, 4\]": lambda q: q["qtensors"][Q].update(
        block_size=32
    ),
    r"dense: a QTensor is packed and scales, or": lambda q: q["qtensors"].update(
        dense=q["qtensors"].pop(Q)
    ),
}


@pytest.mark.parametrize("message", TAMPERED)
def test_tampered_metadata(copy, params, message):
    edit(copy, TAMPERED[message])
    for like in (None, params):
        with pytest.raises(ValueError, match=message) as error:
            qjax.load(copy, like)
        assert str(copy) in str(error.value)


def test_arrays_that_are_not_those_of_the_metadata(saved, params, tmp_path):
    """Orbax by itself casts: the metadata of one checkpoint, the arrays of another."""
    metadata = ocp.metadata(saved).custom_metadata
    arrays = jax.tree.map(np.asarray, ocp.load(saved))
    for name, change, message in (
        ("cast", lambda a: a.astype(np.float64), r"lora_a: .*float32.* found float64"),
        ("other", lambda a: a + 1, r"lora_a was saved as .*checksum"),
        ("nested", lambda a: {"x": a}, r"in the stored arrays and not .* dense/lora_a/x"),
    ):
        dense = {**arrays["dense"], "lora_a": change(arrays["dense"]["lora_a"])}
        ocp.save(tmp_path / name, {"dense": dense}, custom_metadata=metadata)
        with pytest.raises(ValueError, match=message):
            qjax.load(tmp_path / name, params)


def spoil(path, how: str) -> None:
    size = path.stat().st_size
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        with path.open("r+b") as file:
            file.truncate(size // 2)
    elif how == "flip":
        with path.open("r+b") as file:
            file.seek(size // 2)
            byte = file.read(1)[0]
            file.seek(size // 2)
            file.write(bytes([byte ^ 1]))
    else:
        path.write_bytes(b"\0" * size)


@quiet
@pytest.mark.parametrize("how", ["delete", "truncate", "flip", "zeros"])
def test_damaged_files(saved, params, tmp_path, how):
    """Whichever file is damaged, the bits that were saved come back or ValueError does."""
    expected = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]
    files = [path for path in saved.rglob("*") if path.is_file() and path.stat().st_size]
    refused = set()
    for i, file in enumerate(files):
        path = shutil.copytree(saved, tmp_path / str(i))
        spoil(path / file.relative_to(saved), how)
        try:
            loaded = qjax.load(path, params)
        except ValueError:
            refused.add(file.name)
        else:
            assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(loaded)] == expected
    # A flipped bit of the JSON may be in a field that nobody reads; of the data there is one copy.
    assert how == "flip" or {MARKER, "_METADATA"} <= refused
    assert max(files, key=lambda path: path.stat().st_size).name in refused


# --- what cannot be saved


@pytest.mark.parametrize(
    "x, error, message",
    [
        ({}, ValueError, "x has no leaves"),
        ({"a": None}, ValueError, "x has no leaves"),
        (jnp.ones(2), ValueError, "not a single array"),
        ({"a": {"b": jnp.zeros((0, 3))}}, ValueError, r"a/b is empty, \(0, 3\): Orbax cannot"),
        ({"a": {"b": "text"}}, TypeError, "a/b must be an array or a number, got str"),
        (
            {"a": jax.ShapeDtypeStruct((2,), jnp.float32)},
            TypeError,
            r"a must be an array.*ShapeDtypeStruct",
        ),
        ({"a/b": jnp.ones(2)}, ValueError, "a key of a tree must be a plain name, got 'a/b'"),
        ({"..": {"x": jnp.ones(2)}}, ValueError, "must be a plain name, got '..'"),
        ({"": jnp.ones(2)}, ValueError, "must be a plain name, got ''"),
        ({"a.b": jnp.ones(2), "a": {"b": jnp.zeros(2)}}, ValueError, "'a.b' from 'a/b': it joins"),
        ({"a": {0: jnp.ones(2), "0": jnp.ones(2)}}, (TypeError, ValueError), "'a/0'|keys"),
        (
            {"q": dataclasses.replace(quantized(), packed=jnp.ones(2))},
            ValueError,
            "q: packed must be uint8",
        ),
    ],
)
@pytest.mark.parametrize("save", [qjax.save, qjax.save_async])
def test_trees_that_cannot_be_saved(x, error, message, save, tmp_path):
    with pytest.raises(error, match=message):
        save(tmp_path / "x", x)
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_of_save(params, tmp_path):
    with pytest.raises(ValueError, match="only must be None or 'adapters', got 'base'"):
        qjax.save(tmp_path / "x", params, only="base")
    with pytest.raises(ValueError, match="x has no adapters, so none can be saved"):
        qjax.save(tmp_path / "x", {"w": jnp.ones(2)}, only="adapters")
    with pytest.raises(TypeError, match="w is traced: save cannot run under jit"):
        jax.jit(lambda w: qjax.save(tmp_path / "x", {"w": w}))(jnp.ones(2))
    assert list(tmp_path.iterdir()) == []
