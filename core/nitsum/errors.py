"""Errors that a caller can mend. Broken invariants are AssertionErrors and crash.

NitsumError
├── InvalidSpec       a field of a resource, workload, profile: path, what is wrong, legal values
└── UnsupportedModel  a checkpoint that cannot be served, and why
"""


class NitsumError(Exception):
    """Base of every error that nitsum raises on purpose."""


class InvalidSpec(NitsumError):
    """Bad input. `path` is the field as the user wrote it, e.g. `spec.tiers[1].ttft`; `reason` a CamelCase condition reason."""

    def __init__(self, path: str, message: str, reason: str = "InvalidSpec") -> None:
        super().__init__(f"{path}: {message}")
        self.path = path
        self.message = message
        self.reason = reason


class UnsupportedModel(NitsumError):
    """A model's config asks for what the engine host cannot share or serve."""
