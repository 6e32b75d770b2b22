"""What a model sees, measured and drawn: one module a question."""
