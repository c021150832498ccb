"""Fine-tuning from a file of texts or chats: what `qjax finetune` runs."""
