"""How good a checkpoint is, on a text: what `qjax eval` and `qjax compare` do."""
