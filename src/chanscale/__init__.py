"""Scale-and-select transfer learning: from a large pretrained CNN to a small, exact, explainable classifier.

Research software: no output of it is a diagnosis.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives. Torch takes a second to import: a name is loaded when it is first asked for.
_HOMES = {
    "BACKBONES": "backbones",
    "ChannelGroup": "channels",
    "ChannelScale": "scaling",
    "ChannelSelection": "selection",
    "ChanscaleError": "errors",
    "Classifier": "classifier",
    "FitConfig": "config",
    "Preprocessing": "backbones",
    "attach_scales": "attaching",
    "channel_groups": "proof",
    "cross_validate": "crossval.validation",
    "evaluate": "evaluation",
    "explain_run": "explain.explanation",
    "export_run": "export.forms",
    "find_leaks": "leaks.search",
    "fit": "training",
    "load_backbone": "backbones",
    "load_model": "artifact",
    "measure_latency": "export.race",
    "measure_stability": "explain.seeds",
    "merge_scales": "attaching",
    "open_images": "data.sources",
    "prune_channels": "pruning",
    "restore_model": "delta",
    "save_delta": "delta",
    "save_model": "artifact",
    "scale_and_select": "pipeline",
    "select_channels": "selection",
    "soft_threshold": "scaling",
    "tune": "tuning.search",
    "verify_model": "provenance",
    "write_phantoms": "data.phantoms",
}

__all__ = [
    "BACKBONES",
    "ChannelGroup",
    "ChannelScale",
    "ChannelSelection",
    "ChanscaleError",
    "Classifier",
    "FitConfig",
    "Preprocessing",
    "attach_scales",
    "channel_groups",
    "cross_validate",
    "evaluate",
    "explain_run",
    "export_run",
    "find_leaks",
    "fit",
    "load_backbone",
    "load_model",
    "measure_latency",
    "measure_stability",
    "merge_scales",
    "open_images",
    "prune_channels",
    "restore_model",
    "save_delta",
    "save_model",
    "scale_and_select",
    "select_channels",
    "soft_threshold",
    "tune",
    "verify_model",
    "write_phantoms",
]

if TYPE_CHECKING:
    from chanscale.artifact import load_model, save_model
    from chanscale.attaching import attach_scales, merge_scales
    from chanscale.backbones import BACKBONES, Preprocessing, load_backbone
    from chanscale.channels import ChannelGroup
    from chanscale.classifier import Classifier
    from chanscale.config import FitConfig
    from chanscale.crossval.validation import cross_validate
    from chanscale.data.phantoms import write_phantoms
    from chanscale.data.sources import open_images
    from chanscale.delta import restore_model, save_delta
    from chanscale.errors import ChanscaleError
    from chanscale.evaluation import evaluate
    from chanscale.explain.explanation import explain_run
    from chanscale.explain.seeds import measure_stability
    from chanscale.export.forms import export_run
    from chanscale.export.race import measure_latency
    from chanscale.leaks.search import find_leaks
    from chanscale.pipeline import scale_and_select
    from chanscale.proof import channel_groups
    from chanscale.provenance import verify_model
    from chanscale.pruning import prune_channels
    from chanscale.scaling import ChannelScale, soft_threshold
    from chanscale.selection import ChannelSelection, select_channels
    from chanscale.training import fit
    from chanscale.tuning.search import tune


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'chanscale' has no attribute {name!r}")
    return getattr(import_module(f"chanscale.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
