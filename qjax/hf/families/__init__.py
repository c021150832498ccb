"""How Hugging Face's model families map to `qjax.models`: config.json and the names of tensors."""

from collections.abc import Callable, Mapping

from qjax.hf.families import bert, gemma, gpt, llama, moe, opt_bloom, t5
from qjax.hf.families.base import Data
from qjax.hf.families.base import Family as Family
from qjax.hf.families.base import Names as Names

FAMILIES: Mapping[str, Family | Callable[[Data], Family]] = {
    "bert": bert.BERT,
    "bloom": opt_bloom.BLOOM,
    "gemma2": gemma.GEMMA2,
    "gemma3_text": gemma.GEMMA3,
    "gpt2": gpt.GPT2,
    "gpt_neo": gpt.GPT_NEO,
    "gpt_neox": gpt.GPT_NEOX,
    "gpt_oss": moe.GPT_OSS,
    "llama": llama.LLAMA,
    "mistral": llama.MISTRAL,
    "mixtral": moe.MIXTRAL,
    "opt": opt_bloom.OPT,
    "phi3": llama.PHI3,
    "qwen2": llama.QWEN2,
    "qwen3": llama.QWEN3,
    "t5": t5.t5,
}


def family(data: Data) -> Family:
    """Return the family of a config.json; an unknown `model_type` names the known ones."""
    model_type = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"model_type={model_type!r} in config.json is not known; known: {sorted(FAMILIES)}"
        )
    known = FAMILIES[model_type]
    return known if isinstance(known, Family) else known(data)
