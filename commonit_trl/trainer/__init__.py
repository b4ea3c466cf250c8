"""CommonIT in `transformers.Trainer` and in TRL's `SFTTrainer`."""
