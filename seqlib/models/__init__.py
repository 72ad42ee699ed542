"""Models: one config, one block, one backbone, one generation loop, whatever the mixer."""

from seqlib.models.backbone import Backbone, param_groups
from seqlib.models.config import BackboneConfig
from seqlib.models.heads import LanguageModel, lm_loss

__all__ = ["Backbone", "BackboneConfig", "LanguageModel", "lm_loss", "param_groups"]
