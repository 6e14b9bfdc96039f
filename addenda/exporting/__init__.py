"""Exports the combined model of some tasks to one file that runs without Addenda (torch.export or ONNX)."""

from addenda.exporting.export import Exported, export_model
from addenda.exporting.formats import FORMATS

__all__ = ["FORMATS", "Exported", "export_model"]
