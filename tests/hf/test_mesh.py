"""Loading straight onto a mesh of 8 devices: the logits are those of one."""

import jax
import numpy as np
import pytest
from flax import nnx

import qjax.hf
from qjax.core.config import QuantConfig
from qjax.hf.safetensors import SafetensorsFolder
from qjax.hf.sharding import Placement
from qjax.hf.skeleton import skeleton
from qjax.nn.nnx_param import QuantParam
from tests.models.golden import FOLDER, TOLERANCE, error, reference, write_bnb

forward = nnx.jit(lambda model, ids, mask: model(ids, mask))


def mesh(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes))


def specs(model) -> dict[str, tuple]:
    """Return the spec of each array on more than one shard."""
    leaves = jax.tree_util.tree_flatten_with_path(nnx.state(model))[0]
    found = {jax.tree_util.keystr(p): tuple(leaf.sharding.spec) for p, leaf in leaves}
    return {path: spec for path, spec in found.items() if any(spec)}


@pytest.mark.parametrize(
    "family, axes, scan_layers",
    [
        ("llama", {"fsdp": 2, "tensor": 4}, False),
        pytest.param("llama", {"data": 4, "tp": 2}, True, marks=pytest.mark.slow),
        pytest.param("gpt2", {"data": 2, "tensor": 4}, False, marks=pytest.mark.slow),
        pytest.param("mixtral", {"expert": 2, "tensor": 2, "dp": 2}, False, marks=pytest.mark.slow),
        pytest.param("gemma3", {"fsdp": 8}, False, marks=pytest.mark.slow),
    ],
)
def test_a_float_model_gives_transformers_logits_and_tokens(family, axes, scan_layers):
    model = qjax.hf.from_pretrained(
        FOLDER / family / "hf", mesh=mesh(**axes), scan_layers=scan_layers
    )
    assert len(specs(model)) > 4
    ref = reference(family)
    logits = forward(model, ref["input_ids_left"], ref["attention_mask_left"])
    assert error(logits, ref["logits_left"])[ref["attention_mask_left"] == 1].max() < TOLERANCE
    out = model.generate(ref["input_ids_left"], ref["attention_mask_left"], max_new_tokens=12)
    np.testing.assert_array_equal(out, ref["greedy_left"])


@pytest.mark.parametrize("family", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_a_bitsandbytes_checkpoint_gives_its_own_logits_and_tokens(family, tmp_path):
    model = qjax.hf.from_pretrained(write_bnb(family, tmp_path), mesh=mesh(expert=4, tensor=2))
    ref = reference(family)
    whole = np.ones_like(ref["input_ids"])
    logits = forward(model, ref["input_ids"], whole)
    assert error(logits, ref["logits_nf4"]).max() < TOLERANCE
    q = model.layers[1].self_attn.q_proj.kernel.q
    assert q.packed.sharding.shard_shape(q.packed.shape) == (32, 32)  # of [64, 32]
    assert q.scales.codes.sharding.shard_shape(q.scales.codes.shape) == (32, 1)
    assert q.scales.absmax.sharding.is_fully_replicated
    out = model.generate(ref["input_ids"], max_new_tokens=12)
    np.testing.assert_array_equal(out, ref["greedy_nf4"])


def test_quantizing_on_the_way_gives_the_bytes_of_one_device():
    config = QuantConfig(block_size=32, compute_dtype="float32")
    folder = FOLDER / "llama" / "hf"
    one = qjax.hf.from_pretrained(folder, config=config)
    split = qjax.hf.from_pretrained(folder, config=config, mesh=mesh(fsdp=2, tensor=4))
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (one, split)), strict=True):
        np.testing.assert_array_equal(a, b)
    q = split.layers[0].mlp.up_proj.kernel.q  # a shard of one block of 32, of 16 columns
    assert q.packed.sharding.shard_shape(q.packed.shape) == (16, 16)
    ids, whole = reference("llama")["input_ids"], np.ones((2, 24), np.int32)
    assert error(forward(split, ids, whole), np.asarray(one(ids))).max() < TOLERANCE


@pytest.mark.parametrize("format", ["int4_asym", "nvfp4", "int8"])
def test_other_formats_are_split_too(format):
    config = QuantConfig(format=format)
    folder = FOLDER / "llama" / "hf"
    one = qjax.hf.from_pretrained(folder, config=config)
    split = qjax.hf.from_pretrained(folder, config=config, mesh=mesh(fsdp=4, tensor=2))
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (one, split)), strict=True):
        np.testing.assert_array_equal(a, b)
    packed = split.layers[0].mlp.up_proj.kernel.q.packed
    assert packed.sharding.shard_shape(packed.shape)[0] == 32  # of 64 outputs


def test_no_shard_splits_a_block_and_experts_have_their_axis():
    source = SafetensorsFolder(FOLDER / "mixtral" / "hf")
    model, plan = skeleton(source, QuantConfig(include="proj"))
    placement = Placement(mesh(expert=2, tensor=2, fsdp=2), heads=2)
    shards = {item.path: placement(item.path, item.variable.get_raw_value()) for item in plan}
    experts = source.config.experts.count
    up = shards["layers/0/mlp/experts/up_proj/kernel"].packed.spec
    assert tuple(up) == ("expert" if experts % 2 == 0 else None, "tensor", None)
    # K = 64 in blocks of 64: halves would split them, so only the outputs are sharded.
    assert tuple(shards["layers/0/self_attn/o_proj/kernel"].packed.spec) == ("fsdp", None)
    assert shards["layers/0/input_layernorm/scale"].is_fully_replicated
    assert isinstance(model.layers[0].self_attn.o_proj.kernel, QuantParam)


def test_an_axis_of_another_name_is_refused():
    with pytest.raises(ValueError, match=r"mesh has axes \['x'\]; .* named \['tensor', 'tp'"):
        qjax.hf.from_pretrained(FOLDER / "llama" / "hf", mesh=mesh(x=8))
