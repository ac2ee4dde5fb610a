"""Names that people and node labels give to GPU types and models, and the ones that profiles use."""

_GPUS: dict[str, tuple[str, ...]] = {
    "a100_sxm": ("a100", "nvidia-a100-sxm4-80gb"),
    "b200_sxm": ("b200", "nvidia-b200"),
    "h100_pcie": ("nvidia-h100-pcie",),
    "h100_sxm": ("h100", "h100-sxm", "h100-sxm5", "nvidia-h100-80gb-hbm3"),
    "h200_sxm": ("h200", "h200-sxm", "nvidia-h200"),
    "l40s": ("nvidia-l40s",),
}
_BY_ALIAS = {alias: name for name, aliases in _GPUS.items() for alias in (name, name.replace("_", "-"), *aliases)}


def gpu_type(name: str) -> str:
    """The name in profiles of what a label such as `NVIDIA-H100-80GB-HBM3` says; any other name as it is."""
    return _BY_ALIAS.get("-".join(name.casefold().split()), name)


def model_key(name: str) -> str:
    """Equal for names that mean the same checkpoint: letter case and a trailing slash do not matter."""
    return name.rstrip("/").casefold()


def model_base(name: str) -> str:
    """The last part of a repository name or a folder."""
    return model_key(name).rsplit("/", 1)[-1]
