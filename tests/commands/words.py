"""A tokenizer for the golden models: token n is the word "tn"."""

import tokenizers


def word_tokenizer(prefix: str = "t") -> tokenizers.Tokenizer:
    vocab = {f"{prefix}{i}": i for i in range(128)}
    model = tokenizers.models.WordLevel(vocab, unk_token=f"{prefix}0")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return tokenizer


def words(ids) -> str:
    return " ".join(f"t{i}" for i in ids)
