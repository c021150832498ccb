"""Every model family of tunix in 4 bits: logits, training, saving, bytes.

Not part of `make test`: tunix brings many packages. In an environment of its own:

    python3.12 -m venv /tmp/tunix && . /tmp/tunix/bin/activate
    pip install . 'google-tunix==0.1.7'
    PYTHONPATH=. python -W ignore tests/external/tunix_models.py [family ...]
"""

import sys
import tempfile

import jax
import jax.numpy as jnp
from flax import nnx

import qjax
import qjax.nnx
from tests.external.common import CFG, check_nnx

B, T, V = 2, 8, 256
IDS = jnp.arange(B * T).reshape(B, T) % V
CALL = {
    "positions": jnp.tile(jnp.arange(T)[None], (B, 1)),
    "cache": None,
    "attention_mask": jnp.tril(jnp.ones((T, T), bool))[None].repeat(B, 0),
}
SIZES = {"num_layers": 2, "embed_dim": 64, "hidden_dim": 128, "num_heads": 4, "head_dim": 32}
ROPE = {"rope_theta": 10000, "norm_eps": 1e-5, "vocab_size": V}


def llama3():
    from tunix.models.llama3 import model as m

    return m.Llama3(m.ModelConfig(**SIZES, **ROPE, num_kv_heads=2), rngs=nnx.Rngs(0))


def qwen2():
    from tunix.models.qwen2 import model as m

    return m.Qwen2(m.ModelConfig(**SIZES, **ROPE, num_kv_heads=2), rngs=nnx.Rngs(0))


def qwen3(**more):
    from tunix.models.qwen3 import model as m

    config = m.ModelConfig(
        **SIZES, **ROPE, num_kv_heads=2, remat_config=m.RematConfig.BLOCK, **more
    )
    return m.Qwen3(config, rngs=nnx.Rngs(0))


def qwen3_moe():
    return qwen3(num_experts=4, num_experts_per_tok=2)


def gemma():
    from tunix.models.gemma import model as m

    config = m.ModelConfig(
        **SIZES,
        num_embed=V,
        num_kv_heads=1,
        final_logit_softcap=30.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=[m.AttentionType.GLOBAL] * 2,
    )
    return m.Gemma(config, rngs=nnx.Rngs(0))


def gemma_qkv():
    from tunix.models.gemma import model as m

    config = m.ModelConfig(
        **SIZES,
        num_embed=V,
        num_kv_heads=4,
        final_logit_softcap=None,
        use_post_attn_norm=False,
        use_post_ffw_norm=False,
        attention_types=[m.AttentionType.GLOBAL] * 2,
        remat_config=m.RematConfig.BLOCK,
    )
    return m.Gemma(config, rngs=nnx.Rngs(0))


def gemma3():
    from tunix.models.gemma3 import model as m

    config = m.ModelConfig(
        **SIZES, num_embed=V, num_kv_heads=1, sliding_window_size=4, param_dtype=jnp.float32
    )
    return m.Gemma3(config, rngs=nnx.Rngs(0))


def gemma4(**more):
    from tunix.models.gemma4 import model as m

    config = m.ModelConfig(
        **SIZES, num_embed=V, num_kv_heads=1, sliding_window_size=4, global_key_size=32, **more
    )
    return m.Gemma4(config, rngs=nnx.Rngs(0))


def gemma4_per_layer():
    return gemma4(per_layer_input_dim=32)


def gemma4_moe():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "expert_dim": 64}
    return gemma4(enable_moe=True, moe_dense_hidden_dim=64, **experts)


FAMILIES = (llama3, qwen2, qwen3, qwen3_moe, gemma, gemma_qkv, gemma3, gemma4, gemma4_per_layer)
FAMILIES += (gemma4_moe,)


def randomized(model):
    """Give every zero-initialized weight values."""
    for i, (_, variable) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.Param))):
        w = variable.get_raw_value()
        if w.ndim > 1:
            w = 0.05 * jax.random.normal(jax.random.key(i), w.shape, w.dtype)
            variable.set_value(w)
    return model


def peft_trainer():
    """tunix's own trainer, unchanged: it trains adapters, saves them, and goes on from there."""
    import numpy as np
    import optax
    from tunix.sft import peft_trainer as sft

    def trainer(folder, steps):
        model = qjax.quantize_model(randomized(llama3()), CFG)
        model = qjax.add_lora(model, qjax.LoraConfig(rank=4, alpha=8), rngs=nnx.Rngs(1))
        config = sft.TrainingConfig(
            eval_every_n_steps=100, max_steps=steps, checkpoint_root_directory=folder
        )
        trainer = sft.PeftTrainer(model, optax.adamw(1e-2), config)
        return trainer.with_gen_model_input_fn(
            lambda batch: {
                "input_tokens": batch.input_tokens,
                "input_mask": batch.input_mask,
                "positions": CALL["positions"],
                "attention_mask": CALL["attention_mask"],
            }
        )

    batch = sft.TrainingInput(input_tokens=IDS, input_mask=jnp.ones_like(IDS))
    loss = lambda m: sft._default_loss_fn(  # noqa: E731
        m, IDS, jnp.ones_like(IDS), CALL["positions"], CALL["attention_mask"]
    )
    with tempfile.TemporaryDirectory() as folder:
        first = trainer(folder, 20)
        before, packed = float(loss(first.model)), nnx.state(first.model, qjax.nnx.QuantParam)
        first.train([batch] * 20)
        after = float(loss(first.model))
        assert after < 0.6 * before, (before, after)
        jax.tree.map(
            np.testing.assert_array_equal, packed, nnx.state(first.model, qjax.nnx.QuantParam)
        )
        second = trainer(folder, 25)  # restores in its constructor
        assert second.train_steps == 20, second.train_steps
        np.testing.assert_allclose(float(loss(second.model)), after, rtol=1e-6)
        second.train([batch] * 25)
        assert float(loss(second.model)) < after
    print(f"== PeftTrainer: loss {before:.4f} -> {after:.4f} -> {float(loss(second.model)):.4f}")


def main(names):
    if not names or "peft_trainer" in names:
        peft_trainer()
    for family in FAMILIES:
        if names and family.__name__ not in names:
            continue
        call = dict(CALL)
        if family.__name__.startswith("gemma4"):
            call.pop("positions")
        check_nnx(family.__name__, randomized(family()), lambda m, call=call: m(IDS, **call)[0])


if __name__ == "__main__":
    main(sys.argv[1:])
