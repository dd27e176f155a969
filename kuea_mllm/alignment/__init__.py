"""The shared alignment trainer: a transformers.Trainer that matches kernel matrices."""
