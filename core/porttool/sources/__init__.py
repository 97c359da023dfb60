"""Readers of foreign containers: bounded memory, no code of strangers, every size checked."""
