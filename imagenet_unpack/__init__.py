"""Unpack the ImageNet-1K archives into class folders: concurrently, checked, and published only when whole.

The functions below do what the commands of the same names do, with the command-line options as keyword arguments.
They print nothing, return result objects and raise the exceptions of `imagenet_unpack.errors`.

>>> import imagenet_unpack
>>> result = imagenet_unpack.unpack(base_dir="/data", target_dir="/scratch/ImageNet", layout="wnid")  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # typing is slow to import and nothing here needs it at run time
if TYPE_CHECKING:
    from imagenet_unpack.api import CheckResult, PlanResult, check, plan, unpack
    from imagenet_unpack.errors import UnpackError
    from imagenet_unpack.model import RunSummary
    from imagenet_unpack.progressbar import ProgressBar
    from imagenet_unpack.reporter import Reporter
    from imagenet_unpack.training import ImageNet, Samples, samples

__version__ = "0.1.0"

__all__ = [
    "CheckResult",
    "ImageNet",
    "PlanResult",
    "ProgressBar",
    "Reporter",
    "RunSummary",
    "Samples",
    "UnpackError",
    "check",
    "plan",
    "samples",
    "unpack",
]

# Imported when first asked for: `import imagenet_unpack` and `--help` stay cheap.
_EXPORTS = {
    "CheckResult": "imagenet_unpack.api",
    "ImageNet": "imagenet_unpack.training",
    "PlanResult": "imagenet_unpack.api",
    "ProgressBar": "imagenet_unpack.progressbar",
    "Reporter": "imagenet_unpack.reporter",
    "RunSummary": "imagenet_unpack.model",
    "Samples": "imagenet_unpack.training",
    "UnpackError": "imagenet_unpack.errors",
    "check": "imagenet_unpack.api",
    "plan": "imagenet_unpack.api",
    "samples": "imagenet_unpack.training",
    "unpack": "imagenet_unpack.api",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Name what there is, imported or not."""
    return sorted({*globals(), *__all__})
