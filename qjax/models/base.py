"""What all language models share: they can be saved."""

from typing import Any

from flax import nnx


class Pretrained(nnx.Module):
    """A model that knows the config.json it was loaded with.

    Attributes:
        config: what it looks like.
        dtype: of the computation.
        config_json: that file's text; None for a model built from a config.
    """

    config: Any
    dtype: Any
    config_json: str | None = None

    def foldings(self) -> dict[str, tuple[str, ...]]:
        """Return which outputs can be scaled, entry by entry, by dividing the weights after them.

        Returns:
            The path of a norm or dense layer -> the paths of the kernels that read its output,
            which nothing else reads: what `qjax.calibrate(method="awq")` scales.
        """
        found = {}
        for path, module in nnx.iter_modules(self):
            own = getattr(module, "foldings", dict) if module is not self else dict
            for producer, kernels in own().items():
                names = [(*map(str, path), name) for name in (producer, *kernels)]
                producer, *kernels = map("/".join, names)
                found[producer] = tuple(kernels)
        return found

    def save_pretrained(self, path, layout: str = "bitsandbytes", **options) -> None:
        """Write a folder that Hugging Face's transformers loads: see `qjax.hf.save_pretrained`."""
        from qjax.hf.export import save_pretrained
        from qjax.models.fuse import refuse_fused

        refuse_fused(self, "save_pretrained")
        save_pretrained(self, path, layout, **options)
