"""Detection of a model's retrieval heads, and a command that writes them as a profile for DySCO."""

from jaxdual.heads.detection import Detection, detect
from jaxdual.heads.items import Document, Item, read_items
from jaxdual.heads.prompts import ItemPrompts, PromptForm, build_prompts

__all__ = ["Detection", "Document", "Item", "ItemPrompts", "PromptForm", "build_prompts", "detect", "read_items"]
