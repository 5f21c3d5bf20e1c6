"""LoRAs of any trainer: files -> deltas -> weights or side branches."""

from engine.families.klein.lora.apply import LoraLinear, apply
from engine.families.klein.lora.deltas import RowRange, WeightDelta
from engine.families.klein.lora.files import Lora, resolve_lora
from engine.families.klein.lora.read import LoraDeltas, read

__all__ = ["Lora", "LoraDeltas", "LoraLinear", "RowRange", "WeightDelta", "apply", "read", "resolve_lora"]
