"""The combined model of some tasks as one file, for programs without Addenda: torch.export or ONNX (only ONNX here)."""

from addenda.exporting.export import Exported, export_model
from addenda.exporting.formats import FORMATS

__all__ = ["FORMATS", "Exported", "export_model"]
